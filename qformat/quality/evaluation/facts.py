"""An evaluation as plain JSON values: what `--json` prints, and what `--record` writes (spec section 7.1)."""

from __future__ import annotations

from pathlib import Path

from qformat.artifact.manifest import JsonObject
from qformat.quality.evaluation.estimates import Estimate, estimate
from qformat.quality.evaluation.evaluate import Evaluation, TextScores
from qformat.quality.evaluation.scores import Scores
from qformat.strict_json import Json


def figures(scores: Scores, source: Scores | None) -> dict[str, Estimate]:
    """Return loss and perplexity of a model on a text and, if there is a 16-bit model, its distance from that.

    Args:
        scores: Scores of the model.
        source: Scores of the 16-bit model, or None without one.
    """
    loss = estimate(scores.loss)
    found = {"loss": loss, "perplexity": loss.exponential()}
    if source is not None and scores.kl is not None:
        increase = estimate(scores.loss - source.loss)
        found |= {
            "source_loss": estimate(source.loss),
            "loss_increase": increase,
            "perplexity_factor": increase.exponential(),
            "kl": estimate(scores.kl),
            "top1_agreement": estimate(scores.top1 == source.top1),
        }
    return found


def differences(scores: Scores, other: Scores, source: Scores | None) -> dict[str, Estimate]:
    """Return the paired differences between two models on the same tokens: the first minus the second.

    Args:
        scores: Scores of the first model.
        other: Scores of the second model.
        source: Scores of the 16-bit model, or None without one.
    """
    found = {"loss": estimate(scores.loss - other.loss)}
    if source is not None and scores.kl is not None and other.kl is not None:
        agreement = (scores.top1 == source.top1).astype(float) - (other.top1 == source.top1)
        found |= {"kl": estimate(scores.kl - other.kl), "top1_agreement": estimate(agreement)}
    return found


def facts(evaluation: Evaluation) -> JsonObject:
    """Return the whole evaluation, each figure with its standard error over windows."""
    return {
        "models": list(evaluation.models),
        "source": evaluation.source,
        "source_checked": evaluation.source_checked,
        "window_length": evaluation.texts[0].windows.length,
        "dtype": _dtype(evaluation),
        "texts": [_text(text, evaluation) for text in evaluation.texts],
        "seconds": round(evaluation.seconds, 3),
        "tokens_per_s": round(evaluation.tokens_per_s, 1),
    }


def record(evaluation: Evaluation) -> JsonObject:
    """Return the manifest's `evaluation` of the first model, without paths, durations or other models."""
    kept = ("loss", "source_loss", "loss_increase", "perplexity", "kl", "top1_agreement")
    return {
        "window_length": evaluation.texts[0].windows.length,
        "dtype": _dtype(evaluation),
        "source_checked": evaluation.source_checked,
        "texts": [
            {
                **_about(text),
                **{
                    name: found.to_json()
                    for name, found in figures(text.models[0], text.source).items()
                    if name in kept
                },
            }
            for text in evaluation.texts
        ],
    }


def _text(text: TextScores, evaluation: Evaluation) -> JsonObject:
    first = text.models[0]
    models: list[Json] = []
    for name, scores in zip(evaluation.models, text.models, strict=True):
        entry: JsonObject = {"model": name, **_json(figures(scores, text.source))}
        if scores is not first:
            entry["more_than_first"] = _json(differences(scores, first, text.source))
        models.append(entry)
    source = None if text.source is None else _json(figures(text.source, None))
    return {**_about(text), "source": source, "models": models}


def _about(text: TextScores) -> JsonObject:
    windows = text.windows
    return {
        "name": ", ".join(Path(part).name for part in windows.parts),
        "sha256": windows.sha256,
        "windows": len(windows),
        "predicted_tokens": len(windows) * (windows.length - 1),
    }


def _json(found: dict[str, Estimate]) -> JsonObject:
    return {name: value.to_json() for name, value in found.items()}


def _dtype(evaluation: Evaluation) -> str:
    return str(evaluation.dtype).removeprefix("torch.")
