"""Writes the card of an adapter: its base model, data, settings and losses, in the form that the Hub expects."""

from __future__ import annotations

import math

from qformat import strict_json
from qformat.strict_json import Json
from qformat.training.adapter.base_record import BaseRecord
from qformat.training.result import TrainingResult


def adapter_card(result: TrainingResult, base: BaseRecord) -> str:
    """Return the content of README.md: front matter, losses, data and settings.

    Args:
        result: Result of the training.
        base: Identity of the base model.

    Returns:
        The card in Markdown.
    """
    settings, counts = result.facts["settings"], result.facts["statistics"]
    assert isinstance(settings, dict)
    assert isinstance(counts, dict)
    rank = settings["rank"]
    assert isinstance(rank, int)
    if settings["alpha"] is None:  # the default of `add_adapter`
        settings = {**settings, "alpha": 2 * rank}
    # Every JSON string is a valid YAML string.
    front = f"library_name: peft\nbase_model: {strict_json.dumps(base.name)}\ntags: [lora, qlora, nf4, qformat]\n"
    parts = [
        f"---\n{front}---",
        f"# LoRA adapter for {base.name}",
        f"Trained with qformat for {result.steps} steps on 4-bit (NF4) weights with the digest `{base.digest}`.",
    ]
    if result.loss_before is not None and result.loss_after is not None:
        parts.append(
            "| Held-out data | Before | After |\n|---|---|---|\n"
            f"| Loss (nats per token) | {result.loss_before:.4f} | {result.loss_after:.4f} |\n"
            f"| Perplexity | {math.exp(result.loss_before):.3f} | {math.exp(result.loss_after):.3f} |"
        )
    parts.append(f"Training data: {counts['examples']:,} examples, {counts['tokens']:,} tokens.")
    rows = [f"| {name} | {_shown(value)} |" for name, value in settings.items() if value is not None]
    parts.append("\n".join(["| Setting | Value |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _shown(value: Json) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
