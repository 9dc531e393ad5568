"""Checks before a Triton kernel is launched: whether Triton is installed and whether the tensors fit."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from qformat.errors import UsageError

ALIGNMENT_NBYTES = 16
"""Alignment of pointers that the compiled kernels assume; `tools/gpu/sass_budget.py` compiles them with the same."""


@functools.cache
def triton_unavailable() -> str | None:
    """Return why the Triton kernels cannot be imported, or None if they can. Needs neither a GPU nor a driver."""
    try:
        import triton.language  # noqa: F401
    except ImportError as error:
        return f"triton is not installed ({error}). Run pip install triton"
    return None


def interpreting() -> bool:
    """Return whether Triton interprets kernels on CPU tensors (TRITON_INTERPRET=1)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def check_tensors(device: torch.device, **tensors: Tensor) -> None:
    """Check that Triton runs on a device and that all tensors are contiguous there.

    Args:
        device: Device of the weight.
        **tensors: Tensors by the names that messages use.

    Raises:
        UsageError: Triton does not run on the device, or a tensor is on another device or is not contiguous.
    """
    if device.type != "cuda" and not interpreting():
        raise UsageError(f"the Triton kernels need a CUDA device, but the weight is on {device}")
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise UsageError(f"{name}: is on {tensor.device}, but the weight is on {device}")
        if not tensor.is_contiguous():
            raise UsageError(f"{name}: is not contiguous (shape {list(tensor.shape)}, strides {list(tensor.stride())})")


def is_aligned(tensor: Tensor) -> bool:
    """Return whether the address of a tensor's data is a multiple of 16 bytes."""
    return tensor.data_ptr() % ALIGNMENT_NBYTES == 0


def check_aligned(**tensors: Tensor) -> None:
    """Check that the address of each tensor's data is a multiple of 16 bytes.

    Args:
        **tensors: Tensors by the names that messages use.

    Raises:
        UsageError: A tensor is not aligned.
    """
    for name, tensor in tensors.items():
        if not is_aligned(tensor):
            raise UsageError(f"{name}: address {tensor.data_ptr():#x} is not a multiple of 16. Clone the tensor first")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a CUDA device, or 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which `device` is the current CUDA device, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
