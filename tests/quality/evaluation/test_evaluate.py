"""`evaluate` on tiny models: compared with transformers on the same windows, in pairs, and what is rejected."""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaMLP

from qformat.cli.messages import as_flag
from qformat.errors import ArtifactError, DataError, SourceError, UsageError, VerificationError, spelled
from qformat.model.load import load_model
from qformat.quality.evaluation import evaluate as evaluate_module
from qformat.quality.evaluation.estimates import estimate
from qformat.quality.evaluation.evaluate import evaluate
from qformat.quality.evaluation.facts import differences, facts, figures, record
from qformat.quality.evaluation.scores import Scores, score_window
from qformat.quality.windows import read_windows
from tests.artifact.damaged import damaged_copy
from tests.quality import models
from tests.rounding import kl_error, log_softmax_error
from tests.small_models import tensor_of, write_checkpoint

SMALL: dict[str, Any] = {"n_windows": 5, "window_length": 64, "device": "cpu"}


def logits_of(model: Any, ids: np.ndarray) -> torch.Tensor:
    """Return float64 [windows, L - 1, vocabulary], one window at a time, because a batch is summed in another order."""
    with torch.no_grad():
        logits = torch.cat([model(torch.from_numpy(window[None]).long(), use_cache=False).logits for window in ids])
    return logits[:, :-1].double()


def test_figures_are_those_of_transformers_on_the_same_windows(source: Path, artifact: Path, text: Path) -> None:
    found = evaluate(artifact, [text], source=source, **SMALL).texts[0]
    windows = read_windows(text, AutoTokenizer.from_pretrained(source), length=64).spread(5)
    assert np.array_equal(found.windows.ids, windows.ids)
    of_source = logits_of(AutoModelForCausalLM.from_pretrained(source, dtype="auto"), windows.ids)
    logits = logits_of(load_model(artifact, device="cpu"), windows.ids)
    p, q = torch.log_softmax(of_source, -1), torch.log_softmax(logits, -1)
    kl = (p.exp() * (p - q)).sum(-1).mean(1).numpy()
    targets = torch.from_numpy(windows.ids[:, 1:]).long()[..., None]
    increase = (p.gather(-1, targets) - q.gather(-1, targets)).mean((1, 2)).numpy()
    got = figures(found.models[0], found.source)
    # The logits are the same. What is computed from them in float32 is off by this much in a window, and so is at most
    # the standard error of five of them: it is half the root mean square of their distances from the mean.
    off = kl_error(of_source, logits).mean(1)
    off_increase = float(sum(log_softmax_error(side).mean() for side in (of_source, logits)))
    assert got["kl"].mean == pytest.approx(kl.mean(), rel=0, abs=float(off.mean()))
    assert got["kl"].standard_error == pytest.approx(kl.std(ddof=1) / 5**0.5, rel=0, abs=float(off.max()))
    assert got["loss_increase"].mean == pytest.approx(increase.mean(), rel=0, abs=off_increase)
    assert got["loss"].mean - got["source_loss"].mean == pytest.approx(got["loss_increase"].mean)
    assert got["perplexity"].mean == pytest.approx(np.exp(got["loss"].mean))
    assert got["top1_agreement"].mean == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())


