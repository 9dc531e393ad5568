"""`verify --source` of calibrated artifacts: what must hold is checked, and chosen codes are reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import qformat
from qformat.artifact.components import Component
from qformat.artifact.packed_arrays import encode_plain
from qformat.artifact.reading.reader import PackedTensor, open_artifact
from qformat.artifact.writing.disk import Disk
from qformat.artifact.writing.rewrite import Replacements, replaced_by, rewrite
from qformat.artifact.writing.staging import Staging
from qformat.cli.main import run as run_command
from qformat.converters.compare.chosen_codes import count_far_scales, not_chosen
from qformat.converters.compare.compare import compare
from qformat.errors import Reason
from tests.quality import models
from tests.quality.calibration.calibrated import calibrate
from tests.quality.tuning.tuned import run

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module", params=[True, False], ids=["two levels", "one level"])
def calibrated(
    request: pytest.FixtureRequest, source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return calibrate(source, tmp_path_factory.mktemp("compared") / "out", text, double_quant=request.param)


def changed(artifact: Path, out: Path, replacements: Replacements) -> Path:
    with open_artifact(artifact) as opened, Staging.begin(out, "f", disk=Disk()) as staging:
        rewrite(
            opened.structure, staging, replaced_by(opened.structure, replacements), recipe=dict(opened.manifest.recipe)
        )
    return out


def packed_tensor(opened: qformat.Artifact, name: str) -> PackedTensor:
    tensor = opened[name]
    assert isinstance(tensor, PackedTensor)
    return tensor


def test_a_calibrated_artifact_is_near_its_source(calibrated: Path, source: Path) -> None:
    found = compare(calibrated, source)
    assert found.passed
    assert (found.n_near, found.n_chosen, found.n_exact) == (14, 14, 0)
    assert found.n_identical == found.n_kept
    assert found.n_source_named == found.n_source_digests
    assert all(tensor.n_far_scales == 0 for tensor in found.packed)


def test_the_summary_reports_that_codes_were_chosen(
    calibrated: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    assert run_command(["verify", str(calibrated), "--source", str(source), "--report", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "codes and scales chosen on a text, and near the source: 14 of 14" in shown
    assert "as the recipe gives" not in shown
    assert "Calibrated codes and scales are close to the source: 14 of 14" in page.read_text()


def test_weights_encoded_without_calibration_must_be_exact(source: Path, text: Path, tmp_path: Path) -> None:
    out = calibrate(source, tmp_path / "out", text, block_size=128)
    found = compare(out, source)
    assert found.passed
    assert (found.n_near, found.n_chosen, found.n_exact) == (2, 2, 12)
    with open_artifact(out) as opened:
        packed = np.array(packed_tensor(opened, WEIGHT).packed)
    packed[7] ^= 0x10
    findings = compare(changed(out, tmp_path / "other", {WEIGHT: {Component.PACKED: packed}}), source).findings
    assert [(finding.reason, finding.tensor) for finding in findings] == [(Reason.CODES_MISMATCH, WEIGHT)]


def test_codes_of_another_weight_are_found(calibrated: Path, source: Path, tmp_path: Path) -> None:
    with open_artifact(calibrated) as opened:
        other = np.array(packed_tensor(opened, WEIGHT.replace("up_proj", "gate_proj")).packed)
    found = compare(changed(calibrated, tmp_path / "out", {WEIGHT: {Component.PACKED: other}}), source)
    assert [(finding.reason, finding.tensor) for finding in found.findings] == [(Reason.CODES_MISMATCH, WEIGHT)]
    assert "chosen on a text, but 0 of 128 scales are far" in found.findings[0].message
    assert found.n_near == 13


def test_scales_of_another_size_are_found(calibrated: Path, source: Path, tmp_path: Path) -> None:
    with open_artifact(calibrated) as opened:
        tensor = packed_tensor(opened, WEIGHT)
        raw = tensor.decode()
        wide = (np.asarray(raw, np.uint32) << 16).view(np.float32) * 8
        weight = encode_plain((wide.view(np.uint32) >> 16).astype(np.uint16).reshape(-1), tensor.layout)
        parts = {part: data for part, data in weight.components().items() if part is not Component.PACKED}
    found = compare(changed(calibrated, tmp_path / "out", {WEIGHT: parts}), source)
    assert [(finding.reason, finding.tensor) for finding in found.findings] == [(Reason.CODES_MISMATCH, WEIGHT)]
    assert "128 of 128 scales are far" in found.findings[0].message


def test_a_kept_tensor_that_differs_from_the_source_is_found(calibrated: Path, tmp_path: Path) -> None:
    other = models.write_source(tmp_path / "source", seed=5)
    assert {finding.reason for finding in compare(calibrated, other).findings} == {Reason.SOURCE_MISMATCH}


def test_a_calibrated_and_tuned_artifact_passes(calibrated: Path, source: Path, text: Path, tmp_path: Path) -> None:
    run(calibrated, source, text, tmp_path / "tuned", accept_worse=True)
    found = compare(tmp_path / "tuned", source)
    assert found.passed
    assert (found.n_near, found.n_chosen) == (14, 14)
    assert found.tuned


def test_bounds_of_scales() -> None:
    absmax = np.full(6, 2.0, np.float32)
    scales = np.array([0.5, 8.0, 0.49, 8.1, 2.0, -2.0], np.float32)
    assert count_far_scales(scales, None, absmax) == 3
    assert count_far_scales(scales, np.array([1000.0], np.float32), absmax) == 0
    assert count_far_scales(np.full(6, np.nan, np.float32), None, absmax) == 6


@pytest.mark.parametrize(("recipe", "expected"), [
    ({}, None), ({"calibration": 3}, None), ({"calibration": {}}, frozenset()),
    ({"calibration": {"plain": {"a": "why"}}}, frozenset({"a"})), ({"calibration": {"plain": ["a"]}}, frozenset()),
])  # fmt: skip
def test_the_recipe_lists_the_weights_that_were_not_chosen(
    recipe: dict[str, object], expected: frozenset[str] | None
) -> None:
    assert not_chosen(recipe) == expected  # type: ignore[arg-type]
