"""A tiny artifact with a list of all its byte regions, made without the code under test, and functions to damage it."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qformat.artifact.reading.verify import IntegrityReport, verify_integrity
from qformat.converters.convert import ConversionOptions, convert
from tests.small_models import write_tiny

ACCOMPANYING = "LICENSE"
"""File of the artifact that may differ from the manifest (spec section 2.5)."""

COMPONENTS = {
    ".nested_absmax": "nested_absmax",
    ".nested_quant_map": "nested_quant_map",
    ".quant_map": "quant_map",
    ".quant_state.bitsandbytes__nf4": "quant_state",
    ".absmax": "absmax",
}


def make_tiny_artifact(folder: Path, *, max_shard_nbytes: int = 1500) -> Path:
    """Create an artifact of two shards and about 15 kB in `folder`, with one file that only accompanies the model."""
    source = write_tiny(folder / "source", side_files=("generation_config.json", ACCOMPANYING))
    convert(source, folder / "artifact", ConversionOptions(max_shard_nbytes=max_shard_nbytes), workers=1)
    return folder / "artifact"


@dataclass(frozen=True)
class Region:
    """Byte range of a file. The tensor and the component are None outside of tensor data."""

    file: str
    start: int
    stop: int
    tensor: str | None = None
    component: str | None = None


def regions(folder: Path) -> list[Region]:
    """Return the regions of an artifact, which together cover all of its bytes."""
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        if path.suffix != ".safetensors":
            found.append(Region(path.name, 0, len(data)))
            continue
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        found.append(Region(path.name, 0, 8 + length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            suffix = next((suffix for suffix in COMPONENTS if name.endswith(suffix)), "")
            tensor = name.removesuffix(suffix)
            packed = (
                tensor + ".quant_map" in json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
            )
            component = COMPONENTS.get(suffix, "packed" if packed else "data")
            found.append(Region(path.name, begin, end, tensor, component))
    return found


def damaged_copy(artifact: Path, folder: Path, tensor: str, component: str) -> Path:
    """Return a copy of an artifact in which one bit of a component is flipped."""
    copy = shutil.copytree(artifact, folder)
    (region,) = (one for one in regions(copy) if (one.tensor, one.component) == (tensor, component))
    data = bytearray((copy / region.file).read_bytes())
    data[region.start] ^= 4
    (copy / region.file).write_bytes(data)
    return copy


def edit_json(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change the object in a JSON file."""
    record = json.loads(path.read_bytes())
    change(record)
    path.write_text(json.dumps(record))


def reseal(folder: Path, record: dict[str, object] | None = None, *, update_files: bool = True) -> None:
    """Write a manifest whose sizes and digests match the files, as an honest but faulty writer would.

    Args:
        folder: Directory of the artifact.
        record: Manifest as an object, by default the existing one. Digests of components are not updated.
        update_files: Update the sizes and digests of the files.
    """
    path = folder / "qformat.json"
    if record is None:
        record = json.loads(path.read_bytes())
    if update_files:
        for name, entry in record["files"].items():  # type: ignore[attr-defined]
            data = (folder / name).read_bytes()
            entry["nbytes"] = len(data)
            entry["sha256"] = hashlib.sha256(data).hexdigest()
            if "header_xxh3" in entry:
                import xxhash

                (length,) = struct.unpack("<Q", data[:8])
                entry["header_xxh3"] = xxhash.xxh3_128_hexdigest(data[: 8 + length])
    record.pop("manifest_sha256", None)
    lines = json.dumps(record, indent=2, ensure_ascii=False)[:-2].encode("utf-8", "surrogatepass")
    unsealed = lines + b',\n  "manifest_sha256": "' + b"0" * 64 + b'"\n}\n'
    digest = hashlib.sha256(unsealed).hexdigest().encode()
    path.write_bytes(unsealed[:-68] + digest + unsealed[-4:])


def rewrite_shard(path: Path, change: Callable[[dict[str, dict[str, object]], dict[str, bytes]], object]) -> None:
    """Split a shard into header entries and data, change them, and write it again with correct offsets."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", None)
    parts = {name: data[8 + length :][slice(*entry["data_offsets"])] for name, entry in header.items()}
    change(header, parts)
    offset = 0
    for name, entry in header.items():
        entry["data_offsets"] = [offset, offset + len(parts[name])]
        offset += len(parts[name])
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    text = text.ljust(-(-(8 + len(text)) // 4096) * 4096 - 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts[name] for name in header))


def shards(folder: Path) -> Iterator[Path]:
    """Return the shards in order."""
    yield from sorted(folder.glob("*.safetensors"))


def shard_of(folder: Path, tensor: str) -> Path:
    """Return the shard that contains a tensor."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


def verify(folder: Path) -> IntegrityReport:
    return verify_integrity(folder, sha256=False, workers=1)
