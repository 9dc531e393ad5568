"""`verify --source` of a tuned artifact: tuned tensors are recognised and listed, and what must hold is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qformat.artifact.components import Component
from qformat.artifact.packed_arrays import store_scales
from qformat.artifact.reading.reader import PackedTensor, open_artifact
from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.rewrite import Replacements, replaced_by, rewrite
from qformat.artifact.writing.staging import Staging
from qformat.codec.nested import decode_absmax, encode_absmax
from qformat.converters.compare.compare import compare
from qformat.converters.compare.tuned_scales import count_too_far, scale_change
from qformat.errors import Reason
from tests.quality import models
from tests.quality.tuning.tuned import run

WEIGHT = "model.layers.1.mlp.up_proj.weight"
RECIPE: dict[str, Any] = {"tuning": {"scale_change": 0.5}}


@pytest.fixture(scope="module", params=[True, False], ids=["two levels", "one level"])
def tuned(request: pytest.FixtureRequest, source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    artifact = models.write_artifact(source, folder / "plain", double_quant=request.param)
    torch.set_num_threads(1)
    run(artifact, source, text, folder / "tuned", learning_rate=0.03)  # far away
    return folder / "tuned"


def changed(artifact: Path, out: Path, replacements: Replacements, recipe: dict[str, Any] | None = None) -> Path:
    with open_artifact(artifact) as opened, Staging.begin(out, "f", disk=Disk()) as staging:
        rewrite(
            opened.structure,
            staging,
            replaced_by(opened.structure, replacements),
            recipe=recipe or dict(opened.manifest.recipe),
        )
    return out


def test_a_tuned_artifact_matches_its_manifest(tuned: Path, source: Path) -> None:
    found = compare(tuned, source)
    assert found.passed
    assert found.scale_change == 0.5
    assert found.n_exact == found.n_packed == 14
    assert len(found.tuned) == 5
    assert found.n_identical == found.n_kept - 5
    assert found.n_source_named == found.n_source_digests


def test_without_the_recipe_the_same_bytes_are_wrong(tuned: Path, source: Path, tmp_path: Path) -> None:
    found = compare(changed(tuned, tmp_path / "out", {}, {"defaults": {}}), source)
    reasons = {finding.reason for finding in found.findings}
    assert reasons == {Reason.CODES_MISMATCH, Reason.SOURCE_MISMATCH}
    assert found.n_exact == 0


def test_another_code_is_found(tuned: Path, source: Path, tmp_path: Path) -> None:
    with open_artifact(tuned) as opened:
        tensor = opened[WEIGHT]
        assert isinstance(tensor, PackedTensor)
        packed = np.array(tensor.packed)
    packed[7] ^= 0x10
    found = compare(changed(tuned, tmp_path / "out", {WEIGHT: {Component.PACKED: packed}}), source)
    assert [(f.reason, f.tensor) for f in found.findings] == [(Reason.CODES_MISMATCH, WEIGHT)]
    message = found.findings[0].message
    assert "1 of 8192 codes and 0 of the scales differ from what encoding the source gives" in message
    assert "(tolerance for scales: 50%" in message


def test_a_scale_out_of_the_stated_range_is_found(tuned: Path, source: Path, tmp_path: Path) -> None:
    with open_artifact(tuned) as opened:
        tensor = opened[WEIGHT]
        assert isinstance(tensor, PackedTensor)
        scales = np.array(tensor.scales())
        scales[5] *= 2.5
        parts = store_scales(scales, tensor.layout).with_codes(tensor.packed).components()
    found = compare(changed(tuned, tmp_path / "out", {WEIGHT: parts}), source)
    assert [(f.reason, f.tensor) for f in found.findings] == [(Reason.CODES_MISMATCH, WEIGHT)]
    assert found.n_exact == 13


def test_only_vectors_may_be_tuned_among_kept_tensors(tuned: Path, source: Path, tmp_path: Path) -> None:
    with open_artifact(tuned) as opened:
        head = np.array(opened.view("lm_head.weight"))
    head.reshape(-1)[3] ^= 1
    found = compare(changed(tuned, tmp_path / "out", {"lm_head.weight": {Component.PACKED: head}}), source)
    assert [(f.reason, f.tensor) for f in found.findings] == [(Reason.SOURCE_MISMATCH, "lm_head.weight")]


def test_another_source_is_found(tuned: Path, tmp_path: Path) -> None:
    found = compare(tuned, models.write_source(tmp_path / "other", seed=9))
    assert not found.passed
    assert all("is not the tensor that was converted" in finding.message for finding in found.findings)


@pytest.mark.parametrize("seed", range(4))
def test_every_change_in_the_range_is_allowed_whatever_the_scales(seed: int) -> None:
    """As in tuning: from the decoded scales to the limit in both directions, encoded again."""
    generator = np.random.default_rng(seed)
    absmax = np.abs(generator.standard_normal(700)).astype(np.float32) * np.float32(10.0 ** generator.integers(-6, 3))
    absmax[::50] = 0
    absmax[1::50] *= 30
    plain = encode_absmax(absmax)
    start = decode_absmax(plain.codes, plain.nested_absmax, plain.offset)
    change = generator.choice(np.array([-0.5, 0.5, 0.1, 0], np.float32), absmax.size)
    again = encode_absmax(start + start * change)
    scales = decode_absmax(again.codes, again.nested_absmax, again.offset)
    assert count_too_far(scales, again.nested_absmax, absmax, 0.5) == 0
    assert count_too_far(absmax * (1 + change), None, absmax, 0.5) == 0
    scales[10] += 10 * np.abs(scales).max()
    assert count_too_far(scales, again.nested_absmax, absmax, 0.5) == 1
    scales[10] = np.nan
    assert count_too_far(scales, again.nested_absmax, absmax, 0.5) == 1


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (RECIPE, 0.5),
        ({}, None),
        ({"tuning": []}, None),
        ({"tuning": {"scale_change": "0.5"}}, None),
        ({"tuning": {"scale_change": 7}}, None),
    ],
)
def test_only_a_share_below_one_is_taken_from_a_recipe(recipe: dict[str, Any], expected: float | None) -> None:
    assert scale_change(recipe) == expected
