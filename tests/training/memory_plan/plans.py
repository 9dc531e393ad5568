"""Configurations of known model families, checkpoints without weights, and planners for them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from qformat.cli.default_conversion import as_converted
from qformat.training.memory_plan.loss import Loss
from qformat.training.memory_plan.plan import MemoryPlan, MemoryPlanner, plan_memory
from qformat.training.memory_plan.tensors import read_model_tensors
from qformat.training.settings import TrainingSettings
from tests.small_models import header_bytes

GIB = 2**30
# Settings that are the same in every size of a family.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"vocab_size": 32000}),
    "qwen3": ("Qwen3", {"vocab_size": 151936, "tie_word_embeddings": False}),
    "mistral": ("Mistral", {"vocab_size": 32768, "sliding_window": None}),
    "gemma3": ("Gemma3", {"vocab_size": 262144, "sliding_window": 512}),
}
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "num_key_value_heads": 2},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 8},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
}


def make_config(family: str, size: str, n_layers: int) -> Any:
    name, fixed = FAMILIES[family]
    numbers = {**fixed, **SIZES[size], "head_dim": SIZES[size]["hidden_size"] // SIZES[size]["num_attention_heads"]}
    config_class = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    config = config_class(**numbers, num_hidden_layers=n_layers, max_position_embeddings=4096, dtype="bfloat16")
    config.architectures = [f"{name}ForCausalLM"]
    return config


def state_of(config: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])._from_config(config, dtype=torch.bfloat16)
    state: dict[str, Tensor] = model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def write_headers(folder: Path, config: Any) -> Path:
    """Write a checkpoint whose weights are a hole in a sparse file."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    record: dict[str, object] = {}
    offset = 0
    for name, tensor in state_of(config).items():
        record[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    header = header_bytes(record)
    (folder / "model.safetensors").write_bytes(header)
    os.truncate(folder / "model.safetensors", len(header) + offset)
    return folder


def small_settings(**changes: Any) -> TrainingSettings:
    return TrainingSettings(**{"rank": 8, "batch_size": 1, "seq_len": 256, "grad_accum": 1, **changes})


def planner_of(tmp_path: Path, config: Any, **changes: Any) -> MemoryPlanner:
    tensors = read_model_tensors(write_headers(tmp_path / "m", config), conversion=as_converted)
    return MemoryPlanner(tensors, small_settings(**changes))


def planned(
    config: Any, folder: Path, rank: int, batch: int, seq_len: int, *, checkpointing: bool, loss: Loss = "logits"
) -> MemoryPlan:
    settings = TrainingSettings(
        rank=rank, batch_size=batch, seq_len=seq_len, gradient_checkpointing=checkpointing, grad_accum=1, optim="adamw"
    )
    return plan_memory(write_headers(folder, config), settings, conversion=as_converted, loss=loss)
