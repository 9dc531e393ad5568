"""A small Llama with a tokenizer as an artifact, and the arguments of short, reproducible runs of trl's trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from qformat.converters.convert import convert
from tests.training.runs import VOCABULARY, small_tokenizer

N_STEPS = 3

BOUND = (2 * 7 + 1) * VOCABULARY * torch.finfo(torch.float32).eps
"""Largest relative difference of two losses in fp32 with the sums in another order: each of the 15 products of the
model has at most VOCABULARY summands, and each summand has one rounding in units of its size. SGD keeps it in the
weights linearly, with steps far below 1."""

EVERY_RUN: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "bf16": False,
    "use_cpu": True,
    "seed": 0,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
THREE_STEPS: dict[str, Any] = {
    **EVERY_RUN,
    "max_steps": N_STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.1,
    "optim": "sgd",
    "logging_steps": 1,
}


def small_artifact(folder: Path, model_class: Any, *, head_scale: float = 1.0, **changed: Any) -> Path:
    """Convert a random Llama of two layers, whose norms are 1. The source lies beside the artifact.

    Args:
        folder: Directory for both.
        model_class: Class of the model in transformers.
        head_scale: Factor for the weights of the output layer.
        changed: Fields of the config that differ.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(
        **sizes, num_hidden_layers=2, vocab_size=VOCABULARY, initializer_range=0.1, pad_token_id=2, **changed
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        if head_scale != 1:
            with torch.no_grad():
                model.lm_head.weight.mul_(head_scale)
        model.to(torch.bfloat16).save_pretrained(folder / "source")
    small_tokenizer().save_pretrained(folder / "source")
    convert(folder / "source", folder / "nf4")
    return folder / "nf4"


def losses_of(trainer: Any) -> list[float]:
    """Train, and return the loss of each step."""
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]
