"""Creates optimizers by the names that the command line and transformers use."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch.optim.optimizer import ParamsT

from qformat.errors import UsageError
from qformat.training.optimizer.page_store import Budget
from qformat.training.optimizer.paged_adamw import PagedAdamW

OptimizerName = Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw"]


def make_optimizer(
    name: OptimizerName,
    params: ParamsT,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    page_budget: Budget = "auto",
) -> torch.optim.Optimizer:
    """Return an optimizer. `paged_adamw_32bit` is bit-identical to `adamw`, torch's fused AdamW.

    Args:
        name: Name of the optimizer.
        params: Parameters or parameter groups to train.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Number added to the denominator.
        weight_decay: Decoupled weight decay.
        page_budget: Device memory for optimizer states in bytes, or "auto". `adamw` accepts only "auto".

    Returns:
        The optimizer.

    Raises:
        UsageError: The name is unknown, or the arguments do not fit the optimizer.
    """
    if name == "adamw":
        if page_budget != "auto":
            raise UsageError("page_budget cannot be used with 'adamw', which keeps all states on the device")
        return torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
    if name == "paged_adamw_32bit":
        return PagedAdamW(params, lr, betas, eps, weight_decay, state_bits=32, page_budget=page_budget)
    if name == "paged_adamw_8bit":
        return PagedAdamW(params, lr, betas, eps, weight_decay, state_bits=8, page_budget=page_budget)
    raise UsageError(f"unknown optimizer {name!r}, expected one of {', '.join(get_args(OptimizerName))}")
