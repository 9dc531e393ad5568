"""A micro-batch that ran out of memory, once more with the optimizer states paged out."""

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
    """Run the forward and backward pass of a micro-batch; when memory runs out, page the states out and run it again.

    Before the second run, gradients and the states of torch's random generators are what they were before the first:
    gradients accumulated so far are counted once, and dropout draws the same. To that end accumulated gradients are
    copied to host memory first; parameters without a gradient cost nothing. Buffers that a model updates in its forward
    pass (batch norm) are not restored.

    Raises DeviceMemoryError if memory runs out again; gradients and generators are as before then, too.
    """
    before = _Before(optimizer)
    try:
        return micro_batch()
    except torch.OutOfMemoryError as error:
        # No more than this here: until the handler ends, the traceback keeps the activations of the failed run alive.
        reason = str(error)
    logger.warning("a micro-batch ran out of memory; it runs again with the optimizer states paged out: %s", reason)
    before.restore()
    optimizer.page_out()
    optimizer.page_device.empty_cache()
    try:
        return micro_batch()
    except torch.OutOfMemoryError as error:
        before.restore()
        paged = optimizer.paging_statistics()
        raise DeviceMemoryError(
            f"a micro-batch ran out of device memory, and again with all {paged.pages * paged.page_nbytes} bytes of "
            "optimizer states in host memory. Lower the batch size or the sequence length, or switch gradient "
            f"checkpointing on. A lower page budget would not help, since no page was on the device: {error}"
        ) from error


class _Before:
    """Gradients and random states at one moment."""

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
        """Bring them back; a gradient into the very tensor that it was in."""
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
