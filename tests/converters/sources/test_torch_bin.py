"""PyTorch .bin checkpoints: the same artifact as from safetensors, and all damage found that torch.load overlooks."""

from __future__ import annotations

import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qformat.artifact.reading.verify import verify_integrity
from qformat.converters.compare.compare import compare
from qformat.converters.convert import convert, plan
from qformat.converters.sources.open_source import open_source
from qformat.errors import QformatError, Reason, SourceError
from tests.converters.sources.decoded_kinds import DTYPES, read, torch_llama, write_bin
from tests.small_models import contents, llama_config, write_checkpoint, write_llama

PROJECTION = "model.layers.0.mlp.up_proj.weight"


def shard(folder: Path, n_shards: int) -> Path:
    """Split the one file of a checkpoint into shards with an index."""
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    weight_map = {}
    for number in range(n_shards):
        name = f"pytorch_model-{number + 1:05d}-of-{n_shards:05d}.bin"
        members = {key: tensors[key].clone() for key in list(tensors)[number::n_shards]}
        torch.save(members, folder / name)
        weight_map |= dict.fromkeys(members, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def tensor_files(out: Path) -> dict[str, bytes]:
    """Return all files of an artifact but the manifest, which names the source."""
    return {name: data for name, data in contents(out).items() if name != "qformat.json"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_shards", [1, 3])
def test_the_artifact_is_that_of_the_same_tensors_in_safetensors(dtype: str, n_shards: int, tmp_path: Path) -> None:
    source = write_bin(tmp_path / "bin", torch_llama(dtype))
    if n_shards > 1:
        shard(source, n_shards)
    convert(source, tmp_path / "out")
    convert(write_llama(tmp_path / "safetensors", dtype=dtype), tmp_path / "expected")
    assert tensor_files(tmp_path / "out") == tensor_files(tmp_path / "expected")
    assert verify_integrity(tmp_path / "out", sha256=True).passed
    assert compare(tmp_path / "out", source).passed
    described = json.loads((tmp_path / "out" / "qformat.json").read_text())["source"]
    assert described["kind"] == "torch_bin"
    assert len(described["files"]) == n_shards


def test_views_of_a_storage_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    base = torch.arange(2000, dtype=torch.float32).reshape(40, 50)
    views = {
        "transposed": base.t(),
        "rows": base[3:7],
        "columns": base[:, 10:20],
        "every_third": base.flatten()[5::3],
        "cube": base.reshape(4, 10, 50).permute(2, 0, 1),
        "expanded": base[:1].expand(6, 50),
        "scalar": base[0, 1],
        "empty": base[:0],
        "whole": base,
        "bool": base > 900,
        "half": base.to(torch.bfloat16).t(),
        "parameter": torch.nn.Parameter(base[1]),
    }
    source = open_source(write_bin(tmp_path / "bin", {**torch_llama(), **views}))
    for name, view in views.items():
        whole = view.detach().contiguous().flatten()
        expected = whole.view(torch.uint8).numpy() if view.numel() else np.empty(0, np.uint8)
        assert source.tensors[name].shape == tuple(view.shape)
        for chunk_nbytes in (4, 52, 10_000):
            assert np.array_equal(read(source, name, chunk_nbytes=chunk_nbytes), expected), name
    source.close()


def test_a_head_tied_to_the_embedding_is_stored_once(tmp_path: Path) -> None:
    tensors = torch_llama()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tied = {**llama_config(), "tie_word_embeddings": True}
    source = open_source(write_bin(tmp_path / "tied", tensors, config=tied))
    assert "lm_head.weight" not in source.tensors
    source.close()
    source = open_source(write_bin(tmp_path / "untied", tensors))
    assert "lm_head.weight" in source.tensors
    source.close()


class _Call:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({PROJECTION: _Call()}, "system"),
        ({"a": torch.zeros(2), "epoch": 3}, "'epoch' is a int"),
        ({3: torch.zeros(2)}, "the key 3 is not a string"),
        ([torch.zeros(2)], "contains a list"),
        ({}, "expected a dict of tensors"),
        ({"state_dict": {"a": torch.zeros(2)}}, "'state_dict' is a dict"),
        ({"a": torch.zeros(2).to_sparse()}, "sparse"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "complex64"),
        ({"a": torch.zeros(2, device="meta")}, "where its data is"),
        ({"a\nb": torch.zeros(2)}, "is not a valid tensor name"),
        ({"a": torch.zeros((1,) * 9)}, "9 dimensions"),
    ],
)
def test_a_pickle_with_anything_but_plain_tensors_is_rejected_with_a_reason(
    content: object, said: str, tmp_path: Path
) -> None:
    source = write_bin(tmp_path / "bin", content)
    with pytest.raises(SourceError) as refused:
        plan(source)
    assert said in str(refused.value)
    assert str(source / "pytorch_model.bin") in str(refused.value)