@pytest.mark.parametrize("which", ["source", "artifact"])
def test_a_model_compared_with_itself_has_no_divergence(which: str, text: Path, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    found = evaluate(model, [text], source=model, any_source=True, **SMALL).texts[0]
    assert found.source is not None
    assert found.models[0].kl is not None
    assert (found.models[0].kl == 0).all()
    assert np.array_equal(found.models[0].loss, found.source.loss)
    assert figures(found.models[0], found.source)["top1_agreement"].mean == 1


def test_models_are_compared_in_pairs(source: Path, artifact: Path, coarse: Path, text: Path) -> None:
    found = evaluate(artifact, [text], source=source, against=[coarse], **SMALL)
    one, two = found.texts[0].models
    assert one.kl is not None
    assert two.kl is not None
    assert two.kl.mean() > one.kl.mean()
    got = differences(two, one, found.texts[0].source)
    assert got["kl"] == estimate(two.kl - one.kl)
    assert got["loss"].mean == pytest.approx(two.loss.mean() - one.loss.mean())
    first, second = facts(found)["texts"][0]["models"]  # type: ignore[index, call-overload]
    assert "more_than_first" not in first
    assert second["more_than_first"]["kl"]["mean"] == pytest.approx(got["kl"].mean, rel=1e-5)


def test_without_a_source_only_the_loss_is_measured(artifact: Path, text: Path) -> None:
    found = evaluate(artifact, [text], **SMALL)
    assert found.texts[0].source is None
    assert set(figures(found.texts[0].models[0], None)) == {"loss", "perplexity"}


def test_every_text_has_its_own_figures(source: Path, artifact: Path, text: Path, tmp_path: Path) -> None:
    other = models.write_text(tmp_path / "other.txt", seed=5, n_words=400)
    found = facts(evaluate(artifact, [text, other], source=source, **SMALL))["texts"]
    assert [entry["name"] for entry in found] == ["words.txt", "other.txt"]  # type: ignore[index, union-attr, call-overload]
    assert found[0]["sha256"] != found[1]["sha256"]  # type: ignore[index, call-overload]


def test_the_record_contains_no_path_and_is_deterministic(source: Path, artifact: Path, text: Path) -> None:
    one, two = (record(evaluate(artifact, [text], source=source, **SMALL)) for _ in range(2))
    assert one == two
    assert one["source_checked"] is True
    assert str(text.parent) not in json.dumps(one)
    assert one["texts"][0]["predicted_tokens"] == 5 * 63  # type: ignore[index, call-overload]


def test_another_source_is_rejected_unless_any_source_is_set(artifact: Path, text: Path, tmp_path: Path) -> None:
    other = models.write_source(tmp_path / "other", seed=1)
    with pytest.raises(SourceError, match=r"is not the tensor that .* was converted from.*any_source=True"):
        evaluate(artifact, [text], source=other, **SMALL)
    assert not evaluate(artifact, [text], source=other, any_source=True, **SMALL).source_checked
    of_other = models.write_artifact(other, tmp_path / "of_other")
    with pytest.raises(SourceError, match=r"is not the tensor that \S+nf4 was converted from"):
        evaluate(of_other, [text], source=other, against=[artifact], **SMALL)


def test_a_source_that_lacks_a_weight_of_the_artifact_is_rejected(artifact: Path, text: Path, tmp_path: Path) -> None:
    other = models.write_source(tmp_path / "other")
    tensors = models.tensors()
    del tensors["model.layers.0.mlp.up_proj.weight"]
    write_checkpoint(other, tensors, side_files={})
    with pytest.raises(SourceError, match=r"up_proj.weight.*is missing"):
        evaluate(artifact, [text], source=other, **SMALL)


def test_a_text_that_is_too_short_is_rejected(artifact: Path, tmp_path: Path) -> None:
    short = models.write_text(tmp_path / "short.txt", n_words=3)
    with pytest.raises(DataError, match="fewer than one window of 64"):
        evaluate(artifact, [short], **SMALL)


def test_windows_longer_than_the_models_context_are_rejected(artifact: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="has a context of 128 tokens, but windows have 129"):
        evaluate(artifact, [text], **{**SMALL, "window_length": 129})


def test_another_vocabulary_is_rejected(artifact: Path, text: Path, tmp_path: Path) -> None:
    other = models.write_source(tmp_path / "other", vocabulary=400)
    with pytest.raises(UsageError, match=r"a vocabulary of 320 tokens, but .*other has 400"):
        evaluate(artifact, [text], source=other, any_source=True, **SMALL)


def test_a_tokenizer_that_splits_the_text_differently_is_rejected(
    source: Path, artifact: Path, text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(source, other)
    state = json.loads((source / "tokenizer.json").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    tokenizer.backend_tokenizer.add_tokens(["<never>"])
    tokenizer.save_pretrained(other)
    assert evaluate(artifact, [text], source=other, **SMALL).source_checked
    state["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UsageError, match=r"other: its tokenizer splits .*words.txt into other tokens"):
        evaluate(artifact, [text], source=other, **SMALL)


def test_a_source_without_a_tokenizer_is_accepted(source: Path, artifact: Path, text: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(source, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    assert evaluate(artifact, [text], source=bare, **SMALL).source_checked
    with pytest.raises(UsageError, match="bare: has no tokenizer"):
        evaluate(bare, [text], **SMALL)


def test_non_finite_logits_are_reported_with_the_window(
    source: Path, artifact: Path, text: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    tensors = models.tensors()
    tensors["model.norm.weight"] = tensor_of(np.full(64, np.nan), "BF16")
    config = json.loads((source / "config.json").read_text())
    write_checkpoint(broken, tensors, config=config, side_files={})
    first = read_windows(text, AutoTokenizer.from_pretrained(source), length=64).spread(5).numbers[0]
    assert first > 0
    expected = rf"broken: non-finite logits in window {first} of .*words.txt, token 0"
    with pytest.raises(VerificationError, match=expected) as caught:
        evaluate(artifact, [text], source=broken, **SMALL)
    assert str(caught.value).endswith("or use another dtype (dtype='float32')")
    assert spelled(caught.value.words, as_flag).endswith("or use another dtype (--dtype=float32)")


def test_a_model_that_cannot_run_is_blamed_on_its_config(
    artifact: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", lambda _, x: x @ x.new_ones(3, 3))
    with pytest.raises(ArtifactError, match=r"config\.json: the model that it describes cannot run: ") as caught:
        evaluate(artifact, [text], **SMALL)
    assert caught.value.path == str(artifact / "config.json")


def test_memory_holds_logits_of_one_window_and_two_models_at_a_time(
    source: Path, artifact: Path, coarse: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits_of_a_window() -> set[int]:
        size = (64, models.SIZES["vocabulary"])
        found = (item for item in gc.get_objects() if type(item) is torch.Tensor)
        return {item.untyped_storage().data_ptr() for item in found if item.shape[-2:] == size}

    alive: list[int] = []

    def counting(logits: torch.Tensor, *arguments: Any, **named: Any) -> Scores:
        alive.append(len(logits_of_a_window()))
        return score_window(logits, *arguments, **named)

    monkeypatch.setattr(evaluate_module, "score_window", counting)
    gc.collect()
    gc.freeze()  # hides the objects of other tests from `get_objects`, which would take seconds to list them
    evaluate(artifact, [text], source=source, against=[coarse, artifact], **SMALL)
    assert len(alive) == 5 * 4
    assert max(alive) == 2


def test_progress_counts_the_windows_of_all_texts(artifact: Path, text: Path) -> None:
    told: list[tuple[int, int]] = []
    evaluate(artifact, [text, text], **{**SMALL, "on_window": lambda *step: told.append(step)})
    assert told == [(n, 10) for n in range(1, 11)]


@pytest.mark.parametrize("position", ["artifact", "against"])
def test_a_damaged_artifact_gets_no_figures(
    position: str, artifact: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = damaged_copy(artifact, tmp_path / "damaged", "model.norm.weight", "data")
    monkeypatch.setattr(evaluate_module, "load_any", lambda *_, **__: pytest.fail("loaded before the digests"))
    models_ = (damaged, []) if position == "artifact" else (artifact, [damaged])
    with pytest.raises(ArtifactError, match="was changed: XXH3-128") as refused:
        evaluate(models_[0], [text], against=models_[1], **SMALL)
    assert refused.value.tensor == "model.norm.weight"


def test_an_artifact_that_is_written_to_meanwhile_gets_no_figures(artifact: Path, text: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artifact, tmp_path / "copy")
    (shard,) = copy.glob("*.safetensors")
    with pytest.raises(ArtifactError, match="was written to since it was mapped"):
        evaluate(copy, [text], **SMALL, on_window=lambda done, total: os.utime(shard, ns=(0, 1)))
