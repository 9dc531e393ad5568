"""Converts the states of one parameter to and from the tensors of a state_dict, page by page."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qformat.errors import UsageError
from qformat.training.optimizer.adamw_updates import in_memory_order
from qformat.training.optimizer.block_states import absmax_of, codes_of
from qformat.training.optimizer.dynamic_map import dynamic_values
from qformat.training.optimizer.page_layout import BLOCK_NBYTES, BLOCK_SIZE, Span
from qformat.training.optimizer.page_store import PageStore
from qformat.training.optimizer.state_formats import FloatStates, StateFormat

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of rows 0 and 1 of a page, the same as in torch."""


def read_states(store: PageStore, param: Tensor, state_format: StateFormat, span: Span) -> dict[str, Tensor]:
    """Return a copy of a parameter's states in host memory.

    Args:
        store: Store that holds the pages.
        param: The parameter.
        state_format: Storage format of its moments.
        span: Position of its moments in the address space.

    Returns:
        The tensors of the states by name.
    """
    states = {}
    for row, name in enumerate(MOMENTS):
        if isinstance(state_format, FloatStates):
            states[name] = torch.empty_like(param, device="cpu", dtype=state_format.dtype, requires_grad=False)
            store.read(row, span.start, in_memory_order(states[name]).view(torch.uint8))
            continue
        blocks = torch.empty(span.n_units, BLOCK_NBYTES, dtype=torch.uint8)
        store.read(row, span.start, blocks.view(-1))
        codes = torch.empty_like(param, device="cpu", dtype=torch.uint8, requires_grad=False)
        in_memory_order(codes).copy_(codes_of(blocks).reshape(-1)[: span.size])
        states[f"{name}_codes"] = codes
        states[f"{name}_absmax"] = absmax_of(blocks).flatten().clone()
    return states


def write_states(
    store: PageStore, param: Tensor, state_format: StateFormat, span: Span, states: dict[str, Tensor]
) -> None:
    """Write a parameter's states to pages that are not resident.

    Args:
        store: Store that holds the pages.
        param: The parameter.
        state_format: Storage format of its moments.
        span: Position of its moments in the address space.
        states: Tensors of the states by name, which passed `check_saved`.
    """
    for row, name in enumerate(MOMENTS):
        if isinstance(state_format, FloatStates):
            values = torch.empty_like(param, device="cpu", dtype=state_format.dtype, requires_grad=False)
            values.copy_(states[name])
            store.write(row, span.start, in_memory_order(values).view(torch.uint8))
            continue
        ordered = torch.empty_like(param, device="cpu", dtype=torch.uint8, requires_grad=False)
        ordered.copy_(states[f"{name}_codes"])
        code_of_zero = int((dynamic_values(signed=name == "exp_avg") == 0).nonzero())
        codes = torch.full((span.n_units * BLOCK_SIZE,), code_of_zero, dtype=torch.uint8)
        codes[: span.size] = in_memory_order(ordered)
        blocks = torch.empty(span.n_units, BLOCK_NBYTES, dtype=torch.uint8)
        codes_of(blocks).copy_(codes.view(-1, BLOCK_SIZE))
        absmax_of(blocks).copy_(states[f"{name}_absmax"].view(-1, 1))
        store.write(row, span.start, blocks.view(-1))


def check_saved(states: dict[str, Any], number: int, param: Tensor, state_format: StateFormat) -> None:
    """Check that saved states fit a parameter.

    Args:
        states: Saved tensors by name.
        number: Number of the parameter, for messages.
        param: The parameter.
        state_format: Storage format of its moments.

    Raises:
        UsageError: The names, shapes or dtypes do not fit.
    """
    shape = tuple(param.shape)
    if isinstance(state_format, FloatStates):
        expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = dict.fromkeys(MOMENTS, (shape, None))
    else:
        n_blocks = -(-param.numel() // BLOCK_SIZE)
        expected = {f"{name}_codes": (shape, torch.uint8) for name in MOMENTS}
        expected |= {f"{name}_absmax": ((n_blocks,), torch.float32) for name in MOMENTS}
    names = {"step", *expected}
    if set(states) != names:
        raise UsageError(
            f"parameter {number}, shape {shape}: the saved states do not fit (found {', '.join(sorted(states))}, "
            f"expected {', '.join(sorted(names))}). Load 8-bit states into an optimizer with state_bits=8, and 32-bit "
            "states into one with state_bits=32"
        )
    for name, (expected_shape, dtype) in expected.items():
        found = states[name]
        if tuple(found.shape) != expected_shape or dtype not in (None, found.dtype):
            raise UsageError(
                f"parameter {number}: the saved state {name} does not fit (found {found.dtype} {tuple(found.shape)}, "
                f"expected {dtype or 'floats'} {expected_shape})"
            )