def test_the_format_before_torch_1_6_is_rejected_with_a_next_step(tmp_path: Path) -> None:
    source = write_bin(tmp_path / "bin", torch_llama())
    torch.save(torch_llama(), source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(SourceError, match="save_pretrained") as refused:
        plan(source)
    assert refused.value.reason is Reason.UNSUPPORTED_SOURCE


def test_an_inconsistent_index_is_reported(tmp_path: Path) -> None:
    source = shard(write_bin(tmp_path / "bin", torch_llama()), 2)
    index = source / "pytorch_model.bin.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(
        json.dumps({"weight_map": {**weight_map, "model.lost.weight": "pytorch_model-00001-of-00002.bin"}})
    )
    with pytest.raises(SourceError, match=r"model\.lost\.weight") as refused:
        plan(source)
    assert refused.value.reason is Reason.INDEX_MISMATCH


def test_a_shard_replaced_by_another_is_a_changed_source(tmp_path: Path) -> None:
    source = write_bin(tmp_path / "bin", torch_llama())
    opened = open_source(source)
    before = opened.state()
    os.utime(source / "pytorch_model.bin", ns=(1, 1))
    assert opened.state() != before
    opened.close()


def storage_ranges(path: Path) -> list[tuple[int, int]]:
    """Return first and last byte of each storage in the file."""
    data = path.read_bytes()
    ranges = []
    for member in zipfile.ZipFile(path).infolist():
        if "/data/" in member.filename and member.file_size:
            at = member.header_offset
            name_nbytes, extra_nbytes = struct.unpack_from("<2H", data, at + 26)
            start = at + 30 + name_nbytes + extra_nbytes
            ranges.append((start, start + member.file_size))
    return ranges


def test_a_flipped_bit_in_any_storage_is_reported_with_the_file(tmp_path: Path) -> None:
    source = write_bin(tmp_path / "bin", torch_llama())
    path = source / "pytorch_model.bin"
    whole, pick = path.read_bytes(), random.Random(0)
    for start, stop in storage_ranges(path):
        damaged = bytearray(whole)
        damaged[pick.randrange(start, stop)] ^= 1 << pick.randrange(8)
        path.write_bytes(damaged)
        torch.load(path, weights_only=True)  # overlooks it
        with pytest.raises(SourceError, match=r"pytorch_model\.bin.*CRC-32") as refused:
            convert(source, tmp_path / "out", restart=True)
        assert refused.value.reason is Reason.FILE_DIGEST
        assert not (tmp_path / "out").exists()


def test_any_damage_is_rejected_or_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_bin(tmp_path / "bin", torch_llama())
    path = source / "pytorch_model.bin"
    whole, pick = path.read_bytes(), random.Random(1)
    opened = open_source(source)
    expected = {name: read(opened, name, chunk_nbytes=1 << 20).tobytes() for name in opened.tensors}
    opened.close()
    pickle_at = whole.index(b"PK", 0) + 30
    directory_at = whole.index(b"PK\x01\x02")
    copies = [whole[: pick.randrange(len(whole))] for _ in range(15)]
    for first, last, count in ((pickle_at, 3000, 40), (directory_at, len(whole), 60), (0, len(whole), 20)):
        for _ in range(count):
            damaged = bytearray(whole)
            damaged[pick.randrange(first, last)] ^= 1 << pick.randrange(8)
            copies.append(bytes(damaged))
    messages = []
    for damaged in copies:
        path.write_bytes(damaged)
        try:
            opened = open_source(source)
            found = {name: read(opened, name, chunk_nbytes=1 << 20).tobytes() for name in opened.tensors}
            opened.close()
        except QformatError as error:
            messages.append(str(error))
        else:
            assert found == expected
    assert len(messages) > len(copies) // 2
    assert not [message for message in messages if str(path) not in message]


def test_zip_files_that_torch_does_not_write_are_rejected(tmp_path: Path) -> None:
    source = write_bin(tmp_path / "bin", torch_llama())
    path = source / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(SourceError, match="compressed"):
        plan(source)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else data)
    with pytest.raises(SourceError, match="big-endian"):
        plan(source)


def test_safetensors_files_take_precedence_over_bin_files(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "both")
    torch.save(torch_llama("F32"), source / "pytorch_model.bin")
    opened = open_source(source)
    assert opened.kind == "safetensors"
    opened.close()
