"""Shards that are missing, swapped, truncated or inconsistent are rejected with the file and the tensor."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from qformat.converters.convert import convert, plan
from qformat.errors import Reason, SourceError
from tests.converters.refused_source import refusal
from tests.small_models import (
    INDEX,
    contents,
    header_bytes,
    llama_tensors,
    safetensors_bytes,
    tiny_tensors,
    write_index,
)

FIRST = "model-00001-of-00003.safetensors"
SECOND = "model-00002-of-00003.safetensors"


def weight_map(source: Path) -> dict[str, object]:
    found = json.loads((source / INDEX).read_text())["weight_map"]
    assert isinstance(found, dict)
    return found


# Shards and index


def test_a_missing_shard_of_the_index_is_reported(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    error = refusal(sharded)
    assert error.reason is Reason.MISSING_FILE
    assert Path(error.path) == sharded / SECOND


def test_a_tensor_of_the_index_that_no_shard_has_is_reported(sharded: Path) -> None:
    write_index(sharded, {**weight_map(sharded), "model.lost.weight": FIRST})
    error = refusal(sharded)
    assert error.reason is Reason.INDEX_MISMATCH
    assert error.tensor == "model.lost.weight"
    assert "no shard has it" in str(error)


def test_a_tensor_that_the_index_assigns_to_another_shard_is_reported(sharded: Path) -> None:
    mapped = weight_map(sharded)
    name = next(name for name, shard in mapped.items() if shard == FIRST)
    write_index(sharded, {**mapped, name: SECOND})
    error = refusal(sharded)
    assert error.reason is Reason.INDEX_MISMATCH
    assert error.tensor == name
    assert FIRST in str(error)
    assert SECOND in str(error)


def test_a_tensor_missing_from_the_index_is_reported(sharded: Path) -> None:
    mapped = weight_map(sharded)
    name = next(iter(mapped))
    shard = mapped.pop(name)
    write_index(sharded, mapped)
    error = refusal(sharded)
    assert error.reason is Reason.INDEX_MISMATCH
    assert error.tensor == name
    assert Path(error.path).name == shard


def test_a_tensor_in_two_shards_is_rejected_for_any_index(sharded: Path) -> None:
    tensors = llama_tensors()
    names = [name for name, shard in weight_map(sharded).items() if shard == SECOND]
    stowaway = next(name for name, shard in weight_map(sharded).items() if shard == FIRST)
    (sharded / SECOND).write_bytes(safetensors_bytes({name: tensors[name] for name in [*names, stowaway]}))
    error = refusal(sharded)
    assert error.reason is Reason.DUPLICATE_TENSOR
    assert error.tensor == stowaway
    assert FIRST in str(error)
    assert SECOND in str(error)


def test_swapped_shards_are_detected(sharded: Path) -> None:
    first, second = (sharded / FIRST).read_bytes(), (sharded / SECOND).read_bytes()
    (sharded / FIRST).write_bytes(second)
    (sharded / SECOND).write_bytes(first)
    assert refusal(sharded).reason is Reason.INDEX_MISMATCH


def test_a_single_file_beside_an_index_is_ambiguous(sharded: Path) -> None:
    (sharded / "model.safetensors").write_bytes((sharded / FIRST).read_bytes())
    assert refusal(sharded).reason is Reason.INDEX_MISMATCH


def test_an_index_that_lists_the_single_file_is_not_ambiguous(single: Path, tmp_path: Path) -> None:
    convert(single, tmp_path / "without")
    write_index(single, dict.fromkeys(tiny_tensors(), "model.safetensors"))
    convert(single, tmp_path / "with")
    assert contents(tmp_path / "with") == contents(tmp_path / "without")


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"{}",
        b"[]",
        b'{"weight_map": {}}',
        b'{"weight_map": []}',
        b'{"weight_map": {"a.weight": 5}}',
        b'{"weight_map": {"a.weight": null}}',
        b"\xff\xfe",
        b'{"weight_map": NaN}',
        b"[" * 10_000,
    ],
)
def test_a_broken_index_is_rejected_and_reported(index: bytes, sharded: Path) -> None:
    (sharded / INDEX).write_bytes(index)
    assert Path(refusal(sharded).path) == sharded / INDEX


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/dev/zero",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        ".",
        "",
        "a\\b.safetensors",
        "model\x00.safetensors",
        "model\n.safetensors",
        "model\u202e.safetensors",
    ],
)
def test_a_shard_that_is_not_a_plain_name_is_rejected_before_it_is_opened(name: str, sharded: Path) -> None:
    (sharded.parent / "outside.safetensors").write_bytes((sharded / FIRST).read_bytes())
    mapped = {tensor: name if shard == FIRST else shard for tensor, shard in weight_map(sharded).items()}
    write_index(sharded, mapped)
    error = refusal(sharded)
    assert error.reason is Reason.PATH_ESCAPES
    assert Path(error.path) == sharded / INDEX


@pytest.mark.parametrize(("nbytes", "reason"), [(255, Reason.MISSING_FILE), (256, Reason.PATH_ESCAPES)])
def test_a_shard_with_a_name_too_long_for_the_file_system_is_rejected(
    nbytes: int, reason: Reason, sharded: Path
) -> None:
    write_index(sharded, dict.fromkeys(weight_map(sharded), "x" * nbytes))
    assert refusal(sharded).reason is reason


def test_an_index_that_lists_the_config_as_a_shard_is_rejected(sharded: Path) -> None:
    write_index(sharded, {**weight_map(sharded), "a.weight": "config.json"})
    error = refusal(sharded)
    assert Path(error.path) == sharded / "config.json"


# Headers and data


def test_a_shard_truncated_at_any_length_is_rejected_and_reported(single: Path) -> None:
    path = single / "model.safetensors"
    data = path.read_bytes()
    for nbytes in [*range(0, len(data), 13), len(data) - 1]:
        path.write_bytes(data[:nbytes])
        with pytest.raises(SourceError) as refused:
            plan(single)
        assert refused.value.reason is Reason.TRUNCATED
        assert Path(refused.value.path) == path


@pytest.mark.parametrize("tail", [b"\0", b" ", b"x" * 4096])
def test_trailing_bytes_are_rejected(tail: bytes, single: Path) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes() + tail)
    assert refusal(single).reason is Reason.TRAILING_BYTES


def entry(
    dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16), **more: object
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


LIES: dict[str, tuple[object, Reason]] = {
    "hole": ({"a": entry(), "b": entry(offsets=(20, 36))}, Reason.HEADER_OFFSETS),
    "hole in front": ({"a": entry(offsets=(4, 20))}, Reason.HEADER_OFFSETS),
    "overlap": ({"a": entry(), "b": entry(offsets=(12, 28))}, Reason.HEADER_OFFSETS),
    "two names on one range": ({"a": entry(), "b": entry()}, Reason.HEADER_OFFSETS),
    "begin behind end": ({"a": entry(offsets=(16, 0))}, Reason.HEADER_OFFSETS),
    "offset of a float": ({"a": entry(offsets=(0, 16.0))}, Reason.HEADER_FIELD),
    "offset of a bool": ({"a": entry("U8", (1,), (False, True))}, Reason.HEADER_FIELD),
    "offset of a string": ({"a": entry(offsets=("0", "16"))}, Reason.HEADER_FIELD),
    "negative offset": ({"a": entry(offsets=(-16, 0))}, Reason.HEADER_FIELD),
    "minus zero": ("minus zero", Reason.HEADER_FIELD),
    "offset beyond 2^64": ({"a": entry(offsets=(0, 2**64))}, Reason.HEADER_FIELD),
    "three offsets": ({"a": entry(offsets=(0, 16, 16))}, Reason.HEADER_FIELD),
    "empty tensor inside another": ({"a": entry(), "b": entry(shape=(0,), offsets=(8, 8))}, Reason.HEADER_OFFSETS),
    "empty tensor beyond the end": ({"a": entry(), "b": entry(shape=(0,), offsets=(20, 20))}, Reason.HEADER_OFFSETS),
    "shape overflow": ({"a": entry(shape=(2**32, 2**32))}, Reason.HEADER_OFFSETS),
    "shape overflow to the right size": ({"a": entry(shape=(2**48, 2**48, 0, 2**48))}, Reason.HEADER_OFFSETS),
    "size beyond the limit": ({"a": entry(shape=(2**48 + 1,))}, Reason.HEADER_FIELD),
    "negative size": ({"a": entry(shape=(-2, -2))}, Reason.HEADER_FIELD),
    "size of a float": ({"a": entry(shape=(2.0, 2))}, Reason.HEADER_FIELD),
    "size of a bool": ({"a": entry(shape=(True, 4))}, Reason.HEADER_FIELD),
    "shape of a number": ({"a": entry(shape=4)}, Reason.HEADER_FIELD),
    "shape does not fit the bytes": ({"a": entry(shape=(2, 3))}, Reason.HEADER_OFFSETS),
    "nine dimensions": ({"a": entry(shape=(1, 1, 1, 1, 1, 1, 1, 1, 4))}, Reason.HEADER_LIMIT),
    "a million dimensions": ({"a": entry(shape=(1,) * 1_000_000)}, Reason.HEADER_LIMIT),
    "unknown dtype": ({"a": entry("F99")}, Reason.UNSUPPORTED_DTYPE),
    "dtype of a number": ({"a": entry(4)}, Reason.UNSUPPORTED_DTYPE),
    "dtype of a list": ({"a": entry(["F32"])}, Reason.UNSUPPORTED_DTYPE),
    "sub-byte dtype": ({"a": entry("F4", (32,))}, Reason.UNSUPPORTED_DTYPE),
    "missing field": ({"a": {"dtype": "F32", "shape": [4]}}, Reason.HEADER_FIELD),
    "entry is null": ({"a": None}, Reason.HEADER_FIELD),
    "entry is a list": ({"a": []}, Reason.HEADER_FIELD),
    "empty name": ({"": entry()}, Reason.HEADER_LIMIT),
    "long name": ({"a" * 513: entry()}, Reason.HEADER_LIMIT),
    "name of a megabyte": ({"a" * 2**20: entry()}, Reason.HEADER_LIMIT),
    "name with NUL": ({"a\0b": entry()}, Reason.HEADER_LIMIT),
    "name with a line end": ({"a\nb": entry()}, Reason.HEADER_LIMIT),
    "name that turns the writing direction": ({"a\u202eb": entry()}, Reason.HEADER_LIMIT),
    "half a surrogate pair in a name": ({"a\ud800": entry()}, Reason.JSON_SYNTAX),
    "half a surrogate pair in the metadata": (
        {"a": entry(), "__metadata__": {"x": "\udfff"}},
        Reason.JSON_SYNTAX,
    ),
    "metadata of numbers": ({"a": entry(), "__metadata__": {"format": 1}}, Reason.HEADER_FIELD),
    "metadata of objects": ({"a": entry(), "__metadata__": {"format": {}}}, Reason.HEADER_FIELD),
    "no tensor but data": ({}, Reason.TRAILING_BYTES),
    "only metadata and data": ({"__metadata__": {}}, Reason.TRAILING_BYTES),
    "a list": ([], Reason.HEADER_SYNTAX),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_incorrect_header_is_rejected_with_file_and_tensor(lie: str, single: Path) -> None:
    record, reason = LIES[lie]
    header = header_bytes(record)
    if lie == "minus zero":
        header = header_bytes({"a": entry(offsets=(7777, 16))}).replace(b"7777", b"  -0")
    path = single / "model.safetensors"
    path.write_bytes(header + bytes(16))
    error = refusal(single)
    assert error.reason is reason, error
    assert Path(error.path) == path
    assert len(str(error)) < 2000
    if reason in {Reason.HEADER_OFFSETS, Reason.HEADER_LIMIT, Reason.UNSUPPORTED_DTYPE}:
        assert error.tensor is not None


def raw_header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


A = b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"\xef\xbb\xbf{" + A + b"}", Reason.HEADER_SYNTAX),
        (b"", Reason.HEADER_SYNTAX),
        (b"        ", Reason.HEADER_SYNTAX),
        (b"{" + A + b"}{" + A + b"}", Reason.JSON_SYNTAX),
        (b"{" + A + b"}\0\0\0", Reason.JSON_SYNTAX),
        (b"{" + A + b"} // comment", Reason.JSON_SYNTAX),
        (b"{" + A, Reason.JSON_SYNTAX),
        (b"{" + A + b",}", Reason.JSON_SYNTAX),
        (b"{" + A + b"," + A + b"}", Reason.JSON_DUPLICATE_KEY),
        (b"{" + A + b',"\\u0061":' + A[4:] + b"}", Reason.JSON_DUPLICATE_KEY),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}', Reason.JSON_DUPLICATE_KEY),
        (b'{"a":{"dtype":"F32","shape":[4e0],"data_offsets":[0,16]}}', Reason.HEADER_FIELD),
        (b'{"a":{"dtype":"F32","shape":[' + b"9" * 400 + b'],"data_offsets":[0,16]}}', Reason.JSON_LIMIT),
        (b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,16]}}', Reason.JSON_LIMIT),
        (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}', Reason.JSON_SYNTAX),
        (b"{" + A + b',"__metadata__":' + b"[" * 40_000 + b"]" * 40_000 + b"}", Reason.JSON_LIMIT),
        (b'{"\xff":{}}', Reason.JSON_SYNTAX),
    ],
)
def test_a_header_that_is_not_exactly_one_json_object_is_rejected(text: bytes, reason: Reason, single: Path) -> None:
    (single / "model.safetensors").write_bytes(raw_header(text) + bytes(16))
    assert refusal(single).reason is reason


@pytest.mark.parametrize("length", [2**25 + 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_header_length_bomb_allocates_nothing(length: int, single: Path) -> None:
    (single / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    assert refusal(single).reason is Reason.HEADER_LENGTH


def test_a_huge_sparse_file_allocates_nothing(single: Path) -> None:
    path = single / "model.safetensors"
    path.write_bytes(raw_header(b" " * 8))
    os.truncate(path, 2**42)
    assert refusal(single).reason is Reason.HEADER_SYNTAX


def test_a_header_of_a_million_tensors_is_rejected_quickly(single: Path) -> None:
    entries = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(500_000))
    (single / "model.safetensors").write_bytes(raw_header(b"{" + entries.encode() + b"}"))
    assert refusal(single).reason is Reason.JSON_LIMIT
