"""Where the shards of a directory are mapped in this process."""

from __future__ import annotations

from pathlib import Path


def mapped_ranges(folder: Path) -> list[tuple[int, int]]:
    """Return the first address and the end of each mapping of a safetensors file in a directory."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [line[0].split("-") for line in lines if line[-1].startswith(f"{folder}/") and ".safetensors" in line[-1]]
    return [(int(start, 16), int(stop, 16)) for start, stop in mapped]
