"""Damage to the framing of a shard and to its header. `tests.corpus.damage.components` damages the data."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from tests.artifact.damaged import shards
from tests.corpus.damage.edits import Damage, append, flip_bit, truncate, zero_sector
from tests.corpus.damage.odd_json import odd_edit
from tests.spec.edits import _read_shard, _write_shard

INDEX = "model.safetensors.index.json"


def frame(random: Random, folder: Path) -> Damage:
    """Change the length field, or where the file ends."""
    path = random.choice(list(shards(folder)))
    data = path.read_bytes()
    (length,) = (int.from_bytes(data[:8], "little"),)
    match random.randrange(4):
        case 0:
            what = truncate(random, path)
        case 1:
            what = append(random, path)
        case 2:
            what = flip_bit(random, path, 0, 8)
        case _:
            hostile = random.choice([0, 1, length - 1, length + 1, length + 4096, 2**25 + 1, 2**31, 2**63, 2**64 - 1])
            path.write_bytes(hostile.to_bytes(8, "little") + data[8:])
            what = f"length {hostile}"
    return Damage((path.name, INDEX), what, must_refuse=True)


def header_bytes(random: Random, folder: Path) -> Damage:
    """Change bytes of a header. A bit in a space or a name may give another valid artifact, if digests are new."""
    path = random.choice(list(shards(folder)))
    text = _read_shard(path)[0].rstrip(b" ")
    edit = random.choice([flip_bit, flip_bit, zero_sector])
    return Damage((path.name, INDEX, "qformat.json", "config.json"), edit(random, path, 8, 8 + len(text)))


def header_object(random: Random, folder: Path) -> Damage:
    """Change the object in a header, so that it contradicts the data, the index or the manifest."""
    path = random.choice(list(shards(folder)))
    text, data = _read_shard(path)
    header: dict[str, Any] = json.loads(text)
    name = random.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    match random.randrange(8):
        case 0:
            same = {"BF16": "F16", "U8": "I8", "F32": "I32"}
            entry["dtype"] = random.choice([same[entry["dtype"]], "F64", "F4", "", 5])
            what = f"dtype of {name} = {entry['dtype']}"
        case 1:
            entry["shape"] = random.choice([[], [0], [2**60, 2**60], [1] * 9, [*entry["shape"], 2], [-1], [1.0], "8"])
            what = f"shape of {name} = {entry['shape']}"
        case 2:
            begin, end = entry["data_offsets"]
            offsets = [[end, begin], [begin + 1, end], [begin, end + 1], [-1, end], [0, 2**62], [begin], [0.0, end]]
            entry["data_offsets"] = random.choice([chosen for chosen in offsets if chosen != entry["data_offsets"]])
            what = f"offsets of {name} = {entry['data_offsets']}"
        case 3:
            new = random.choice(["", "x", name + " ", "\x1b[31m", "__metadata__", "a" * 600, "\u202e" + name])
            header[new] = header.pop(name)
            what = f"{name} renamed to {new[:20]!r}"
        case 4:
            del header[name]
            what = f"{name} removed"
        case 5:
            entry[random.choice(["more", "", "absmax"])] = 1
            what = f"another field of {name}"
        case 6:
            header["__metadata__"] = random.choice([None, [], {"a": 1}, {"a": None}])
            what = f"metadata {header['__metadata__']}"
        case _:
            twice = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
            _write_shard(path, twice.encode(), data)
            return Damage((path.name, INDEX), f"{name} twice", must_refuse=True)
    _write_shard(path, json.dumps(header).encode(), data)
    return Damage((path.name, INDEX, "qformat.json"), what, must_refuse=True)


def header_odd(random: Random, folder: Path) -> Damage:
    """Change any value of a header."""
    path = random.choice(list(shards(folder)))
    text, data = _read_shard(path)
    header = json.loads(text)
    what = odd_edit(random, header)
    _write_shard(path, json.dumps(header).encode("utf-8", "surrogatepass"), data)
    return Damage((path.name, INDEX, "qformat.json"), what)


def exchanged(random: Random, folder: Path) -> Damage:
    """Exchange the names of two shards, or replace one with the other."""
    one, other = random.sample(list(shards(folder)), 2)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    if random.random() < 0.5:
        other.write_bytes(first)
        return Damage((one.name, other.name, INDEX), "two shards exchanged", must_refuse=True)
    return Damage((one.name, other.name, INDEX), f"{one.name} replaced with {other.name}", must_refuse=True)
