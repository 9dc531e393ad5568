"""`tune`: closer on held-out text with the same codes and size, and the same bytes after interruptions."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch

from qformat.artifact.manifest import KeptRecord, PackedRecord
from qformat.artifact.reading.reader import PackedTensor, open_artifact
from qformat.artifact.reading.verify import verify_integrity
from qformat.converters.compare.compare import compare
from qformat.model.load import load_tokenizer
from qformat.quality.tuning.tune import TuningResult
from qformat.quality.windows import read_windows
from tests.model import sides
from tests.quality import models
from tests.quality.calibration.calibrated import calibrate
from tests.quality.tuning import tuned
from tests.quality.tuning.tuned import run
from tests.rounding import rounds_like
from tests.small_models import contents


def test_it_gets_closer_significantly(result: TuningResult) -> None:
    assert result.step == tuned.SHORT["steps"]
    # If chance decided, before and after could change places in any of the 8 windows. Fewer than one in a hundred of
    # these 256 exchanges gain as much (Fisher's exact test of paired figures).
    gained = (result.before.kl - result.after.kl).numpy()
    exchanges = np.array(list(itertools.product((1, -1), repeat=8)))
    assert np.mean(exchanges @ gained >= gained.sum()) < 0.01
    assert rounding_costs_less_than_tuning_gains(result)
    assert result.tokens == 8 * 4 * 32


def rounding_costs_less_than_tuning_gains(result: TuningResult) -> bool:
    """Return whether the stored values are nearer to the trained ones than to the artifact before tuning."""
    before, trained, after = (which.mean("kl") for which in (result.before, result.tuned, result.after))
    return abs(after - trained) < abs(before - after)


def test_the_figures_are_those_of_the_stored_artifact(result: TuningResult, source: Path, text: Path) -> None:
    """An independent check that shares no code with tuning: both models loaded again, all logits, torch's own KL."""
    from transformers import AutoModelForCausalLM

    _, held_out = read_windows(text, load_tokenizer(source), length=32).hold_out(8)
    ids = torch.from_numpy(held_out.ids.astype(np.int64))
    with torch.no_grad():
        logits = [
            model(ids).logits for model in (AutoModelForCausalLM.from_pretrained(source), sides.load_ours(result.out))
        ]
        exact = [
            model(ids).logits
            for model in (
                AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
                sides.load_exact(result.out),
            )
        ]
    (kl, loss), (exact_kl, exact_loss) = (kl_and_loss(*pair, ids) for pair in (logits, exact))
    # Tuning multiplies other shapes, and so adds up bf16 in another order.
    assert rounds_like(result.after.kl, kl, exact_kl)
    assert rounds_like(result.after.loss, loss, exact_loss)
    agreement = float((logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean())
    assert abs(result.after.mean("top1") - agreement) <= undecided(logits, exact)


def kl_and_loss(teacher: torch.Tensor, student: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean divergence and the mean loss of each window."""
    p, q = (torch.log_softmax(logits.double(), -1) for logits in (teacher, student))
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean(1)
    return kl, -q[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].mean(1)


def undecided(logits: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Return the share of positions at which rounding may decide which token is the most likely one of either model.

    Two logits that each lie off by no more than twice the largest rounding error may change places.
    """
    close = torch.zeros(logits[0].shape[:2], dtype=torch.bool)
    for rounded, true in zip(logits, exact, strict=True):
        best = rounded.double().topk(2, -1).values
        close |= best[..., 0] - best[..., 1] <= 4 * (rounded.double() - true.double()).abs().max()
    return float(close.double().mean())


def test_only_scales_and_norms_change_and_no_byte_is_added(result: TuningResult, artifact: Path) -> None:
    assert verify_integrity(result.out, sha256=True).passed
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


def test_the_manifest_records_the_tuning_but_not_the_machine(result: TuningResult, text: Path) -> None:
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


def test_transformers_and_bitsandbytes_compute_the_same_logits(result: TuningResult) -> None:
    ids = torch.arange(40)[None]
    with torch.no_grad():
        ours, theirs, exact = (
            load(result.out)(ids).logits for load in (sides.load_ours, sides.load_peer, sides.load_exact)
        )
    assert torch.equal(ours, theirs) if sides.SAME_PRODUCTS else rounds_like(ours, theirs, exact)


def test_the_same_command_gives_the_same_bytes(
    result: TuningResult, artifact: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    run(artifact, source, text, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(result.out)
    run(artifact, source, text, tmp_path / "checkpointed", gradient_checkpointing=True, save_every=3)
    assert contents(tmp_path / "checkpointed") == contents(result.out)
    run(artifact, source, text, tmp_path / "other", seed=1)
    assert contents(tmp_path / "other") != contents(result.out)


def test_other_layouts_and_formats_can_be_tuned(source: Path, text: Path, tmp_path: Path) -> None:
    for name, options in (
        ("single", {"double_quant": False}),
        ("coarse", {"block_size": 256, "max_shard_nbytes": 60_000}),
    ):
        artifact = models.write_artifact(source, tmp_path / name, **options)
        found = run(artifact, source, text, tmp_path / f"{name}-out")
        assert found is not None
        assert found.after.mean("kl") < found.before.mean("kl")
        assert verify_integrity(found.out, sha256=True).passed
        assert rounding_costs_less_than_tuning_gains(found)


def test_without_a_second_level_nothing_is_lost_by_rounding_scales(source: Path, text: Path, tmp_path: Path) -> None:
    artifact = models.write_artifact(source, tmp_path / "single", double_quant=False)
    found = run(artifact, source, text, tmp_path / "out")
    assert found is not None
    assert torch.equal(found.after.kl, found.tuned.kl)


def test_a_calibrated_artifact_is_tuned_and_still_verified(source: Path, text: Path, tmp_path: Path) -> None:
    artifact = calibrate(source, tmp_path / "calibrated", text)
    found = run(artifact, source, text, tmp_path / "out")
    assert found is not None
    assert found.after.mean("kl") < found.before.mean("kl")
    with open_artifact(found.out) as opened:
        assert {"calibration", "tuning"} <= set(opened.manifest.recipe)
    assert verify_integrity(found.out, sha256=True).passed
    compared = compare(found.out, source)
    assert compared.passed
    assert (compared.n_chosen, len(compared.tuned)) == (14, 5)
