"""Damage to checkpoints that a conversion reads: safetensors, PyTorch's zip and GGUF."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.corpus.damage.edits import Damage, any_edit, append, flip_bit, truncate, zero_sector
from tests.corpus.damage.json_files import config_values
from tests.corpus.damage.odd_json import damage_json, odd_edit

INDEX, BIN, GGUF = "model.safetensors.index.json", "pytorch_model.bin", "model.gguf"
ALL = (".safetensors", INDEX, "config.json")


def shard(random: Random, folder: Path) -> Damage:
    """Damage a safetensors file of a source: framing, header or data. The data have no digest."""
    path = random.choice(sorted(folder.glob("*.safetensors")))
    length = int.from_bytes(path.read_bytes()[:8], "little")
    match random.randrange(6):
        case 0:
            return Damage((path.name,), truncate(random, path), must_refuse=True)
        case 1:
            return Damage((path.name,), append(random, path), must_refuse=True)
        case 2:
            return Damage((path.name,), flip_bit(random, path, 0, 8), must_refuse=True)
        case 3:
            return Damage(ALL, flip_bit(random, path, 8, 8 + length))
        case 4:
            return Damage((path.name,), zero_sector(random, path, 8 + length))
        case _:
            data = path.read_bytes()
            header: Any = json.loads(data[8 : 8 + length])
            what = odd_edit(random, header)
            text = json.dumps(header).encode("utf-8", "surrogatepass")
            path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
            return Damage(ALL, what)


def source_index(random: Random, folder: Path) -> Damage:
    return Damage((INDEX, ".safetensors"), damage_json(random, folder / INDEX))


def source_config(random: Random, folder: Path) -> Damage:
    if random.random() < 0.5:
        return config_values(random, folder)
    return Damage(("config.json",), damage_json(random, folder / "config.json"))


def source_texts(random: Random, folder: Path) -> Damage:
    """Damage a small file that a conversion copies."""
    name = random.choice(["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"])
    edit = any_edit if name.endswith("jinja") else damage_json
    return Damage((name,), f"{name}: {edit(random, folder / name)}")


def torch_bytes(random: Random, folder: Path) -> Damage:
    """Damage the bytes of PyTorch's zip file."""
    path = folder / BIN
    edit = random.choice([flip_bit, zero_sector, truncate, append, any_edit])
    return Damage((BIN,), edit(random, path))


def torch_storage(random: Random, folder: Path) -> Damage:
    """Flip a bit in the data of a tensor, which the CRC-32 of its member covers."""
    path = folder / BIN
    data = path.read_bytes()
    with zipfile.ZipFile(path) as members:
        member = random.choice([info for info in members.infolist() if "/data/" in info.filename])
    name_nbytes, extra_nbytes = struct.unpack_from("<HH", data, member.header_offset + 26)
    start = member.header_offset + 30 + name_nbytes + extra_nbytes
    what = f"{member.filename}: {flip_bit(random, path, start, start + member.file_size)}"
    return Damage((BIN,), what, must_refuse=True)


class _Foreign:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("a pickle was run",)


def torch_objects(random: Random, folder: Path) -> Damage:
    """Save other objects than a dict of tensors, or tensors that do not lie in their storage."""
    path = folder / BIN
    wide = torch.zeros(4).as_strided((2**20, 2**20), (0, 0))
    chosen = random.choice([
        {}, [], None, 3, {"x": 3}, {3: torch.zeros(2)}, {"x": [torch.zeros(2)]}, {"": torch.zeros(2)}, {"x": wide},
        {"\x1b[2J": torch.zeros(2)}, {"x": torch.zeros(2).to_sparse()}, {"x": torch.zeros(2, dtype=torch.complex64)},
        {"x": torch.zeros(0)}, {"x": torch.zeros([1] * 12)}, {"a" * 600: torch.zeros(2)}, _Foreign(), {"x": _Foreign()},
        {"model.norm.weight": torch.zeros(32)}, {"state_dict": {"x": torch.zeros(2)}},
    ])  # fmt: skip
    form = random.choice(["zip", "zip", "legacy", "pickle"])
    if form == "pickle":
        buffer = io.BytesIO()
        pickle.dump(chosen if isinstance(chosen, _Foreign) else {"x": 3}, buffer)
        path.write_bytes(buffer.getvalue())
    else:
        torch.save(chosen, path, _use_new_zipfile_serialization=form == "zip")
    what = str(chosen).replace("\n", " ")[:60]
    return Damage((BIN, "config.json"), f"{form}: {what}")


def gguf_bytes(random: Random, folder: Path) -> Damage:
    """Damage any bytes of a GGUF file. It has no digest of its data."""
    edit = random.choice([flip_bit, zero_sector, any_edit, truncate])
    return Damage((GGUF,), edit(random, folder / GGUF))


def gguf_header(random: Random, folder: Path) -> Damage:
    """Flip a bit of the metadata or of the table of tensors, or write a hostile count."""
    path = folder / GGUF
    data = bytearray(path.read_bytes())
    stop = data.rindex(b"output_norm.weight") + 60
    if random.random() < 0.6:
        return Damage((GGUF,), flip_bit(random, path, 0, stop))
    at = random.choice([8, 16, random.randrange(24, stop - 8)])
    value = random.choice([0, 1, 2**31, 2**40, 2**62, 2**63, 2**64 - 1, 50_000])
    data[at : at + 8] = struct.pack("<Q", value)
    path.write_bytes(data)
    return Damage((GGUF,), f"bytes {at} to {at + 8} = {value}")
