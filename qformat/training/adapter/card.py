"""Writes the card of an adapter: its base model, data, settings and losses, in the form that the Hub expects."""

from __future__ import annotations

import math

from qformat.markdown import escaped, front_matter, printable, table
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
    tags = ["lora", "qlora", "nf4", "qformat"]
    parts = [
        front_matter({"library_name": "peft", "base_model": printable(base.name), "tags": tags}),
        f"# LoRA adapter for {escaped(base.name)}",
        f"Trained with qformat for {result.steps} steps on 4-bit (NF4) weights with the digest `{base.digest}`.",
    ]
    if result.loss_before is not None and result.loss_after is not None:
        parts.append(
            table(
                ("Held-out data", "Before", "After"),
                [
                    ("Loss (nats per token)", f"{result.loss_before:.4f}", f"{result.loss_after:.4f}"),
                    ("Perplexity", f"{math.exp(result.loss_before):.3f}", f"{math.exp(result.loss_after):.3f}"),
                ],
            )
        )
    parts.append(f"Training data: {counts['examples']:,} examples, {counts['tokens']:,} tokens.")
    rows = [(escaped(name), escaped(_shown(value))) for name, value in settings.items() if value is not None]
    parts.append(table(("Setting", "Value"), rows))
    return "\n\n".join(parts) + "\n"


def _shown(value: Json) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
