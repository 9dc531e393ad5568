"""compare: figures against an oracle, every kind of difference found, and neither threads nor chunks change a bit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

import qformat
from qformat.artifact.components import Component
from qformat.artifact.digests import xxh3
from qformat.artifact.manifest import KeptRecord, PackedRecord
from qformat.artifact.reading.manifest_parser import parse as parse_manifest
from qformat.artifact.reading.reader import open_artifact
from qformat.codec.cpu.error_sums import ErrorSums, RunningErrors, add_up, count_codes
from qformat.codec.floats import FloatFormat, narrow, widen
from qformat.converters.compare.compare import compare
from qformat.converters.compare.comparison import Comparison, kind_of, layer_of
from qformat.converters.convert import ConversionOptions, convert
from qformat.converters.sources.chunks import CHUNK_SIZES, ChunkSizes
from qformat.converters.sources.safetensors_shards import SafetensorsShards
from qformat.errors import ArtifactError, Reason, SourceError
from qformat.names import MANIFEST_NAME
from tests.small_models import (
    Tensor,
    llama_config,
    llama_tensors,
    raw_tensor,
    tensor_of,
    tiny_tensors,
    weight,
    write_checkpoint,
    write_llama,
    write_tiny,
)

UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.norm.weight"


def reseal(artifact: Path) -> None:
    """Make every digest of an artifact right again: what remains is what digests cannot tell."""
    path = artifact / MANIFEST_NAME
    manifest = parse_manifest(path.read_bytes(), path)
    with open_artifact(artifact) as opened:
        located = opened.located

    def digest(name: str) -> str:
        data = (artifact / located[name].shard).read_bytes()
        return xxh3(data[located[name].entry.start : located[name].entry.stop])

    tensors = {
        name: dataclasses.replace(record, xxh3=digest(name))
        if isinstance(record, KeptRecord)
        else dataclasses.replace(record, components={part: digest(name + part.value) for part in record.components})
        for name, record in manifest.tensors.items()
    }
    files = {
        name: dataclasses.replace(record, sha256=hashlib.sha256((artifact / name).read_bytes()).hexdigest())
        for name, record in manifest.files.items()
    }
    path.write_bytes(dataclasses.replace(manifest, tensors=tensors, files=files).to_bytes())
    assert qformat.verify(artifact, sha256=True).good


def change_byte(artifact: Path, component: str, at: int, change: Callable[[int], int]) -> None:
    with open_artifact(artifact) as opened:
        where = opened.located[component]
    data = bytearray((artifact / where.shard).read_bytes())
    position = where.entry.start + at
    data[position] = change(data[position])
    (artifact / where.shard).write_bytes(data)


def without_source_digests(artifact: Path) -> None:
    path = artifact / MANIFEST_NAME
    manifest = parse_manifest(path.read_bytes(), path)
    tensors = {
        name: dataclasses.replace(record, source_xxh3=None) if isinstance(record, PackedRecord) else record
        for name, record in manifest.tensors.items()
    }
    path.write_bytes(dataclasses.replace(manifest, tensors=tensors).to_bytes())


def rewrite(source: Path, changed: Mapping[str, Tensor | None], *, into: Path) -> Path:
    """Write the small Llama with some tensors replaced, added, or left out."""
    tensors = {name: tensor for name, tensor in ({**llama_tensors(), **changed}).items() if tensor is not None}
    return write_checkpoint(into, tensors, config=llama_config())


def reasons(comparison: Comparison) -> list[tuple[str, str | None]]:
    return [(finding.reason.value, finding.tensor) for finding in comparison.findings]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("compare") / "source", n_shards=2)


@pytest.fixture(scope="module")
def made(source: Path) -> Path:
    out = source.parent / "out"
    convert(source, out)
    return out


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


# Figures


def with_bitsandbytes(artifact: Path, name: str) -> np.ndarray:
    """Decode a packed weight with bitsandbytes, in the dtype of the weight, and widen it to float64."""
    import bitsandbytes.functional as bnb
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(artifact.glob("*.safetensors")):
        tensors |= load_file(path)
    parts = {key.removeprefix(name + "."): value for key, value in tensors.items() if key.startswith(name + ".")}
    state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
    decoded = bnb.dequantize_4bit(tensors[name], state)
    return decoded.to(torch.float64).numpy()


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_figures_equal_those_of_bitsandbytes_and_torch_arithmetic(tmp_path: Path, dtype: str, block_size: int) -> None:
    # Rows of whole blocks, or of an odd size: with AVX-512, bitsandbytes 0.50.2 decodes wrongly where a row ends
    # within a block (its own codes too: 20% error instead of 9% for 576 columns in blocks of 256).
    tensors = {
        "model.layers.0.self_attn.q_proj.weight": weight((576, 768), dtype, seed=1, scale=0.1),
        "model.layers.0.self_attn.k_proj.weight": weight((192, 768), dtype, seed=2, scale=0.1),
        "model.layers.0.self_attn.v_proj.weight": weight((193, 577), dtype, seed=3, scale=0.02),
        "model.layers.0.mlp.down_proj.weight": weight((768, 1536), dtype, seed=4),
        NORM: weight((576,), dtype, seed=5),
    }
    source = write_checkpoint(tmp_path / "source", tensors, config=llama_config(n_layers=1))
    convert(source, tmp_path / "out", ConversionOptions(block_size=block_size))
    comparison = compare(tmp_path / "out", source)
    assert comparison.good
    assert [tensor.name for tensor in comparison.kept] == [NORM]
    sums = np.zeros(4)
    for tensor in comparison.packed:
        data = tensors[tensor.name]
        float_format = FloatFormat(dtype)
        w = widen(np.frombuffer(data.data, float_format.raw_dtype), float_format).astype(np.float64)
        q = with_bitsandbytes(tmp_path / "out", tensor.name).reshape(-1)
        e = w - q
        sums += w @ w, q @ q, w @ q, e @ e
        assert tensor.errors.n_weights == w.size
        assert tensor.errors.relative_rms == pytest.approx(math.sqrt(e @ e / (w @ w)), rel=1e-12)
        assert tensor.errors.max_abs_error == pytest.approx(np.abs(e).max(), rel=1e-7)
        assert tensor.errors.cosine == pytest.approx(w @ q / math.sqrt((w @ w) * (q @ q)), rel=1e-12)
        assert tensor.errors.snr_db == pytest.approx(10 * math.log10(w @ w / (e @ e)), rel=1e-12)
        assert 0.07 < (tensor.errors.relative_rms or 0) < 0.13  # what NF4 does to normal weights
    assert comparison.overall.relative_rms == pytest.approx(math.sqrt(sums[3] / sums[0]), rel=1e-12)
    assert comparison.overall.cosine == pytest.approx(sums[2] / math.sqrt(sums[0] * sums[1]), rel=1e-12)


def test_errors_are_those_of_the_values_in_the_dtype_of_the_weight(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source")
    convert(source, tmp_path / "out")
    comparison = compare(tmp_path / "out", source)
    with open_artifact(tmp_path / "out") as artifact:
        for tensor in comparison.packed:
            float_format = tensor.layout.float_format
            data = tiny_tensors()[tensor.name].data
            w = widen(np.frombuffer(data, float_format.raw_dtype), float_format).astype(np.float64)
            opened = artifact[tensor.name]
            assert isinstance(opened, qformat.PackedTensor)
            q = widen(opened.decode().reshape(-1), float_format).astype(np.float64)
            assert tensor.errors.errors_squared == pytest.approx(((w - q) ** 2).sum(), rel=1e-12)
            assert tensor.errors.largest_error == pytest.approx(np.abs(w - q).max(), rel=1e-7)


def test_counts_of_codes_are_those_of_the_artifact(artifact: Path, source: Path) -> None:
    comparison = compare(artifact, source)
    with open_artifact(artifact) as opened:
        for tensor in comparison.packed:
            packed = opened[tensor.name]
            assert isinstance(packed, qformat.PackedTensor)
            codes = np.stack([packed.packed >> 4, packed.packed & 15], axis=1).reshape(-1)[: packed.layout.n_elements]
            assert tensor.code_counts == tuple(np.bincount(codes, minlength=16))
    assert sum(comparison.code_counts) == comparison.overall.n_weights


@pytest.mark.parametrize("n_elements", [0, 1, 2, 7, 8, 9, 61])
def test_the_padding_of_an_odd_tensor_is_no_code(n_elements: int) -> None:
    codes = np.arange(n_elements) * 5 % 16
    even = np.append(codes, 7) if n_elements % 2 else codes
    packed = (even[0::2] << 4 | even[1::2]).astype(np.uint8)
    assert count_codes(packed, n_elements=n_elements).tolist() == np.bincount(codes, minlength=16).tolist()


@pytest.mark.parametrize("float_format", list(FloatFormat))
@pytest.mark.parametrize("n_weights", [0, 1, 63, 64, 65, 4095, 4096, 4097, 10007])
def test_sums_are_right_at_every_size(float_format: FloatFormat, n_weights: int) -> None:
    random = np.random.default_rng(n_weights)
    weights = narrow(random.normal(0, 1, n_weights).astype(np.float32), float_format)
    decoded = narrow(random.normal(0, 1, n_weights).astype(np.float32), float_format)
    running = RunningErrors(float_format)
    running.add(weights, decoded)
    sums = running.sums()
    w, q = (widen(raw, float_format).astype(np.float64) for raw in (weights, decoded))
    assert sums.n_weights == n_weights
    expected = [math.fsum(values) for values in (w * w, q * q, w * q, (w - q) ** 2)]
    found = [sums.weights_squared, sums.decoded_squared, sums.products, sums.errors_squared]
    assert found == pytest.approx(expected, rel=1e-13, abs=1e-12)
    assert sums.largest_error == pytest.approx(np.abs(w - q).max(initial=0), rel=1e-7)


@pytest.mark.parametrize("float_format", list(FloatFormat))
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("at", [0, 5000])
@pytest.mark.parametrize("side", ["weights", "decoded"])
def test_values_that_are_not_finite_have_no_figures(float_format: FloatFormat, bad: float, at: int, side: str) -> None:
    values = np.ones(5001, np.float32)
    changed = values.copy()
    changed[at] = bad
    fine, broken = narrow(values, float_format), narrow(changed, float_format)
    running = RunningErrors(float_format)
    running.add(*(fine, broken) if side == "decoded" else (broken, fine))
    sums = running.sums()
    assert not sums.finite
    assert (sums.relative_rms, sums.snr_db, sums.cosine, sums.max_abs_error) == (None, None, None, None)
    assert add_up([sums]) == ErrorSums()


def test_extreme_float16_values_widen_exactly() -> None:
    every = np.arange(2**16, dtype=np.uint16)
    finite = every[(every & 0x7C00) != 0x7C00]
    zeros = np.zeros(finite.size, np.uint16)
    running = RunningErrors(FloatFormat.F16)
    running.add(finite, zeros)
    assert running.sums().weights_squared == pytest.approx(math.fsum(finite.view(np.float16).astype(float) ** 2))


def test_weights_without_error_have_no_signal_to_noise_ratio() -> None:
    same = np.ones(10, np.float32)
    running = RunningErrors(FloatFormat.F32)
    running.add(same, same)
    sums = running.sums()
    assert (sums.relative_rms, sums.snr_db, sums.cosine, sums.max_abs_error) == (0.0, None, 1.0, 0.0)


# What is compared


@pytest.mark.parametrize("options", [ConversionOptions(), ConversionOptions(double_quant=False, block_size=32)])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_fresh_conversion_is_good(tmp_path: Path, dtype: str, options: ConversionOptions) -> None:
    source = write_llama(tmp_path / "source", n_shards=3, dtype=dtype)
    convert(source, tmp_path / "out", options)
    comparison = compare(tmp_path / "out", source)
    assert comparison.findings == ()
    assert comparison.n_exact == comparison.n_packed == 14
    assert comparison.n_identical == comparison.n_kept == 7
    assert comparison.n_source_named == comparison.n_source_digests == 21
    assert comparison.source_nbytes == sum(t.nbytes for t in SafetensorsShards(source).tensors.values())


def test_odd_tensors_and_every_kept_dtype_are_good(tmp_path: Path) -> None:
    tensors = {
        **tiny_tensors(),
        "model.layers.0.mlp.up_proj.weight": weight((1, 1), "BF16"),
        "model.layers.0.mlp.gate_proj.weight": weight((1, 1), "BF16", seed=8),
        "model.layers.0.self_attn.q_proj.bias": tensor_of(np.array(0.5), "F32"),
        "model.layers.0.positions": raw_tensor("I64", (3,)),
        "model.layers.0.mask": raw_tensor("BOOL", (5,)),
        "model.layers.0.empty": raw_tensor("F32", (0, 4)),
    }
    source = write_checkpoint(tmp_path / "source", tensors, config=llama_config(n_layers=1))
    convert(source, tmp_path / "out")
    comparison = compare(tmp_path / "out", source)
    assert comparison.good
    assert comparison.n_packed + comparison.n_kept == len(tensors)


def test_weights_that_are_all_zero_are_good_and_have_no_relative_error(tmp_path: Path) -> None:
    tensors = {DOWN: tensor_of(np.zeros((8, 40)), "BF16"), NORM: weight((8,))}
    source = write_checkpoint(tmp_path / "source", tensors, config=llama_config(n_layers=1))
    convert(source, tmp_path / "out")
    comparison = compare(tmp_path / "out", source)
    assert comparison.good
    assert comparison.overall.relative_rms is None
    assert comparison.overall.max_abs_error == 0


def test_a_source_may_be_opened_already_and_stays_open(artifact: Path, source: Path) -> None:
    opened = SafetensorsShards(source)
    assert compare(artifact, opened).good
    assert compare(artifact, opened).good
    opened.close()


def test_weights_are_grouped_by_kind_of_module(artifact: Path, source: Path) -> None:
    groups = compare(artifact, source).by_kind()
    assert {kind: len(tensors) for kind, tensors in groups.items()} == dict.fromkeys(
        ["down_proj", "gate_proj", "up_proj", "k_proj", "o_proj", "q_proj", "v_proj"], 2
    )


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("model.layers.17.self_attn.q_proj.weight", "q_proj", 17),
        ("model.layers.3.mlp.experts.12.up_proj.weight", "up_proj", 3),
        ("lm_head.weight", "lm_head", None),
        ("classifier.2.weight", "classifier", 2),
        ("7.weight", "7.weight", 7),
        (f"h.{'9' * 400}.attn.weight", "attn", None),
    ],
)
def test_names_tell_kind_and_layer(name: str, kind: str, layer: int | None) -> None:
    assert (kind_of(name), layer_of(name)) == (kind, layer)


# What is found


def test_a_changed_code_with_right_digests_is_found(artifact: Path, source: Path) -> None:
    change_byte(artifact, UP, 3, lambda byte: byte ^ 0x11)
    change_byte(artifact, UP, 5, lambda byte: byte ^ 0x80)
    reseal(artifact)
    comparison = compare(artifact, source)
    assert reasons(comparison) == [("codes_mismatch", UP)]
    assert "3 of 1536 codes and 0 of the scales" in comparison.findings[0].message
    assert (comparison.n_exact, comparison.n_packed) == (13, 14)
    (found,) = (tensor for tensor in comparison.packed if tensor.name == UP)
    assert (found.n_wrong_codes, found.n_wrong_scales) == (3, 0)


@pytest.mark.parametrize("component", [Component.ABSMAX, Component.NESTED_ABSMAX, Component.NESTED_QUANT_MAP])
def test_a_changed_scale_with_right_digests_is_found(artifact: Path, source: Path, component: Component) -> None:
    change_byte(artifact, UP + component.value, 1, lambda byte: byte ^ 1)
    reseal(artifact)
    comparison = compare(artifact, source)
    assert reasons(comparison) == [("codes_mismatch", UP)]
    assert "0 of 1536 codes and 1 of the scales" in comparison.findings[0].message


def test_a_changed_nested_offset_with_right_digests_is_found(artifact: Path, source: Path) -> None:
    with open_artifact(artifact) as opened:
        where = opened.located[UP + Component.QUANT_STATE.value]
        packed = opened[UP]
    assert isinstance(packed, qformat.PackedTensor)
    assert packed.state.nested_offset is not None
    state = dataclasses.replace(packed.state, nested_offset=packed.state.nested_offset * (1 + 1e-6))
    data = bytearray((artifact / where.shard).read_bytes())
    data[where.entry.start : where.entry.stop] = state.to_padded_json()
    (artifact / where.shard).write_bytes(data)
    reseal(artifact)
    assert reasons(compare(artifact, source)) == [("codes_mismatch", UP)]


def test_a_changed_scale_without_double_quantization_is_found(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", ConversionOptions(double_quant=False))
    change_byte(tmp_path / "out", UP + ".absmax", 0, lambda byte: byte ^ 1)
    reseal(tmp_path / "out")
    comparison = compare(tmp_path / "out", source)
    assert reasons(comparison) == [("codes_mismatch", UP)]


def test_a_changed_kept_tensor_is_found(artifact: Path, source: Path) -> None:
    change_byte(artifact, NORM, 7, lambda byte: byte ^ 255)
    comparison = compare(artifact, source)
    assert reasons(comparison) == [("source_mismatch", NORM)]
    assert "1 of 64 bytes" in comparison.findings[0].message
    assert (comparison.n_identical, comparison.n_kept) == (6, 7)
    reseal(artifact)
    assert reasons(compare(artifact, source)) == [("source_mismatch", NORM)]


def test_another_source_is_found_once_a_tensor(artifact: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", llama_tensors(seed=1000), config=llama_config())
    comparison = compare(artifact, other)
    assert {reason for reason, _ in reasons(comparison)} == {"source_mismatch"}
    assert len(comparison.findings) == 21
    assert (comparison.n_exact, comparison.n_identical, comparison.n_source_named) == (0, 0, 0)
    assert (comparison.overall.relative_rms or 0) > 1


def test_a_source_whose_one_weight_changed_in_the_last_bit_is_found(
    artifact: Path, source: Path, tmp_path: Path
) -> None:
    data = bytearray(llama_tensors()[UP].data)
    data[100] ^= 1
    other = rewrite(source, {UP: Tensor("BF16", (48, 32), bytes(data))}, into=tmp_path / "other")
    comparison = compare(artifact, other)
    assert reasons(comparison) == [("source_mismatch", UP)]
    assert comparison.n_source_named == 20


def test_a_manifest_without_source_digests_leaves_the_codes_to_tell(artifact: Path, source: Path) -> None:
    without_source_digests(artifact)
    comparison = compare(artifact, source)
    assert comparison.good
    assert comparison.n_source_named == comparison.n_source_digests == 7
    assert {tensor.source_named for tensor in comparison.packed} == {None}


def test_tensors_that_only_one_side_has_are_found(artifact: Path, source: Path, tmp_path: Path) -> None:
    other = rewrite(source, {UP: None, NORM: None, "model.extra.weight": weight((4, 4))}, into=tmp_path / "other")
    comparison = compare(artifact, other)
    assert reasons(comparison) == [
        ("source_mismatch", UP),
        ("source_mismatch", NORM),
        ("source_mismatch", "model.extra.weight"),
    ]
    assert (comparison.n_exact, comparison.n_packed, comparison.n_identical, comparison.n_kept) == (13, 14, 6, 7)


@pytest.mark.parametrize("name", [UP, NORM])
@pytest.mark.parametrize("other", [weight((32, 48)), weight((48, 32), "F16"), weight((5,))])
def test_other_shapes_and_dtypes_are_found(
    artifact: Path, source: Path, tmp_path: Path, name: str, other: Tensor
) -> None:
    comparison = compare(artifact, rewrite(source, {name: other}, into=tmp_path / "other"))
    assert reasons(comparison) == [("source_mismatch", name)]
    assert comparison.findings[0].message.count("[") == 2  # both shapes


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("named", [True, False])
def test_a_source_that_is_not_finite_is_found(
    artifact: Path, source: Path, tmp_path: Path, bad: float, named: bool
) -> None:
    values = np.full((48, 32), 0.01, np.float32)
    values[13, 5] = bad
    if not named:
        without_source_digests(artifact)
    comparison = compare(artifact, rewrite(source, {UP: tensor_of(values, "BF16")}, into=tmp_path / "other"))
    assert reasons(comparison) == [("source_mismatch" if named else "nonfinite_weight", UP)]
    (tensor,) = (tensor for tensor in comparison.packed if tensor.name == UP)
    assert (tensor.n_wrong_codes, tensor.n_wrong_scales) == (None, None)
    assert tensor.errors.relative_rms is None
    assert comparison.overall.relative_rms is not None  # of the others
    assert comparison.overall.n_weights == sum(t.errors.n_weights for t in comparison.packed) - 48 * 32


def test_float16_codes_that_decode_to_infinity_are_found(tmp_path: Path) -> None:
    """The second level may round a scale up, here to 65,700: above 65,520, float16 has only infinity."""
    values = np.zeros((640, 64), np.float32)  # a block a row
    values[::2] = 65504
    values[1:4] = 65504  # a mean of 32,957: the high scales lie 0.9875 times as far from it as the low ones
    tensors = {DOWN: tensor_of(values.reshape(64, 640), "F16"), NORM: weight((8,))}
    source = write_checkpoint(tmp_path / "source", tensors, config=llama_config(n_layers=1))
    convert(source, tmp_path / "out")
    with open_artifact(tmp_path / "out") as artifact:
        packed = artifact[DOWN]
        assert isinstance(packed, qformat.PackedTensor)
        assert packed.scales().max() >= 65520
    comparison = compare(tmp_path / "out", source)
    assert reasons(comparison) == [("nonfinite_weight", DOWN)]
    assert comparison.n_exact == 1


def test_what_cannot_be_opened_is_an_error(made: Path, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as no_artifact:
        compare(tmp_path / "nothing", source)
    assert no_artifact.value.reason is Reason.MISSING_FILE
    with pytest.raises(SourceError) as no_source:
        compare(made, tmp_path / "nothing")
    assert no_source.value.reason is Reason.MISSING_FILE


# How it runs


def write_several_chunks(folder: Path) -> Path:
    """Write a weight of four and a half chunks, one of an odd size, and a kept one of two."""
    n_columns = 2048
    tensors = {
        DOWN: weight((9 * CHUNK_SIZES.nbytes // 2 // 2 // n_columns, n_columns), "BF16", seed=1),
        "model.layers.0.self_attn.o_proj.weight": weight((1021, 1031), "F32", seed=2),
        "model.embed_tokens.weight": weight((2048, n_columns), "BF16", seed=3),
    }
    return write_checkpoint(folder, tensors, config=llama_config(n_layers=1))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("large")
    convert(write_several_chunks(folder / "source"), folder / "out")
    return folder / "out", folder / "source"


def test_the_result_does_not_depend_on_the_number_of_threads(large: tuple[Path, Path]) -> None:
    first = compare(*large, workers=1)
    assert first.good
    assert compare(*large, workers=2) == first
    assert compare(*large, workers=7) == first


def test_figures_hold_across_chunks(large: tuple[Path, Path]) -> None:
    comparison = compare(*large)
    opened = SafetensorsShards(large[1])
    with open_artifact(large[0]) as artifact:
        for tensor in comparison.packed:
            float_format = tensor.layout.float_format
            raw = np.empty(tensor.layout.n_elements, float_format.raw_dtype)
            opened.read_into(opened.tensors[tensor.name], 0, raw.data.cast("B"))
            packed = artifact[tensor.name]
            assert isinstance(packed, qformat.PackedTensor)
            w = widen(raw, float_format).astype(np.float64)
            q = widen(packed.decode().reshape(-1), float_format).astype(np.float64)
            assert tensor.errors.errors_squared == pytest.approx(((w - q) ** 2).sum(), rel=1e-11)
            assert tensor.errors.products == pytest.approx((w * q).sum(), rel=1e-11)
    opened.close()


def test_progress_counts_every_byte_of_the_source_once(
    large: tuple[Path, Path], artifact: Path, source: Path, tmp_path: Path
) -> None:
    other = rewrite(source, {UP: weight((5,)), "extra": weight((4, 4))}, into=tmp_path / "other")
    for packed, checkpoint in ((*large,), (artifact, other)):
        steps: list[int] = []
        compare(packed, checkpoint, workers=1, on_progress=steps.append)
        opened = SafetensorsShards(checkpoint)
        assert sum(steps) == sum(tensor.nbytes for tensor in opened.tensors.values())
        opened.close()


def test_memory_does_not_grow_with_a_tensor(large: tuple[Path, Path]) -> None:
    """Of 19 MB of weights, only the scales (600 KB) are there at once, and chunks."""
    first = compare(*large, workers=1)
    tracemalloc.start()
    try:
        second = compare(*large, workers=1, sizes=ChunkSizes(nbytes=2**18))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * 2**20
    assert second == first


def test_an_error_in_one_tensor_stops_all(large: tuple[Path, Path]) -> None:
    class Failing(SafetensorsShards):
        def read_into(self, tensor: object, offset: int, out: memoryview) -> None:
            raise SourceError(Reason.TRUNCATED, self.location, "ends early")

    opened = Failing(large[1])
    with pytest.raises(SourceError, match="ends early"):
        compare(large[0], opened, workers=2)
    opened.close()


def test_a_real_model_is_what_its_conversion_must_give(smollm2: Path, tmp_path: Path) -> None:
    convert(smollm2, tmp_path / "out")
    comparison = compare(tmp_path / "out", smollm2)
    assert comparison.findings == ()
    assert (comparison.n_exact, comparison.n_identical) == (comparison.n_packed, comparison.n_kept)
    assert 0.08 < (comparison.overall.relative_rms or 0) < 0.10
    assert json.loads(json.dumps(comparison.code_counts)) == list(comparison.code_counts)
