"""Source checkpoints that are damaged, inconsistent, hostile or of another kind: refused by name, with the way out."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qformat.artifact.reading.reader import open_artifact
from qformat.artifact.reading.verify import verify_integrity
from qformat.converters.convert import ConversionOptions, convert, plan
from qformat.errors import QformatError, Reason, SourceError
from tests.small_models import (
    SIDE_FILES,
    Tensor,
    contents,
    header_bytes,
    llama_tensors,
    raw_tensor,
    safetensors_bytes,
    tensor_of,
    tiny_tensors,
    weight,
    write_checkpoint,
    write_index,
    write_llama,
    write_tiny,
)

FIRST = "model-00001-of-00003.safetensors"
SECOND = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
PROJECTION = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "source", n_shards=3)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "source")


def refusal(source: Path, options: ConversionOptions | None = None) -> SourceError:
    """Return the error of a conversion, which plan finds as well, after which nothing stands under OUT."""
    out = source.with_name("out")
    with pytest.raises(SourceError) as refused:
        convert(source, out, options)
    assert not out.exists()
    with pytest.raises(SourceError) as planned:
        plan(source, options)
    assert str(planned.value) == str(refused.value)
    assert not out.with_name("out.partial").exists()
    return refused.value


def weight_map(source: Path) -> dict[str, object]:
    found = json.loads((source / INDEX).read_text())["weight_map"]
    assert isinstance(found, dict)
    return found


# Shards and index


def test_a_shard_that_the_index_names_and_that_is_missing_is_named(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    error = refusal(sharded)
    assert error.reason is Reason.MISSING_FILE
    assert Path(error.path) == sharded / SECOND


def test_a_tensor_of_the_index_that_no_shard_has_is_named(sharded: Path) -> None:
    write_index(sharded, {**weight_map(sharded), "model.lost.weight": FIRST})
    error = refusal(sharded)
    assert error.reason is Reason.INDEX_MISMATCH
    assert error.tensor == "model.lost.weight"
    assert "no shard has it" in str(error)


def test_a_tensor_that_the_index_places_in_another_shard_is_named(sharded: Path) -> None:
    mapped = weight_map(sharded)
    name = next(name for name, shard in mapped.items() if shard == FIRST)
    write_index(sharded, {**mapped, name: SECOND})
    error = refusal(sharded)
    assert error.reason is Reason.INDEX_MISMATCH
    assert error.tensor == name
    assert FIRST in str(error)
    assert SECOND in str(error)


def test_a_tensor_that_the_index_does_not_have_is_named(sharded: Path) -> None:
    mapped = weight_map(sharded)
    name = next(iter(mapped))
    shard = mapped.pop(name)
    write_index(sharded, mapped)
    error = refusal(sharded)
    assert error.reason is Reason.INDEX_MISMATCH
    assert error.tensor == name
    assert Path(error.path).name == shard


def test_a_tensor_in_two_shards_is_refused_whatever_the_index_says(sharded: Path) -> None:
    tensors = llama_tensors()
    names = [name for name, shard in weight_map(sharded).items() if shard == SECOND]
    stowaway = next(name for name, shard in weight_map(sharded).items() if shard == FIRST)
    (sharded / SECOND).write_bytes(safetensors_bytes({name: tensors[name] for name in [*names, stowaway]}))
    error = refusal(sharded)
    assert error.reason is Reason.DUPLICATE_TENSOR
    assert error.tensor == stowaway
    assert FIRST in str(error)
    assert SECOND in str(error)


def test_swapped_shards_are_noticed(sharded: Path) -> None:
    first, second = (sharded / FIRST).read_bytes(), (sharded / SECOND).read_bytes()
    (sharded / FIRST).write_bytes(second)
    (sharded / SECOND).write_bytes(first)
    assert refusal(sharded).reason is Reason.INDEX_MISMATCH


def test_a_single_file_beside_an_index_is_ambiguous(sharded: Path) -> None:
    (sharded / "model.safetensors").write_bytes((sharded / FIRST).read_bytes())
    assert refusal(sharded).reason is Reason.INDEX_MISMATCH


def test_an_index_that_names_the_single_file_is_not_ambiguous(single: Path, tmp_path: Path) -> None:
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
        b'{"weight_map": {"a.weight": "x", "a.weight": "y"}}',
        b"\xff\xfe",
        b'{"weight_map": NaN}',
        b"[" * 10_000,
    ],
)
def test_a_broken_index_is_refused_by_name(index: bytes, sharded: Path) -> None:
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
def test_a_shard_that_is_not_a_plain_name_is_refused_before_it_is_opened(name: str, sharded: Path) -> None:
    (sharded.parent / "outside.safetensors").write_bytes((sharded / FIRST).read_bytes())
    mapped = {tensor: name if shard == FIRST else shard for tensor, shard in weight_map(sharded).items()}
    write_index(sharded, mapped)
    error = refusal(sharded)
    assert error.reason is Reason.PATH_ESCAPES
    assert Path(error.path) == sharded / INDEX


@pytest.mark.parametrize(("nbytes", "reason"), [(255, Reason.MISSING_FILE), (256, Reason.PATH_ESCAPES)])
def test_a_shard_with_a_name_too_long_for_the_file_system_is_refused(
    nbytes: int, reason: Reason, sharded: Path
) -> None:
    write_index(sharded, dict.fromkeys(weight_map(sharded), "x" * nbytes))
    assert refusal(sharded).reason is reason


def test_an_index_that_names_the_config_as_a_shard_is_refused(sharded: Path) -> None:
    write_index(sharded, {**weight_map(sharded), "a.weight": "config.json"})
    error = refusal(sharded)
    assert Path(error.path) == sharded / "config.json"


# Headers and data


def test_a_shard_that_is_cut_at_any_length_is_refused_by_name(single: Path) -> None:
    path = single / "model.safetensors"
    data = path.read_bytes()
    for nbytes in [*range(0, len(data), 13), len(data) - 1]:
        path.write_bytes(data[:nbytes])
        with pytest.raises(SourceError) as refused:
            plan(single)
        assert refused.value.reason is Reason.TRUNCATED
        assert Path(refused.value.path) == path


@pytest.mark.parametrize("tail", [b"\0", b" ", b"x" * 4096])
def test_trailing_bytes_are_refused(tail: bytes, single: Path) -> None:
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
    "unknown field": ({"a": entry(more=1)}, Reason.HEADER_FIELD),
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
    "metadata is null": ({"a": entry(), "__metadata__": None}, Reason.HEADER_FIELD),
    "metadata of numbers": ({"a": entry(), "__metadata__": {"format": 1}}, Reason.HEADER_FIELD),
    "metadata of objects": ({"a": entry(), "__metadata__": {"format": {}}}, Reason.HEADER_FIELD),
    "no tensor": ({}, Reason.HEADER_SYNTAX),
    "only metadata": ({"__metadata__": {}}, Reason.HEADER_SYNTAX),
    "a list": ([], Reason.HEADER_SYNTAX),
    "odd offset": ({"x": entry("U8", (1,), (0, 1)), "a": entry(shape=(1,), offsets=(1, 5))}, Reason.ALIGNMENT),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_with_the_file_and_the_tensor(lie: str, single: Path) -> None:
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
    if reason in {Reason.HEADER_OFFSETS, Reason.HEADER_LIMIT, Reason.UNSUPPORTED_DTYPE, Reason.ALIGNMENT}:
        assert error.tensor is not None


def raw_header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


A = b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b" {" + A + b"}", Reason.HEADER_SYNTAX),
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
def test_a_header_that_is_not_exactly_one_json_object_is_refused(text: bytes, reason: Reason, single: Path) -> None:
    (single / "model.safetensors").write_bytes(raw_header(text) + bytes(16))
    assert refusal(single).reason is reason


@pytest.mark.parametrize("length", [2**25 + 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_header_length_bomb_allocates_nothing(length: int, single: Path) -> None:
    (single / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    assert refusal(single).reason is Reason.HEADER_LENGTH


def test_a_huge_sparse_file_is_no_bomb_either(single: Path) -> None:
    path = single / "model.safetensors"
    path.write_bytes(raw_header(b" " * 8))
    os.truncate(path, 2**42)
    assert refusal(single).reason is Reason.HEADER_SYNTAX


def test_a_header_of_a_million_tensors_is_refused_quickly(single: Path) -> None:
    entries = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(500_000))
    (single / "model.safetensors").write_bytes(raw_header(b"{" + entries.encode() + b"}"))
    assert refusal(single).reason is Reason.JSON_LIMIT


# Weights


def with_value(shape: tuple[int, ...], position: tuple[int, ...], value: float, dtype: str) -> Tensor:
    values = np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)
    values[position] = value
    return tensor_of(values, dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [(0, 0), (17, 5), (31, 31)])
def test_a_weight_that_is_not_finite_is_refused_with_its_tensor_and_position(
    position: tuple[int, int], value: float, dtype: str, tmp_path: Path
) -> None:
    tensors = {**llama_tensors(dtype=dtype), PROJECTION: with_value((32, 32), position, value, dtype)}
    source = write_checkpoint(tmp_path / "source", tensors)
    with pytest.raises(SourceError, match="keep_nonfinite=True") as refused:
        convert(source, tmp_path / "out")
    assert refused.value.reason is Reason.NONFINITE_WEIGHT
    assert refused.value.tensor == PROJECTION
    assert str(list(position)) in str(refused.value)
    assert str(value) in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_the_position_is_right_beyond_the_first_chunk(tmp_path: Path) -> None:
    rows, columns = 1400, 2048  # bf16: 5.7 MB, two chunks
    data = np.zeros((rows, columns), np.uint16)
    data[1399, 2047] = 0x7FC0
    name = "model.layers.0.self_attn.o_proj.weight"
    source = write_checkpoint(tmp_path / "source", {name: Tensor("BF16", (rows, columns), data.tobytes())})
    with pytest.raises(SourceError, match=r"nan at \[1399, 2047\]"):
        convert(source, tmp_path / "out")


def test_keep_nonfinite_keeps_the_weight_and_its_fused_partners_and_the_recipe_says_so(tmp_path: Path) -> None:
    tensors = {**llama_tensors(), PROJECTION: with_value((32, 32), (3, 4), np.inf, "BF16")}
    source = write_checkpoint(tmp_path / "source", tensors)
    convert(source, tmp_path / "out", ConversionOptions(keep_nonfinite=True))
    prefix = "model.layers.0.self_attn."
    with open_artifact(tmp_path / "out") as artifact:
        kept = artifact.manifest
        for part, reason in (("q", "skipped_by_recipe"), ("k", "coupled"), ("v", "coupled")):
            record = kept.tensors[f"{prefix}{part}_proj.weight"]
            assert getattr(record, "reason", None) == reason
        assert not hasattr(kept.tensors[prefix + "o_proj.weight"], "reason")
        assert kept.recipe["rules"] == [{"pattern": prefix + "q_proj", "action": "keep"}]
        data = artifact[PROJECTION].decode()
        assert np.isinf(data[3, 4])
    skip = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert {prefix + "q_proj", prefix + "k_proj", prefix + "v_proj"} <= set(skip)
    assert verify_integrity(tmp_path / "out", sha256=True).good


def test_keep_nonfinite_changes_nothing_where_everything_is_finite(single: Path, tmp_path: Path) -> None:
    convert(single, tmp_path / "one")
    convert(single, tmp_path / "two", ConversionOptions(keep_nonfinite=True))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_infinities_in_a_tensor_that_is_kept_anyway_are_none_of_our_business(tmp_path: Path) -> None:
    tensors = {**llama_tensors(), "model.norm.weight": with_value((32,), (3,), np.nan, "BF16")}
    convert(write_checkpoint(tmp_path / "source", tensors), tmp_path / "out")
    assert verify_integrity(tmp_path / "out").good


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8", "I32", "I64", "BOOL"])
def test_a_weight_of_an_unsupported_dtype_is_refused_with_what_to_do(dtype: str, tmp_path: Path) -> None:
    tensors = {**llama_tensors(), PROJECTION: raw_tensor(dtype, (32, 32))}
    error = refusal(write_checkpoint(tmp_path / "source", tensors))
    assert error.reason is Reason.UNSUPPORTED_DTYPE
    assert error.tensor == PROJECTION
    assert error.field == "dtype"
    assert "bfloat16, float16 or float32" in str(error)


def test_buffers_of_any_dtype_and_shape_are_kept_bit_for_bit(tmp_path: Path) -> None:
    dtypes = ["BOOL", "U8", "I8", "F8_E4M3", "I16", "F16", "BF16", "I32", "F32", "I64"]
    buffers = {f"model.buffer.{dtype}.{i}": raw_tensor(dtype, shape, seed=i) for dtype in dtypes for i, shape in
               enumerate([(), (0,), (1,), (3, 0, 5), (1,) * 8, (7, 3)])}  # fmt: skip
    source = write_checkpoint(tmp_path / "source", {**llama_tensors(), **buffers})
    convert(source, tmp_path / "out")
    assert verify_integrity(tmp_path / "out", sha256=True).good
    with open_artifact(tmp_path / "out") as artifact:
        for name, tensor in buffers.items():
            assert artifact[name].data.tobytes() == tensor.data  # type: ignore[union-attr]
            assert artifact[name].shape == tensor.shape


# Quantized already


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.layers.0.mlp.down_proj.weight.absmax", "bitsandbytes"),
        ("model.layers.0.mlp.down_proj.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("model.layers.0.mlp.down_proj.SCB", "int8"),
        ("model.layers.0.mlp.down_proj.qweight", "GPTQ"),
        ("model.layers.0.mlp.down_proj.qzeros", "AWQ"),
        ("model.layers.0.mlp.down_proj.weight_packed", "compressed-tensors"),
        ("model.layers.0.mlp.down_proj.weight_scale_inv", "fp8"),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", "MXFP4"),
    ],
)
def test_tensors_of_a_quantized_checkpoint_are_recognised_without_a_config(
    name: str, what: str, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source", {**llama_tensors(), name: raw_tensor("U8", (8,))})
    error = refusal(source)
    assert error.reason is Reason.ALREADY_QUANTIZED
    assert error.tensor == name
    assert what in str(error)
    assert "16-bit checkpoint that it was made from" in str(error)


@pytest.mark.parametrize("quantization", [{"quant_method": "gptq"}, {"quant_method": "awq"}, {}, 5, [], "bitsandbytes"])
def test_a_config_of_a_quantized_checkpoint_is_refused(quantization: object, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", config={"quantization_config": quantization})
    error = refusal(source)
    assert error.reason is Reason.ALREADY_QUANTIZED
    assert error.field == "quantization_config"


def test_an_artifact_is_not_converted_again(single: Path, tmp_path: Path) -> None:
    convert(single, tmp_path / "artifact")
    error = refusal(tmp_path / "artifact")
    assert error.reason is Reason.ALREADY_QUANTIZED


# config.json


def test_a_missing_config_is_named(single: Path) -> None:
    (single / "config.json").unlink()
    error = refusal(single)
    assert error.reason is Reason.MISSING_FILE
    assert Path(error.path) == single / "config.json"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", Reason.JSON_SYNTAX),
        (b"null", Reason.CONFIG_FIELD),
        (b"[]", Reason.CONFIG_FIELD),
        (b'"text"', Reason.CONFIG_FIELD),
        (b"{", Reason.JSON_SYNTAX),
        (b"{} {}", Reason.JSON_SYNTAX),
        (b"\xef\xbb\xbf{}", Reason.JSON_SYNTAX),
        (b'{"a": NaN}', Reason.JSON_SYNTAX),
        (b'{"a": Infinity}', Reason.JSON_SYNTAX),
        (b'{"a": 1e999}', Reason.JSON_LIMIT),
        (b'{"a": 123456789012345678901}', Reason.JSON_LIMIT),
        (b'{"a": 1, "a": 1}', Reason.JSON_DUPLICATE_KEY),
        (b'{"a": ' + b"[" * 33 + b"]" * 33 + b"}", Reason.JSON_LIMIT),
        (b'{"a": "\\ud800"}', Reason.JSON_SYNTAX),
        (b'{"\\udc00": 1}', Reason.JSON_SYNTAX),
        (b'{"a": "' + b"x" * 2**22 + b'"}', Reason.JSON_LIMIT),
        (b'{"a": "' + b"x" * (2**22 - 100) + b'"}', Reason.JSON_LIMIT),  # readable, but not with our addition
        (b'{"a": [' + b"1," * 2**20 + b"1]}", Reason.JSON_LIMIT),
    ],
)
def test_a_broken_config_is_refused_by_name(text: bytes, reason: Reason, single: Path) -> None:
    (single / "config.json").write_bytes(text)
    error = refusal(single)
    assert error.reason is reason, error
    assert "config.json" in error.path


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": 5},
        {"model_type": ["llama"]},
        {"model_type": {"a": {}}, "text_config": []},
        {"tie_word_embeddings": "yes"},
        {"text_config": {"tie_word_embeddings": 1, "model_type": None}},
        {"architectures": 17},
        {"quantization_config": None},
        {"torch_dtype": {"deep": [[[1]]]}},
        {"model_type": "llama\n\u202e🦙", "🦙": "\U0001f999"},
        {"vocab_size": 99999999999999999999, "small": -9999999999999999999, "x": 1e308, "y": -0.0, "z": 5e-324},
    ],
)
def test_a_config_with_unexpected_values_is_carried_over_as_it_is(config: dict[str, object], tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", config=config)
    convert(source, tmp_path / "out")
    assert verify_integrity(tmp_path / "out").good
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.pop("quantization_config")["quant_method"] == "bitsandbytes"
    config.pop("quantization_config", None)
    assert written == config


# Names


AWKWARD_NAMES = [
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.mlp.Down_proj.weight",
    "MODEL.layers.0.mlp.down_proj.weight",
    "model.🦙.mlp.up_proj.weight",
    "model.ａ.mlp.gate_proj.weight",
    "módel.e\u0301.o_proj.weight",
    "model.layers.٣.mlp.c_fc.weight",
    "model.layers.007.mlp.down_proj.weight",
    "model.layers.7.mlp.down_proj.weight",
    "model.layers." + "1" * 400 + ".mlp.down_proj.weight",
    "..weight",
    ".",
    "weight",
    "../../etc/passwd",
    "a b c",
    "__metadata",
    "model.safetensors",
    "qformat.json",
    "x" * 512,
    "🦙" * 128,
]


def test_awkward_names_are_converted_like_any_other(tmp_path: Path) -> None:
    tensors = {name: weight((8, 16), seed=i) for i, name in enumerate(AWKWARD_NAMES)}
    source = write_checkpoint(tmp_path / "source", tensors, n_shards=2)
    convert(source, tmp_path / "out")
    assert verify_integrity(tmp_path / "out", sha256=True).good
    with open_artifact(tmp_path / "out") as artifact:
        assert set(artifact) == set(AWKWARD_NAMES)
        assert sum(hasattr(artifact[name], "packed") for name in artifact) >= 5
        for name, tensor in tensors.items():
            decoded = artifact[name].decode()
            assert decoded.shape == tensor.shape


def test_a_name_that_a_component_of_another_weight_must_get_is_refused(tmp_path: Path) -> None:
    packed = "model.layers.0.mlp.down_proj.weight"
    for suffix in (".quant_map", ".nested_quant_map"):
        for double_quant in (True, False):
            tensors = {packed: weight((8, 16)), packed + suffix: weight((16,), "F32")}
            source = write_checkpoint(tmp_path / f"source{suffix}{double_quant}", tensors)
            error = refusal(source, ConversionOptions(double_quant=double_quant))
            assert error.reason is Reason.DUPLICATE_TENSOR
            assert error.tensor == packed + suffix
            assert "skip=(" in str(error)
            convert(
                source, tmp_path / f"out{suffix}{double_quant}", ConversionOptions(skip=[packed[: -len(".weight")]])
            )


def test_a_name_that_gets_too_long_with_a_components_suffix_is_refused(tmp_path: Path) -> None:
    """Such an artifact could be written, but no reader of ours would open it."""
    suffix = ".quant_state.bitsandbytes__nf4"
    leaf = ".down_proj.weight"
    for nbytes in (512 - len(suffix), 513 - len(suffix)):
        name = "x" * (nbytes - len(leaf)) + leaf
        source = write_checkpoint(tmp_path / f"source{nbytes}", {name: weight((8, 16))})
        if nbytes + len(suffix) == 512:
            convert(source, tmp_path / "converted")
            assert verify_integrity(tmp_path / "converted").good
            continue
        error = refusal(source)
        assert error.reason is Reason.HEADER_LIMIT
        assert error.tensor == name


@pytest.mark.parametrize("name", ["(a+)+$", "a{99999999999}", "[[a", "a|b", "\\", "(" * 200, "a(?P<x>b)", "(?i)a", "*"])
def test_a_module_name_with_regex_syntax_is_refused_before_anybody_compiles_it(name: str, tmp_path: Path) -> None:
    """transformers matches skip entries as regular expressions: `(a+)+$` would take it for ever."""
    tensors = {f"model.{name}.weight": weight((8, 16)), "model." + "a" * 40 + ".down_proj.weight": weight((8, 16))}
    error = refusal(write_checkpoint(tmp_path / "source", tensors))
    assert error.reason is Reason.SKIP_MODULES
    assert error.tensor == f"model.{name}.weight"


# Files that are no files


def test_a_folder_that_does_not_exist_or_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("missing", "file", "x" * 5000, "file/below"):
        with pytest.raises(SourceError) as refused:
            plan(tmp_path / name)
        assert refused.value.reason is Reason.MISSING_FILE


def as_folder(path: Path) -> None:
    path.mkdir()


def as_fifo(path: Path) -> None:
    os.mkfifo(path)


def as_device(path: Path) -> None:
    try:
        os.mknod(path, 0o020666, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("making a device needs root")


def as_link_out(path: Path) -> None:
    outside = path.parent.parent / ("outside-" + path.name)
    outside.write_bytes(b"{}")
    path.symlink_to(outside)


def as_link_to_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def as_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def as_dangling_link(path: Path) -> None:
    path.symlink_to("nothing")


def as_link_within(path: Path) -> None:
    (path.parent / "other").write_bytes(b"{}")
    path.symlink_to("other")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "LICENSE", "tokenizer.json", INDEX])
@pytest.mark.parametrize(
    "make",
    [
        as_folder,
        as_fifo,
        as_device,
        as_link_out,
        as_link_to_zero,
        as_link_to_itself,
        as_dangling_link,
        as_link_within,
    ],
)
def test_only_regular_files_inside_the_folder_are_opened(
    make: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    source = write_tiny(tmp_path / "source", side_files=SIDE_FILES)
    if name == INDEX:
        (source / "model.safetensors").unlink()
    (source / name).unlink(missing_ok=True)
    make(source / name)
    error = refusal(source)
    assert error.reason in {Reason.NOT_A_REGULAR_FILE, Reason.PATH_ESCAPES}, error
    assert Path(error.path) == source / name


def hub_cache(tmp_path: Path, files: dict[str, bytes]) -> Path:
    """Lay files out as huggingface_hub does: snapshots/REVISION/NAME -> ../../blobs/HASH."""
    repository = tmp_path / "models--someone--something"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, (name, data) in enumerate(files.items()):
        (repository / "blobs" / f"{number:040x}").write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_the_links_of_the_hub_cache_are_followed(single: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, contents(single))
    convert(single, tmp_path / "from folder")
    convert(snapshot, tmp_path / "from cache")
    assert contents(tmp_path / "from folder") == contents(tmp_path / "from cache")


def test_the_links_of_the_hub_cache_are_followed_through_a_link_to_the_cache(single: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, contents(single))
    (tmp_path / "linked").symlink_to(snapshot.parents[1])
    convert(tmp_path / "linked" / "snapshots" / snapshot.name, tmp_path / "out")
    (tmp_path / "direct").symlink_to(snapshot)
    with pytest.raises(SourceError) as refused:
        plan(tmp_path / "direct")  # `../../blobs` is taken from the name given: a link to a snapshot hides the cache
    assert refused.value.reason is Reason.PATH_ESCAPES


@pytest.mark.parametrize(
    "target",
    ["/dev/zero", "../../../outside", "../../blobs/../../outside", "../../blobs/sub/blob", "../../blobs"],
)
def test_a_hub_cache_whose_links_lead_elsewhere_is_refused(target: str, single: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"{}")
    snapshot = hub_cache(tmp_path, contents(single))
    (snapshot.parents[1] / "blobs" / "sub").mkdir()
    (snapshot.parents[1] / "blobs" / "sub" / "blob").write_bytes(b"{}")
    (snapshot / "LICENSE").unlink()
    (snapshot / "LICENSE").symlink_to(target)
    assert refusal(snapshot).reason in {Reason.PATH_ESCAPES, Reason.NOT_A_REGULAR_FILE}


def test_a_blob_that_is_itself_a_link_or_a_fifo_is_refused(single: Path, tmp_path: Path) -> None:
    for number, make in enumerate((as_fifo, as_link_to_zero, as_link_to_itself)):
        folder = tmp_path / str(number)
        folder.mkdir()
        snapshot = hub_cache(folder, contents(single))
        blob = snapshot.parents[1] / "blobs" / os.path.basename(os.readlink(snapshot / "model.safetensors"))
        blob.unlink()
        make(blob)
        assert refusal(snapshot).reason in {Reason.PATH_ESCAPES, Reason.NOT_A_REGULAR_FILE}


# Other kinds of checkpoints


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("consolidated.00.pt", "PyTorch .pt"),
        ("flax_model.msgpack", "Flax"),
        ("tf_model.h5", "TensorFlow"),
    ],
)
def test_weights_of_another_format_are_named_with_what_to_do(name: str, what: str, single: Path) -> None:
    (single / "model.safetensors").unlink()
    (single / name).write_bytes(b"")
    error = refusal(single)
    assert error.reason is Reason.UNSUPPORTED_SOURCE
    assert Path(error.path).name == name
    assert what in str(error)
    assert "save_pretrained" in str(error)


def test_a_folder_without_weights_says_what_it_has_instead(single: Path) -> None:
    (single / "model.safetensors").rename(single / "adapter_model.safetensors")
    error = refusal(single)
    assert error.reason is Reason.MISSING_FILE
    assert "adapter_model.safetensors" in str(error)


def test_files_that_are_not_known_are_not_carried_over(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", side_files=SIDE_FILES)
    for name in ("training_args.bin", "optimizer.pt", "adapter_model.safetensors", ".gitattributes", "README.md"):
        (source / name).write_bytes(b"x")
    (source / "checkpoint-500").mkdir()
    (source / "modeling_mine.py").write_text("# mine")
    convert(source, tmp_path / "out")
    expected = {
        "config.json",
        INDEX,
        "model-00001-of-00001.safetensors",
        "qformat.json",
        "modeling_mine.py",
        *SIDE_FILES,
    }
    assert set(contents(tmp_path / "out")) == expected


def test_every_bad_source_is_a_qformat_error() -> None:
    assert issubclass(SourceError, QformatError)
    assert len(tiny_tensors()) == 5
