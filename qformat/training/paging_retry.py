"""Runs a micro-batch again, with the optimizer states paged out, after it ran out of memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from qformat.errors import DeviceMemoryError
from qformat.training.optimizer.paged_adamw import PagedAdamW

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def run_with_paging_retry(optimizer: PagedAdamW, micro_batch: Callable[[], Result]) -> Result:
    """Run a micro-batch. If memory runs out, page the optimizer states out and run it again.

    The second run starts with the gradients and random generator states from before the first run. Gradients
    accumulated so far are therefore counted once, and dropout draws the same values. For this, accumulated gradients
    are copied to host memory before the first run; parameters without a gradient cost nothing. Buffers that a model
    updates in its forward pass (batch norm) are not restored.

    Args:
        optimizer: Optimizer whose states are paged out.
        micro_batch: Runs the forward and backward pass.

    Returns:
        The result of `micro_batch`.

    Raises:
        DeviceMemoryError: Memory ran out again. Gradients and generator states are restored first.
    """
    before = _Before(optimizer)
    try:
        return micro_batch()
    except torch.OutOfMemoryError as error:
        # Retry after this handler: until it ends, the traceback keeps the activations of the failed run alive.
        reason = str(error)
    logger.warning("a micro-batch ran out of memory; retrying with the optimizer states paged out: %s", reason)
    before.restore()
    optimizer.page_out()
    optimizer.page_device.empty_cache()
    try:
        return micro_batch()
    except torch.OutOfMemoryError as error:
        before.restore()
        paged = optimizer.paging_statistics()
        raise DeviceMemoryError(
            f"a micro-batch ran out of device memory even with all {paged.pages * paged.page_nbytes:,} bytes of "
            "optimizer states in host memory. Lower the batch size or the sequence length, or turn on gradient "
            f"checkpointing. A lower page budget would not help, because no page was on the device: {error}"
        ) from error


class _Before:
    """A snapshot of the gradients and the random generator states."""

    def __init__(self, optimizer: PagedAdamW) -> None:
        self._params = [param for group in optimizer.param_groups for param in group["params"]]
        self._grads: list[tuple[Tensor, Tensor] | None] = [
            None if param.grad is None else (param.grad, param.grad.to("cpu", copy=True)) for param in self._params
        ]
        self._cpu_state = torch.get_rng_state()
        self._cuda_states = {
            device: torch.cuda.get_rng_state(device)
            for device in {param.device for param in self._params}
            if device.type == "cuda"
        }

    def restore(self) -> None:
        """Restore the snapshot. Each gradient returns to the tensor that held it."""
        for param, grad in zip(self._params, self._grads, strict=True):
            param.grad = None
            if grad is not None:
                tensor, values = grad
                with torch.no_grad():
                    tensor.copy_(values)
                param.grad = tensor
        torch.set_rng_state(self._cpu_state)
        for device, state in self._cuda_states.items():
            torch.cuda.set_rng_state(state, device)
