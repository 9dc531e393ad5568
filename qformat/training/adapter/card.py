"""The card of an adapter: what it was trained on and how, in the form that the Hub reads."""

from __future__ import annotations

import math

from qformat import strict_json
from qformat.training.adapter.base_record import BaseRecord
from qformat.training.result import TrainingResult


def adapter_card(result: TrainingResult, base: BaseRecord) -> str:
    """Return README.md: front matter, losses, data and settings."""
    settings, counts = result.facts["settings"], result.facts["statistics"]
    assert isinstance(settings, dict)
    assert isinstance(counts, dict)
    # A JSON string is a YAML string.
    front = f"library_name: peft\nbase_model: {strict_json.dumps(base.name)}\ntags: [lora, qlora, nf4, qformat]\n"
    parts = [
        f"---\n{front}---",
        f"# LoRA adapter for {base.name}",
        f"Trained by qformat on 4-bit (NF4) weights, {result.steps} steps. Digest of the weights: `{base.digest}`.",
    ]
    if result.loss_before is not None and result.loss_after is not None:
        parts.append(
            "| held-out data | before | after |\n|---|---|---|\n"
            f"| loss (nats a token) | {result.loss_before:.4f} | {result.loss_after:.4f} |\n"
            f"| perplexity | {math.exp(result.loss_before):.3f} | {math.exp(result.loss_after):.3f} |"
        )
    parts.append(f"Data: {counts['examples']:,} examples, {counts['tokens']:,} tokens.")
    rows = [f"| {name} | {value} |" for name, value in settings.items()]
    parts.append("\n".join(["| setting | value |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"
