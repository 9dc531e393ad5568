"""What the Triton kernels need before a launch: is Triton there, and do the tensors fit."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from qformat.errors import UsageError

ALIGNMENT_NBYTES = 16
"""What the compiled kernels assume of pointers, and `tools/gpu/sass_budget.py` compiles them with."""


@functools.cache
def triton_unavailable() -> str | None:
    """Return why the Triton kernels cannot be imported, or None. Asks for no GPU and no driver."""
    try:
        import triton.language  # noqa: F401
    except ImportError as error:
        return f"triton is not installed: pip install triton ({error})"
    return None


def interpreting() -> bool:
    """Return whether Triton runs kernels in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def check_tensors(device: torch.device, **tensors: Tensor) -> None:
    """Raise UsageError unless all tensors are contiguous on `device`, and that is one where Triton runs."""
    if device.type != "cuda" and not interpreting():
        raise UsageError(f"the Triton kernels need a CUDA device: the weight is on {device}")
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise UsageError(f"{name}: on {tensor.device}, but the weight is on {device}")
        if not tensor.is_contiguous():
            raise UsageError(f"{name}: not contiguous (shape {list(tensor.shape)}, strides {list(tensor.stride())})")


def is_aligned(tensor: Tensor) -> bool:
    """Return whether a tensor's data begins at a multiple of 16 bytes."""
    return tensor.data_ptr() % ALIGNMENT_NBYTES == 0


def check_aligned(**tensors: Tensor) -> None:
    """Raise UsageError unless each tensor's data begins at a multiple of 16 bytes."""
    for name, tensor in tensors.items():
        if not is_aligned(tensor):
            raise UsageError(f"{name}: begins at {tensor.data_ptr():#x}, not 16-byte aligned. Clone it first")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a CUDA device has; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which Triton launches on `device`: it takes the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
