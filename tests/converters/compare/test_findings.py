"""Every kind of difference between an artifact and its source is found."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import qformat
from qformat.artifact.components import Component
from qformat.artifact.reading.reader import open_artifact
from qformat.converters.compare.compare import compare
from qformat.converters.convert import ConversionOptions, convert
from qformat.errors import ArtifactError, Reason, SourceError
from tests.converters.compare.changed_sides import (
    DOWN,
    NORM,
    UP,
    change_byte,
    reasons,
    reseal,
    rewrite,
    without_source_digests,
)
from tests.small_models import Tensor, llama_config, llama_tensors, tensor_of, weight, write_checkpoint


def test_a_changed_code_with_valid_digests_is_found(artifact: Path, source: Path) -> None:
    change_byte(artifact, UP, 3, lambda byte: byte ^ 0x11)
    change_byte(artifact, UP, 5, lambda byte: byte ^ 0x80)
    reseal(artifact)
    comparison = compare(artifact, source)
    assert reasons(comparison) == [("codes_mismatch", UP)]
    assert "3 of 1536 codes and 0 of the scales differ" in comparison.findings[0].message
    assert (comparison.n_exact, comparison.n_packed) == (13, 14)
    (found,) = (tensor for tensor in comparison.packed if tensor.name == UP)
    assert (found.n_wrong_codes, found.n_wrong_scales) == (3, 0)


@pytest.mark.parametrize("component", [Component.ABSMAX, Component.NESTED_ABSMAX, Component.NESTED_QUANT_MAP])
def test_a_changed_scale_with_valid_digests_is_found(artifact: Path, source: Path, component: Component) -> None:
    change_byte(artifact, UP + component.value, 1, lambda byte: byte ^ 1)
    reseal(artifact)
    comparison = compare(artifact, source)
    assert reasons(comparison) == [("codes_mismatch", UP)]
    assert "0 of 1536 codes and 1 of the scales differ" in comparison.findings[0].message


def test_a_changed_nested_offset_with_valid_digests_is_found(artifact: Path, source: Path) -> None:
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


def test_another_source_gives_one_finding_per_tensor(artifact: Path, tmp_path: Path) -> None:
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


def test_without_source_digests_a_changed_source_is_found_by_its_codes(artifact: Path, source: Path) -> None:
    without_source_digests(artifact)
    comparison = compare(artifact, source)
    assert comparison.passed
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
    """The second level may round a scale up, here to 65,700, and float16 represents values above 65,520 as infinity."""
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
