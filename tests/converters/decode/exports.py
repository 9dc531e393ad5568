"""Helpers for tests of exports: complete and interrupted runs with small shards, the written tensors, and damage."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from qformat.converters.export import export
from tests.artifact.damaged import regions
from tests.converters.faulty_disk import FaultyDisk, Killed, KilledAfter, journal_tensors
from tests.small_models import contents

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
SHARD_NBYTES = 400
"""Five tensors, three shards."""


def exported(artifact: Path, out: Path, to: str = "bf16", **arguments: Any) -> dict[str, bytes]:
    export(artifact, out, to, max_shard_nbytes=SHARD_NBYTES, **{"disk": FaultyDisk(), **arguments})
    return contents(out)


def tensors_in(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Return dtype, shape and bytes of every tensor, read without the code under test."""
    found = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = (entry["dtype"], entry["shape"], data[8 + length + begin : 8 + length + end])
    return found


def kill_after(artifact: Path, out: Path, *, n_done: int, to: str = "bf16") -> Path:
    """Kill an export when `n_done` tensors are in the journal; return the work folder."""
    with pytest.raises(Killed):
        exported(artifact, out, to, workers=1, disk=KilledAfter(n_lines=1 + n_done))  # what was begun, one a tensor
    work = out.with_name(out.name + ".partial")
    assert journal_tensors(work) == n_done
    return work


def damage(folder: Path, component: str) -> str:
    """Flip a bit in the middle of a component of the first tensor that has it; return the tensor's name."""
    region = next(region for region in regions(folder) if region.component == component)
    path = folder / region.file
    data = bytearray(path.read_bytes())
    data[(region.start + region.stop) // 2] ^= 1
    path.write_bytes(data)
    assert region.tensor is not None
    return region.tensor
