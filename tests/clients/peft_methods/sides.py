"""One method of PEFT around two models: packed weights, and the same weights decoded to float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import qformat
from qformat.model.nf4_linear import NF4Linear
from tests.clients.peft_methods.methods import Method
from tests.rounding import sum_error

IDS = torch.tensor([[5, 9, 3, 4, 7, 2, 8, 1, 30, 6, 11, 4], [7, 7, 3, 4, 1, 0, 22, 41, 40, 3, 4, 2]])
"""Two rows; both contain the tokens 3 and 4, after which aLoRA begins."""

LONGEST_SUM = 96
"""Terms of the longest sum, that of the MLP's second product."""

FORWARD_SUMS = 2 * 9 + 2
"""Sums in a row: two layers with two norms, four products, the gate, scores, softmax and values; a norm, the head."""

FORWARD = FORWARD_SUMS * sum_error(LONGEST_SUM)
"""Largest difference of an output relative to the largest output, 2.3e-4. Both sides add the same terms, in another
order at most, and each sum in the row adds an error of `sum_error`."""

BACKWARD = 3 * FORWARD
"""Largest difference of a gradient relative to the largest entry: each forward sum has two in the backward pass."""

BF16_NORM = 2 * 2.0**-9
"""Relative error of an output whose rows are scaled by norms of weights rounded to bf16, in each of two layers."""


@dataclass(frozen=True, slots=True)
class Ran:
    """Logits of a forward pass, and the gradients of the weights that are trained, in training mode."""

    logits: Tensor
    gradients: dict[str, Tensor]


def packed(artifact: Path) -> Any:
    return qformat.load_model(artifact, device="cpu", dtype=torch.float32)


def decoded(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def wrap(model: Any, method: Method) -> Any:
    """Wrap a model with a method of PEFT, and move the trained weights away from their start, where many are zero.

    The same random values are drawn for either side.
    """
    import peft

    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, method.config())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, weight in sorted(wrapped.named_parameters()):
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator) * method.noise)
    return wrapped


def copy_start(ours: Any, theirs: Any) -> None:
    """Give the decoded model the weights and the trained tensors of the packed one."""
    with torch.no_grad():
        for name, layer in ours.named_modules():
            if isinstance(layer, NF4Linear):
                theirs.get_submodule(name).weight.copy_(layer.dequantize(torch.float32))
        trained = dict(theirs.named_parameters())
        for name, weight in ours.named_parameters():
            if weight.requires_grad:
                trained[name].copy_(weight)


def run(model: Any, method: Method) -> Ran:
    torch.manual_seed(0)  # some methods draw noise while they train
    model.train().zero_grad()
    out = model(input_ids=IDS, labels=IDS, **arguments(method))
    out.loss.backward()
    named = model.named_parameters()
    gradients = {name: weight.grad for name, weight in named if weight.requires_grad and weight.grad is not None}
    return Ran(out.logits.detach(), gradients)


def evaluate(model: Any, method: Method) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=IDS, **arguments(method)).logits
    return logits[:, -IDS.shape[1] :]  # without the virtual tokens


def arguments(method: Method) -> dict[str, Tensor]:
    return {name: torch.zeros(len(IDS), dtype=torch.long) for name in method.call}


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected magnitude; 0 if both are zero."""
    apart = (found - expected).abs().max()
    return float(apart / expected.abs().max()) if apart else 0.0
