"""Optimizers by the names that the command line and transformers use."""

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
    """Return an optimizer by name: `paged_adamw_32bit` gives the bits of `adamw`, torch's fused AdamW.

    `page_budget` is that of PagedAdamW; `adamw` has no pages, and takes none. Raises UsageError.
    """
    if name == "adamw":
        if page_budget != "auto":
            raise UsageError("a page budget was given for 'adamw', which keeps its states on the device")
        return torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
    if name == "paged_adamw_32bit":
        return PagedAdamW(params, lr, betas, eps, weight_decay, state_bits=32, page_budget=page_budget)
    if name == "paged_adamw_8bit":
        return PagedAdamW(params, lr, betas, eps, weight_decay, state_bits=8, page_budget=page_budget)
    raise UsageError(f"there is no optimizer {name!r}; there are {', '.join(get_args(OptimizerName))}")
