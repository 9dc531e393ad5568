"""transformers' Trainer: training, evaluation and resumption, with PEFT and without.

What it saves is tested in `tests/model/test_saving_into_folders.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import qformat
from qformat import load_model
from tests.clients.peft_methods.sides import FORWARD, decoded, packed

ROWS = [{"input_ids": list(range(i, i + 12)), "labels": list(range(i, i + 12))} for i in range(3, 11)]
N_STEPS = 4

pytestmark = pytest.mark.usefixtures("registered")


def by_from_pretrained(artifact: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def trainer(model: Any, out: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=N_STEPS, per_device_train_batch_size=2, logging_steps=1,
        save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        **{"learning_rate": 1e-2} | options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS)


def losses(trainer: Trainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@pytest.mark.parametrize("load", [packed, pytest.param(by_from_pretrained, marks=pytest.mark.slow)])
def test_a_resumed_training_of_an_adapter_has_the_losses_of_an_unbroken_one(
    load: Callable[[Path], Any], tiny_llama: Path, tmp_path: Path
) -> None:
    whole = trainer(with_lora(load(tiny_llama)), tmp_path / "out")
    whole.train()
    resumed = trainer(with_lora(load(tiny_llama)), tmp_path / "out")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert losses(whole)[-1] < losses(whole)[0]
    assert qformat.verify(tiny_llama, sha256=True).passed, "a training does not change the artifact"


@pytest.mark.slow
def test_a_resumed_training_of_the_norms_has_the_losses_of_an_unbroken_one(tiny_llama: Path, tmp_path: Path) -> None:
    whole = trainer(load_model(tiny_llama, device="cpu"), tmp_path / "out")
    whole.train()
    resumed = trainer(load_model(tiny_llama, device="cpu"), tmp_path / "out")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert losses(whole)[-1] < losses(whole)[0]


def test_the_quantizer_is_refused_without_an_adapter_as_that_of_bitsandbytes_is(
    tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="purely quantized models"):
        trainer(by_from_pretrained(tiny_llama), tmp_path)


def test_an_evaluation_has_the_loss_of_the_decoded_model(tiny_llama: Path, decoded_llama: Path, tmp_path: Path) -> None:
    found, expected = (
        trainer(model, tmp_path / "out").evaluate()["eval_loss"]
        for model in (packed(tiny_llama), decoded(decoded_llama))
    )
    assert abs(found - expected) < FORWARD * expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
        {"optim": "adafactor"},
        {"optim": "sgd", "learning_rate": 1.0},
        {"neftune_noise_alpha": 5.0},
        {"auto_find_batch_size": True},
        {"dataloader_num_workers": 1},
        {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_adapter_learns_with_each_option(options: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    made = trainer(with_lora(packed(tiny_llama)), tmp_path, **options)
    before = made.evaluate()["eval_loss"]
    made.train()
    assert made.evaluate()["eval_loss"] < before
