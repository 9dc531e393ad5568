"""`tune`: closer on held-out text with the same codes and size, the same bytes however it is stopped, refusals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qformat.artifact.manifest import KeptRecord, PackedRecord
from qformat.artifact.manifest_seal import seal
from qformat.artifact.reading.reader import PackedTensor, open_artifact
from qformat.artifact.reading.verify import verify_integrity
from qformat.converters.compare.compare import compare
from qformat.errors import DataError, DivergenceError, Reason, SourceError, TargetError, UsageError, VerificationError
from qformat.model.load import load_tokenizer
from qformat.quality.tuning import tune as module
from qformat.quality.tuning.tune import TuningResult
from qformat.quality.windows import read_windows
from tests.converters.faulty_disk import FaultyDisk
from tests.model import sides
from tests.quality import models
from tests.quality.calibration.calibrated import calibrate
from tests.quality.tuning import tuned
from tests.quality.tuning.tuned import run
from tests.repository import ROOT
from tests.small_models import contents, names_beside, write_checkpoint


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def result(artifact: Path, source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> TuningResult:
    """A tuning that nothing disturbs. Not to be changed."""
    torch.set_num_threads(1)
    found = run(artifact, source, text, tmp_path_factory.mktemp("tuned") / "out")
    assert found is not None
    return found


def test_it_gets_closer_by_more_than_chance(result: TuningResult) -> None:
    assert result.step == tuned.SHORT["steps"]
    gained = (result.before.kl - result.after.kl).numpy()  # the same windows
    assert gained.mean() > 4 * gained.std() / len(gained) ** 0.5
    assert result.after.mean("kl") < 0.75 * result.before.mean("kl")
    assert abs(result.after.mean("kl") - result.tuned.mean("kl")) < 0.05 * result.before.mean("kl")
    assert result.tokens == 8 * 4 * 32


def test_the_figures_are_those_of_the_stored_artifact(result: TuningResult, source: Path, text: Path) -> None:
    """An oracle that shares nothing with tuning: both models loaded anew, all logits, torch's own KL."""
    from transformers import AutoModelForCausalLM

    _, held_out = read_windows(text, load_tokenizer(source), length=32).hold_out(8)
    ids = torch.from_numpy(held_out.ids.astype(np.int64))
    with torch.no_grad():
        p = torch.log_softmax(AutoModelForCausalLM.from_pretrained(source)(ids).logits.float(), -1)
        q = torch.log_softmax(sides.load_ours(result.out)(ids).logits.float(), -1)
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean(1)
    torch.testing.assert_close(result.after.kl, kl.double(), rtol=2e-2, atol=2e-3)
    assert result.after.mean("top1") == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()), abs=0.02)
    loss = torch.nn.functional.cross_entropy(q[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert result.after.mean("loss") == pytest.approx(float(loss), rel=5e-3)


def test_only_scales_and_norms_change_and_no_byte_is_added(result: TuningResult, artifact: Path) -> None:
    assert verify_integrity(result.out, sha256=True).good
    before, after = contents(artifact), contents(result.out)
    assert {n: len(d) for n, d in before.items() if n != "qformat.json"} == {
        n: len(d) for n, d in after.items() if n != "qformat.json"
    }
    norms = 0
    with open_artifact(artifact) as old, open_artifact(result.out) as new:
        for name, record in new.manifest.tensors.items():
            source = old.manifest.tensors[name]
            if isinstance(record, PackedRecord):
                one, other = old[name], new[name]
                assert isinstance(one, PackedTensor)
                assert isinstance(other, PackedTensor)
                np.testing.assert_array_equal(one.packed, other.packed)
                assert (one.scales() != other.scales()).any()
            elif record != source:
                assert isinstance(source, KeptRecord)
                assert record.source_xxh3 == source.xxh3
                norms += 1
    assert norms == 5  # two a layer and the last one


def test_the_manifest_tells_what_was_done_and_nothing_of_the_machine(result: TuningResult, text: Path) -> None:
    import hashlib

    with open_artifact(result.out) as opened:
        told = opened.manifest.recipe["tuning"]
    assert isinstance(told, dict)
    assert told["data_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert (told["steps"], told["tokens"], told["learning_rate"], told["seed"]) == (8, 1024, 1e-2, 0)
    assert set(told) == {
        "method", "steps", "learning_rate", "warmup_steps", "batch_size", "seq_len", "held_out", "seed", "tokens",
        "data_sha256", "scale_change", "dtype", "versions",
    }  # fmt: skip


@pytest.mark.skipif(not sides.SAME_PRODUCTS, reason="bitsandbytes multiplies bf16, this CPU has no instructions for it")
def test_transformers_and_bitsandbytes_compute_the_same_logits(result: TuningResult) -> None:
    ids = torch.arange(40)[None]
    with torch.no_grad():
        ours, theirs = sides.load_ours(result.out)(ids).logits, sides.load_peer(result.out)(ids).logits
    assert torch.equal(ours, theirs)


def test_the_same_command_gives_the_same_bytes(
    result: TuningResult, artifact: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    run(artifact, source, text, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(result.out)
    run(artifact, source, text, tmp_path / "checkpointed", gradient_checkpointing=True, save_every=3)
    assert contents(tmp_path / "checkpointed") == contents(result.out)
    run(artifact, source, text, tmp_path / "other", seed=1)
    assert contents(tmp_path / "other") != contents(result.out)


class _Stop(Exception):
    pass


@pytest.mark.parametrize("at", [7, pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_stopped_tuning_goes_on_and_ends_in_the_same_bytes(
    at: int, result: TuningResult, artifact: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    def stop(line: Any) -> None:
        if line.step == at:
            raise _Stop

    with pytest.raises(_Stop):
        run(artifact, source, text, tmp_path / "out", on_step=stop)
    assert not (tmp_path / "out").exists()
    steps: list[int] = []
    run(artifact, source, text, tmp_path / "out", on_step=lambda line: steps.append(line.step))
    assert steps == list(range(5 if at > 4 else 1, 9))
    assert contents(tmp_path / "out") == contents(result.out)
    assert names_beside(tmp_path / "out") == {"out"}


TUNE = """
import sys, torch
from pathlib import Path
from tests.quality.tuning.tuned import run
torch.set_num_threads(1)
run(*map(Path, sys.argv[1:5]), on_step=lambda line: print(line.step, flush=True))
"""


def test_a_killed_process_is_continued(
    result: TuningResult, artifact: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", TUNE, *map(str, (artifact, source, text, tmp_path / "out"))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 6:
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    run(artifact, source, text, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(result.out)


@pytest.mark.parametrize(
    "share", [0.5, 0.9, *(pytest.param(share, marks=pytest.mark.slow) for share in (0, 0.1, 0.3, 0.7, 0.99))]
)
def test_a_full_disk_is_told_and_nothing_is_lost(
    share: float, result: TuningResult, artifact: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    counting = FaultyDisk()
    run(artifact, source, text, tmp_path / "counted", disk=counting)
    writing = {"raw_pwrite", "raw_write", "raw_open", "raw_mkdir"}
    calls = [number for number, name in enumerate(counting.names) if name in writing]
    number = calls[int(share * len(calls))]
    with pytest.raises(TargetError, match="Make room and run the same command again"):
        run(artifact, source, text, tmp_path / "out", disk=FaultyDisk(number, "full from here on"))
    assert not (tmp_path / "out").exists()
    run(artifact, source, text, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(result.out)


def test_an_output_that_is_there_is_replaced_only_with_force(
    result: TuningResult, artifact: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    out = models.write_artifact(source, tmp_path / "out", block_size=256)
    before = contents(out)
    with pytest.raises(TargetError, match="exists already"):
        run(artifact, source, text, out)
    assert contents(out) == before
    run(artifact, source, text, out, force=True)
    assert contents(out) == contents(result.out)
    with pytest.raises(TargetError, match="lies inside the source"):
        run(artifact, source, text, artifact / "out")


def test_other_settings_do_not_continue_a_tuning(artifact: Path, source: Path, text: Path, tmp_path: Path) -> None:
    def stop(line: Any) -> None:
        raise _Stop

    with pytest.raises(_Stop):
        run(artifact, source, text, tmp_path / "out", on_step=stop)
    with pytest.raises(TargetError, match="--restart"):
        run(artifact, source, text, tmp_path / "out", steps=3)
    found = run(artifact, source, text, tmp_path / "out", steps=3, restart=True)
    assert found is not None
    assert found.step == 3


def test_another_source_is_refused_with_the_difference(artifact: Path, text: Path, tmp_path: Path) -> None:
    other = models.write_source(tmp_path / "other", seed=5)
    with pytest.raises(SourceError, match=r"is not the tensor that nf4 was made from: XXH3-128 \w+, expected \w+; so"):
        run(artifact, other, text, tmp_path / "out")
    smaller = write_checkpoint(tmp_path / "smaller", dict(list(models.tensors().items())[:-3]))
    with pytest.raises(SourceError, match="has no such tensor") as refused:
        run(artifact, smaller, text, tmp_path / "out")
    assert refused.value.reason is Reason.SOURCE_MISMATCH
    assert names_beside(tmp_path / "out") == {"other", "smaller"}


def test_an_artifact_without_digests_of_its_source_is_taken_on_trust_only(
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
    with pytest.raises(UsageError, match=r"does not name the digest of the source .* --trust-source"):
        run(nameless, source, text, tmp_path / "out")
    run(nameless, source, text, tmp_path / "out", trust_source=True)
    shard = "model-00001-of-00001.safetensors"
    assert contents(tmp_path / "out")[shard] == contents(result.out)[shard]


def test_text_that_is_too_short_is_refused(artifact: Path, source: Path, tmp_path: Path) -> None:
    short = models.write_text(tmp_path / "short.txt", n_words=5)
    with pytest.raises(DataError, match="less than one window of 32"):
        run(artifact, source, short, tmp_path / "out")
    few = models.write_text(tmp_path / "few.txt", n_words=100)
    with pytest.raises(UsageError, match="8 would be held out"):
        run(artifact, source, few, tmp_path / "out")
    with pytest.raises(UsageError, match="takes at most 128 tokens, and windows have 130"):
        run(artifact, source, models.write_text(tmp_path / "t"), tmp_path / "out", seq_len=130, held_out=2)


def test_a_tuned_artifact_is_not_tuned_again(result: TuningResult, source: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="was tuned already"):
        run(result.out, source, text, tmp_path / "out")


def test_what_did_not_get_better_is_written_only_when_asked(
    artifact: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    changed = {"learning_rate": 0.7, "warmup_steps": 0, "steps": 3}
    with pytest.raises(VerificationError, match=r"did not get better.*--accept-worse"):
        run(artifact, source, text, tmp_path / "out", **changed)
    assert not (tmp_path / "out").exists()
    found = run(artifact, source, text, tmp_path / "out", **changed, accept_worse=True)
    assert found is not None
    assert found.step == 0  # the best there was
    assert verify_integrity(tmp_path / "out", sha256=True).good


def test_a_tuning_that_diverges_names_the_step_and_keeps_the_best_checkpoint(
    artifact: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    changed = {"steps": 30, "save_every": 2, "learning_rate": 0.05}
    rates = module.TuningRun.run.__globals__["learning_rate"]

    def run_away(step: int, settings: Any) -> float:
        return 50.0 if step > 4 else rates(step, settings)

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(module.TuningRun.run.__globals__, "learning_rate", run_away)
        with pytest.raises(DivergenceError, match=r"step \d+: .*the best checkpoint, after [24] steps.*--use-best"):
            run(artifact, source, text, tmp_path / "out", **changed)
    assert not (tmp_path / "out").exists()
    found = run(artifact, source, text, tmp_path / "out", **changed, use_best=True)
    assert found is not None
    assert found.step in {2, 4}
    assert found.after.mean("kl") < found.before.mean("kl")


def test_a_teacher_that_gives_no_numbers_is_named(text: Path, tmp_path: Path) -> None:
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
        with pytest.raises(
            DivergenceError, match="the 16-bit model gives values that are not finite on a window among"
        ):
            run(artifact, source, text, folder / "out")
        assert not (folder / "out").exists()


def test_other_layouts_and_formats_are_tuned_as_well(source: Path, text: Path, tmp_path: Path) -> None:
    for name, options in (
        ("single", {"double_quant": False}),
        ("coarse", {"block_size": 256, "max_shard_nbytes": 60_000}),
    ):
        artifact = models.write_artifact(source, tmp_path / name, **options)
        found = run(artifact, source, text, tmp_path / f"{name}-out")
        assert found is not None
        assert found.after.mean("kl") < found.before.mean("kl")
        assert verify_integrity(found.out, sha256=True).good
    assert found.after.mean("kl") == pytest.approx(found.tuned.mean("kl"), rel=0.2)


def test_without_a_second_level_nothing_is_lost_by_rounding_scales(source: Path, text: Path, tmp_path: Path) -> None:
    artifact = models.write_artifact(source, tmp_path / "single", double_quant=False)
    found = run(artifact, source, text, tmp_path / "out")
    assert found is not None
    assert torch.equal(found.after.kl, found.tuned.kl)


class TestCachedTeacher:
    """The 16-bit model's word on disk."""

    def test_it_tunes_nearly_as_well_without_the_model_in_memory(
        self, result: TuningResult, artifact: Path, source: Path, text: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        cache = tmp_path / "cache"
        first = run(artifact, source, text, tmp_path / "first", teacher_cache=cache)
        assert first is not None
        assert first.after.mean("kl") < 0.75 * first.before.mean("kl")
        assert first.before.mean("kl") <= result.before.mean("kl")  # of fewer outcomes
        monkeypatch.setattr(module, "load_checkpoint", lambda *_, **__: pytest.fail("the model was loaded"))
        run(artifact, source, text, tmp_path / "second", teacher_cache=cache)
        assert contents(tmp_path / "second") == contents(tmp_path / "first")

    def test_with_all_tokens_it_is_the_live_one(
        self, result: TuningResult, artifact: Path, source: Path, text: Path, tmp_path: Path
    ) -> None:
        vocabulary = tuned_vocabulary(source)
        found = run(artifact, source, text, tmp_path / "out", teacher_cache=tmp_path / "c", top_k=vocabulary)
        assert found is not None
        torch.testing.assert_close(found.before.kl, result.before.kl, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.after.kl, result.after.kl, rtol=0.1, atol=5e-3)

    def test_a_damaged_window_is_named_and_made_again_once_removed(
        self, artifact: Path, source: Path, text: Path, tmp_path: Path
    ) -> None:
        cache = tmp_path / "cache"
        run(artifact, source, text, tmp_path / "first", teacher_cache=cache)
        (folder,) = cache.iterdir()
        window = sorted(folder.glob("window-*"))[3]
        data = bytearray(window.read_bytes())
        data[100] ^= 1
        window.write_bytes(bytes(data))
        with pytest.raises(TargetError, match=rf"{window.name}: was damaged\. Remove it"):
            run(artifact, source, text, tmp_path / "second", teacher_cache=cache)
        window.unlink()
        run(artifact, source, text, tmp_path / "second", teacher_cache=cache)
        assert contents(tmp_path / "second") == contents(tmp_path / "first")

    def test_other_settings_have_a_folder_of_their_own(
        self, artifact: Path, source: Path, text: Path, tmp_path: Path
    ) -> None:
        cache = tmp_path / "cache"
        for k in (8, 16):
            run(artifact, source, text, tmp_path / f"out{k}", teacher_cache=cache, top_k=k, steps=2)
        assert len(list(cache.iterdir())) == 2
        with pytest.raises(UsageError, match="a vocabulary of"):
            run(artifact, source, text, tmp_path / "out", teacher_cache=cache, top_k=10_000)


def tuned_vocabulary(source: Path) -> int:
    return int(json.loads((source / "config.json").read_text())["vocab_size"])


def test_nothing_is_left_behind_by_refusals(artifact: Path, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        run(artifact, source, tmp_path / "missing.txt", tmp_path / "out")
    with pytest.raises(UsageError, match="steps: 0, expected at least 1"):
        run(artifact, source, tmp_path / "missing.txt", tmp_path / "out", steps=0)
    with pytest.raises(UsageError, match="learning_rate"):
        run(artifact, source, tmp_path / "missing.txt", tmp_path / "out", learning_rate=float("nan"))
    assert os.listdir(tmp_path) == []


def test_a_calibrated_artifact_is_tuned_and_still_verified(source: Path, text: Path, tmp_path: Path) -> None:
    artifact = calibrate(source, tmp_path / "calibrated", text)
    found = run(artifact, source, text, tmp_path / "out")
    assert found is not None
    assert found.after.mean("kl") < found.before.mean("kl")
    with open_artifact(found.out) as opened:
        assert {"calibration", "tuning"} <= set(opened.manifest.recipe)
    assert verify_integrity(found.out, sha256=True).good
    compared = compare(found.out, source)
    assert compared.good
    assert (compared.n_chosen, len(compared.tuned)) == (14, 5)
