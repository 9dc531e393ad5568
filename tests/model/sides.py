"""Two models of one artifact: from `load_model` and from transformers + bitsandbytes, with LoRA on either."""

from __future__ import annotations

import logging
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from qformat.kernels.cpu_features import compute_dtype
from qformat.model.load import load_model
from qformat.model.nf4_linear import NF4Linear

SAME_PRODUCTS = compute_dtype(torch.bfloat16) is torch.bfloat16
"""Whether both sides multiply in bf16 on this CPU. Without instructions for it, qformat multiplies in fp32 instead."""


def load_ours(artifact: Path) -> Any:
    return load_model(artifact, device="cpu")


def load_exact(artifact: Path) -> Any:
    """Load the same weights with everything computed in float32, the exact result for both sides."""
    return load_model(artifact, device="cpu", dtype=torch.float32)


def load_peer(artifact: Path, *, repacks: bool = False) -> Any:
    """Load with transformers + bitsandbytes.

    Unless `repacks`, bitsandbytes must not rewrite its weights for inference, which rounds the scales to bf16.
    """
    import bitsandbytes
    from transformers import AutoModelForCausalLM

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(artifact)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and not repacks:
            module.support_avx512bf16_for_cpu = False
    return model


def with_lora(model: Any, *, seed: int = 0) -> Any:
    """Wrap all linear layers with fp32 adapters drawn from a seed, the same values for both sides.

    PEFT itself draws a different number of values for each kind of layer.
    """
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")).train()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in adapters(wrapped).items():
        if "lora_A" in name:
            torch.nn.init.kaiming_uniform_(weight, a=5**0.5, generator=generator)
    return wrapped


def with_peers_rounding(model: Any) -> Any:
    """Let PEFT's wrappers of NF4Linear round the adapter's output before adding, as its bitsandbytes wrapper does.

    PEFT's plain wrapper adds in fp32 and rounds the sum, so equal adapters give different activations.
    """
    from peft.tuners.lora.bnb import Linear4bit

    for module in model.modules():
        if isinstance(getattr(module, "base_layer", None), NF4Linear):
            module.forward = MethodType(Linear4bit.forward, module)
    return model


def train(model: Any, batches: list[Tensor], *, rate: float) -> list[float]:
    """Take one AdamW step per batch. Return the loss before each step."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=rate)
    losses = []
    for ids in batches:
        losses.append(backward(model, ids))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def backward(model: Any, ids: Tensor) -> float:
    loss = model(ids, labels=ids).loss
    loss.backward()
    return float(loss.detach())


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def adapters(model: Any) -> dict[str, Tensor]:
    """Return views of the trainable weights, under names that both sides share."""
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def all_equal(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return tensors.keys() == others.keys() and all(
        torch.equal(tensor, others[name]) for name, tensor in tensors.items()
    )
