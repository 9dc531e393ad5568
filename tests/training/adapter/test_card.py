"""The card of an adapter shows the names of directories and settings as text, whatever they contain."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from qformat.training.adapter.base_record import BaseRecord
from qformat.training.adapter.card import adapter_card
from qformat.training.result import TrainingResult

SETTINGS = {"rank": 4, "alpha": None, "target_modules": ["q_proj", "<b>v</b>|"], "rslora": False}


@pytest.mark.parametrize(
    "name",
    [
        "<img src=x onerror=alert(1)>",
        "model\n---\n# heading",
        "[click](javascript:alert(1))",
        '"quoted": yes\x85\u2028',
        "a | b",
        "not UTF-8 \udcff",
        "plain_name-4bit",
    ],
)
def test_a_hostile_name_of_the_base_stays_text(name: str) -> None:
    metrics = [{"when": when, "eval_loss": loss} for when, loss in (("before", 2.0), ("after", 1.0))]
    facts = {"settings": SETTINGS, "statistics": {"examples": 10, "tokens": 100}}
    result = TrainingResult(Path("out"), 3, metrics, facts)  # type: ignore[arg-type]
    card = adapter_card(result, BaseRecord("tensors-xxh3:00", name))
    card.encode("utf-8")
    assert "<img" not in card
    assert "\n# heading" not in card
    assert "](javascript" not in card
    assert "| target_modules | q_proj, &lt;b&gt;v&lt;/b&gt;\\| |\n" in card
    assert "| Loss (nats per token) | 2.0000 | 1.0000 |" in card
    data = huggingface_hub.ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    assert data["library_name"] == "peft"
    assert data["tags"] == ["lora", "qlora", "nf4", "qformat"]
    if name == "plain_name-4bit":
        assert data["base_model"] == name
        assert "# LoRA adapter for plain_name-4bit\n" in card
