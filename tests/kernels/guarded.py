"""Tensors that end directly before an inaccessible page: a kernel in the interpreter that reads past them crashes."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap

import torch
from torch import Tensor

from qformat.kernels.packed_weight import PackedWeight

_regions: list[mmap.mmap] = []
"""Mapped regions, kept until the process ends because the tensors do not own them."""


def guarded(tensor: Tensor) -> Tensor:
    """Return a copy whose last byte lies directly before a page that cannot be read or written."""
    n_pages = -(-tensor.nbytes // mmap.PAGESIZE)
    region = mmap.mmap(-1, (n_pages + 1) * mmap.PAGESIZE)
    _regions.append(region)
    end = n_pages * mmap.PAGESIZE
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + end), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = torch.frombuffer(region, dtype=tensor.dtype, count=tensor.numel(), offset=end - tensor.nbytes)
    return copy.view(tensor.shape).copy_(tensor)


def guarded_weight(weight: PackedWeight) -> PackedWeight:
    """Return a copy of a weight with every component guarded."""
    parts = {
        name: guarded(part)
        for name in ("packed", "absmax", "nested_absmax", "nested_quant_map")
        if (part := getattr(weight, name)) is not None
    }
    return dataclasses.replace(weight, **parts)
