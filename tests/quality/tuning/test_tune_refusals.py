"""What is not tuned or not written: other sources, too little text, results that are worse or not finite."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from qformat.artifact.manifest_seal import seal
from qformat.artifact.reading.verify import verify_integrity
from qformat.errors import (
    ArtifactError,
    DataError,
    DivergenceError,
    Reason,
    SourceError,
    TargetError,
    UsageError,
    VerificationError,
)
from qformat.quality.tuning import tune as module
from qformat.quality.tuning.steps import StepLine
from qformat.quality.tuning.tune import TuningResult
from tests.artifact.damaged import damaged_copy
from tests.quality import models
from tests.quality.tuning.tuned import run
from tests.small_models import contents, names_beside, write_checkpoint


def test_an_existing_output_is_replaced_only_with_force(
    result: TuningResult, artifact: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    out = models.write_artifact(source, tmp_path / "out", block_size=256)
    before = contents(out)
    with pytest.raises(TargetError, match="already exists"):
        run(artifact, source, text, out)
    assert contents(out) == before
    run(artifact, source, text, out, force=True)
    assert contents(out) == contents(result.out)
    with pytest.raises(TargetError, match="is inside the source"):
        run(artifact, source, text, artifact / "out")


def test_another_source_is_rejected_with_the_difference(artifact: Path, text: Path, tmp_path: Path) -> None:
    other = models.write_source(tmp_path / "other", seed=5)
    with pytest.raises(
        SourceError, match=r"is not the tensor that nf4 was converted from: XXH3-128 \w+, expected \w+ \("
    ):
        run(artifact, other, text, tmp_path / "out")
    smaller = write_checkpoint(tmp_path / "smaller", dict(list(models.tensors().items())[:-3]))
    with pytest.raises(SourceError, match="is missing, but nf4 was converted from it") as refused:
        run(artifact, smaller, text, tmp_path / "out")
    assert refused.value.reason is Reason.SOURCE_MISMATCH
    assert names_beside(tmp_path / "out") == {"other", "smaller"}


def test_an_artifact_without_source_digests_needs_trust_source(
    result: TuningResult, artifact: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    for name, data in contents(artifact).items():
        (nameless / name).write_bytes(data)
    lines = (nameless / "qformat.json").read_text().splitlines()
    text_of = [re.sub(r',"source_xxh3":"\w+"', "", line) for line in lines]
    unsealed = "\n".join(text_of[:-2]) + '\n  "manifest_sha256": "' + "0" * 64 + '"\n}\n'
    (nameless / "qformat.json").write_bytes(seal(unsealed.encode()))
    assert "source_xxh3" not in json.dumps(json.loads((nameless / "qformat.json").read_text()))
    with pytest.raises(UsageError, match=r"lacks the source digest of .* trust_source=True"):
        run(nameless, source, text, tmp_path / "out")
    run(nameless, source, text, tmp_path / "out", trust_source=True)
    shard = "model-00001-of-00001.safetensors"
    assert contents(tmp_path / "out")[shard] == contents(result.out)[shard]


def test_text_that_is_too_short_is_rejected(artifact: Path, source: Path, tmp_path: Path) -> None:
    short = models.write_text(tmp_path / "short.txt", n_words=5)
    with pytest.raises(DataError, match="fewer than one window of 32"):
        run(artifact, source, short, tmp_path / "out")
    few = models.write_text(tmp_path / "few.txt", n_words=100)
    with pytest.raises(UsageError, match="8 would be held out"):
        run(artifact, source, few, tmp_path / "out")
    with pytest.raises(UsageError, match="has a context of 128 tokens, but windows have 130"):
        run(artifact, source, models.write_text(tmp_path / "t"), tmp_path / "out", seq_len=130, held_out=2)


def test_a_tuned_artifact_is_not_tuned_again(result: TuningResult, source: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="was already tuned"):
        run(result.out, source, text, tmp_path / "out")


def test_a_result_that_is_not_better_is_written_only_with_accept_worse(
    artifact: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    changed = {"learning_rate": 0.7, "warmup_steps": 0, "steps": 3}
    with pytest.raises(VerificationError, match=r"tuning did not improve it.*accept_worse=True"):
        run(artifact, source, text, tmp_path / "out", **changed)
    assert not (tmp_path / "out").exists()
    found = run(artifact, source, text, tmp_path / "out", **changed, accept_worse=True)
    assert found is not None
    assert found.step == 0  # the best there was
    assert verify_integrity(tmp_path / "out", sha256=True).passed


def test_a_diverging_tuning_reports_the_step_and_keeps_the_best_checkpoint(
    artifact: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    changed = {"steps": 30, "save_every": 2, "learning_rate": 0.05}
    rates = module.TuningRun.run.__globals__["learning_rate"]

    def run_away(step: int, settings: Any) -> float:
        return 50.0 if step > 4 else rates(step, settings)

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(module.TuningRun.run.__globals__, "learning_rate", run_away)
        with pytest.raises(DivergenceError, match=r"step \d+: .*the best checkpoint, after [24] steps.*use_best=True"):
            run(artifact, source, text, tmp_path / "out", **changed)
    assert not (tmp_path / "out").exists()
    found = run(artifact, source, text, tmp_path / "out", **changed, use_best=True)
    assert found is not None
    assert found.step in {2, 4}
    assert found.after.mean("kl") < found.before.mean("kl")


@pytest.mark.parametrize(
    ("tensor", "component"),
    [("model.norm.weight", "data"), ("model.layers.0.mlp.up_proj.weight", "absmax")],
)
def test_a_damaged_artifact_is_not_tuned(
    tensor: str, component: str, artifact: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    damaged = damaged_copy(artifact, tmp_path / "damaged", tensor, component)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "load_tokenizer", lambda *_, **__: pytest.fail("began before the digests"))
        with pytest.raises(ArtifactError, match="was changed: XXH3-128") as refused:
            run(damaged, source, text, tmp_path / "out")
    assert (refused.value.tensor, refused.value.field) == (tensor, component)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_tuning_does_not_go_on_over_a_base_that_was_changed_in_place(
    artifact: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(artifact, tmp_path / "copy")
    (shard,) = copy.glob("*.safetensors")

    def write(line: StepLine) -> None:
        if line.step == 3:
            os.utime(shard, ns=(0, 1))

    with pytest.raises(ArtifactError, match="was written to since it was mapped"):
        run(copy, source, text, tmp_path / "out", on_step=write)
    assert not (tmp_path / "out").exists()
    (tuning,) = tmp_path.glob("out*/tuning")
    assert {path.name for path in tuning.glob("checkpoint-*")} == {"checkpoint-0"}


def test_a_weight_that_is_nan_is_named(text: Path, tmp_path: Path) -> None:
    tensors = models.tensors()
    for name, position in (("model.norm.weight", 4), ("lm_head.weight", 64)):
        broken = dict(tensors)
        data = bytearray(broken[name].data)
        data[position : position + 2] = b"\xc0\x7f"  # NaN in bf16
        broken[name] = type(broken[name])(broken[name].dtype, broken[name].shape, bytes(data))
        folder = tmp_path / name
        source = models.write_source(folder / "source")
        write_checkpoint(source, broken, config=json.loads((source / "config.json").read_text()), side_files={})
        artifact = models.write_artifact(source, folder / "nf4")
        with pytest.raises(ArtifactError, match="contains NaN or Inf") as refused:
            run(artifact, source, text, folder / "out")
        assert (refused.value.reason, refused.value.tensor) == (Reason.NONFINITE_WEIGHT, name)
        assert not (folder / "out").exists()


def test_rejected_runs_leave_nothing_behind(artifact: Path, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        run(artifact, source, tmp_path / "missing.txt", tmp_path / "out")
    with pytest.raises(UsageError, match="steps: 0, expected at least 1"):
        run(artifact, source, tmp_path / "missing.txt", tmp_path / "out", steps=0)
    with pytest.raises(UsageError, match="learning_rate"):
        run(artifact, source, tmp_path / "missing.txt", tmp_path / "out", learning_rate=float("nan"))
    assert os.listdir(tmp_path) == []
