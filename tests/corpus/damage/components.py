"""Damage to the data of shards: to each component of a packed weight, to norms and to embeddings."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

from tests.artifact.damaged import Region, regions, rewrite_shard, shard_of
from tests.corpus.damage.edits import Damage, Where, flip_bit, zero_sector
from tests.spec.edits import _range_of

COMPONENTS = ("packed", "absmax", "nested_absmax", "nested_quant_map", "quant_map", "quant_state", "norm", "embedding")
STATE = ".quant_state.bitsandbytes__nf4"


def _regions_of(folder: Path, component: str) -> list[Region]:
    found = [region for region in regions(folder) if region.tensor is not None]
    if component in {"norm", "embedding"}:
        part = {"norm": "norm", "embedding": "embed"}[component]
        return [region for region in found if region.component == "data" and part in str(region.tensor)]
    return [region for region in found if region.component == component]


def bits(random: Random, folder: Path) -> Damage:
    """Flip one bit of a component, or zero a sector of it."""
    component = random.choice(COMPONENTS)
    region = random.choice(_regions_of(folder, component))
    edit = random.choice([flip_bit, flip_bit, flip_bit, zero_sector])
    what = f"{region.tensor} {component}: {edit(random, folder / region.file, region.start, region.stop)}"
    return Damage((region.file,), what, Where.WEIGHTS, must_refuse=component == "quant_map")


def non_finite(random: Random, folder: Path) -> Damage:
    """Set a stored scale or an entry of a map to NaN or infinity."""
    region = random.choice(_regions_of(folder, random.choice(["nested_absmax", "nested_quant_map"])))
    path = folder / region.file
    at = region.start + 4 * random.randrange((region.stop - region.start) // 4)
    value = random.choice([float("nan"), float("inf"), -float("inf")])
    data = bytearray(path.read_bytes())
    data[at : at + 4] = struct.pack("<f", value)
    path.write_bytes(data)
    return Damage((path.name,), f"{region.tensor} {region.component}: {value}", Where.WEIGHTS, must_refuse=True)


def bad_norm(random: Random, folder: Path) -> Damage:
    """Set an element of a norm or an embedding to NaN or infinity: kept tensors may have any value."""
    region = random.choice(_regions_of(folder, random.choice(["norm", "embedding"])))
    path = folder / region.file
    data = bytearray(path.read_bytes())
    at = region.start + 2 * random.randrange((region.stop - region.start) // 2)
    data[at : at + 2] = random.choice([b"\xc0\x7f", b"\x80\x7f", b"\x7f\x7f"])
    path.write_bytes(data)
    return Damage((path.name,), f"{region.tensor}: a value that is not finite or huge", Where.WEIGHTS)


_STATES: list[dict[str, Any]] = [
    {"quant_type": "fp4"}, {"quant_type": "x"}, {"quant_type": None}, {"blocksize": 0}, {"blocksize": -64},
    {"blocksize": 63}, {"blocksize": 128}, {"blocksize": 2**40}, {"blocksize": 64.0}, {"dtype": "load"},
    {"dtype": "float64"}, {"dtype": "hub"}, {"dtype": 1}, {"shape": []}, {"shape": [2**40, 2**40]}, {"shape": [-1]},
    {"shape": "64"}, {"nested_blocksize": 0}, {"nested_blocksize": 1}, {"nested_dtype": "float16"},
    {"nested_offset": 1e300}, {"nested_offset": "0.05"}, {"nested_offset": None}, {"nested_offset": True},
    {"nested_offset": float("nan")}, {"absmax": [1.0]}, {"code": "x"}, {"offset": 0},
]  # fmt: skip


def quant_state(random: Random, folder: Path) -> Damage:
    """Write a hostile quant_state of the old size."""
    tensor = str(random.choice(_regions_of(folder, "quant_state")).tensor)
    path, start, nbytes = _range_of(folder, tensor + STATE)
    data = bytearray(path.read_bytes())
    record = json.loads(data[start : start + nbytes])
    if random.random() < 0.15:
        key = random.choice(list(record))
        del record[key]
        what = f"without {key}"
    else:
        change = random.choice(_STATES)
        record |= change
        what = str(change)
    text = json.dumps(record, separators=(",", ":")).encode()
    if len(text) > nbytes:
        text = text[:nbytes]
    data[start : start + nbytes] = text.ljust(nbytes)
    path.write_bytes(data)
    return Damage((path.name,), f"{tensor} quant_state: {what}", Where.WEIGHTS, must_refuse=True)


def layout(random: Random, folder: Path) -> Damage:
    """Remove a component, or give it another dtype or length, in a file that safetensors finds valid."""
    region = random.choice([region for region in regions(folder) if region.component not in {None, "data"}])
    suffixes = {"packed": "", "quant_state": STATE}
    name = str(region.tensor) + suffixes.get(str(region.component), f".{region.component}")
    action = random.choice(["removed", "shorter", "longer", "empty", "another dtype", "another shape"])

    def change(header: dict[str, dict[str, Any]], parts: dict[str, bytes]) -> None:
        entry, data = header[name], parts[name]
        nbytes = {"U8": 1, "F32": 4}[entry["dtype"]]
        if action == "removed":
            del header[name]
        elif action == "another dtype":
            entry["dtype"] = {"U8": "I8", "F32": "U32"}[entry["dtype"]]
        elif action == "another shape":
            entry["shape"] = [1, 1, len(data) // nbytes]
        else:
            lengths = {"shorter": len(data) // nbytes - 1, "longer": len(data) // nbytes + 1, "empty": 0}
            parts[name] = (data + data)[: lengths[action] * nbytes]
            entry["shape"] = [lengths[action], *([1] if len(entry["shape"]) == 2 else [])]

    path = shard_of(folder, name)
    rewrite_shard(path, change)
    # If no shard has a component, no single file is to blame.
    files = (path.name, "model.safetensors.index.json", "qformat.json", "no shard contains")
    return Damage(files, f"{name} {action}", must_refuse=True)
