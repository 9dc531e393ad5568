"""trl's trainers on a packed model have the losses of the decoded model, step by step, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qformat import load_model, load_tokenizer
from tests.clients.trainers.short_runs import BOUND, N_STEPS, THREE_STEPS, losses_of
from tests.training.runs import WORDS


def texts() -> list[dict[str, Any]]:
    return [{"text": " ".join(WORDS[n:] + WORDS[:n])} for n in range(8)]


def preferences() -> list[dict[str, Any]]:
    return [{"prompt": word, "chosen": f" {word} {word}", "rejected": " pages move"} for word in WORDS[:8]]


def judged() -> list[dict[str, Any]]:
    return [{"prompt": word, "completion": f" {word}", "label": n % 2 == 0} for n, word in enumerate(WORDS[:8])]


def trainer_classes(name: str) -> tuple[Any, Any]:
    import trl
    import trl.experimental.orpo

    module: Any = trl.experimental.orpo if name == "ORPO" else trl
    return getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")


def losses(name: str, model: Any, tokenizer: Any, rows: list[dict[str, Any]], folder: Path) -> list[float]:
    """Train adapters for N_STEPS and return the loss of each step."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model

    trainer_class, config_class = trainer_classes(name)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = config_class(output_dir=str(folder), max_length=64, **THREE_STEPS)
    trainer = trainer_class(
        model=adapted, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    return losses_of(trainer)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        pytest.param("SFT", texts),
        pytest.param("DPO", preferences),
        pytest.param("KTO", judged, marks=pytest.mark.slow),
        pytest.param("ORPO", preferences, marks=pytest.mark.slow),
    ],
)
def test_losses_are_those_of_the_decoded_model(
    name: str, rows: Callable[[], list[dict[str, Any]]], artifact: Path, decoded: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(artifact)
    ours = load_model(artifact, device="cpu", dtype=torch.float32)
    oracle = AutoModelForCausalLM.from_pretrained(decoded, dtype=torch.float32)
    # trl casts the adapters of a model that says that it was loaded in 4 bit. The oracle must be treated alike.
    oracle.is_loaded_in_4bit = getattr(ours, "is_loaded_in_4bit", False)
    found, expected = (
        losses(name, model, tokenizer, rows(), tmp_path / side) for side, model in (("ours", ours), ("decoded", oracle))
    )
    assert len(found) == N_STEPS
    assert torch.tensor(found) == pytest.approx(torch.tensor(expected), rel=BOUND)
    # It would not hold if the adapters were not trained: the losses change by more than the bound.
    assert max(expected) - min(expected) > 2 * BOUND * max(expected)
