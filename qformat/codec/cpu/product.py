"""The product of a few rows with a packed weight on the CPU: typed, checked entrance to `product_kernels`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from qformat.codec.codebooks import DYNAMIC_MAP
from qformat.codec.cpu import lanes
from qformat.codec.cpu.product_kernels import Job, product_function
from qformat.codec.cpu.product_rows import GROUP, NEEDED_FEATURES, ProductInstructions
from qformat.codec.floats import FloatFormat, Raw, widen
from qformat.codec.nested import NESTED_BLOCK_SIZE
from qformat.codec.nf4 import BLOCK_SIZES, block_count
from qformat.errors import UsageError

SMALLEST_SHARE = 1 << 17
"""Weights that a thread takes at a time: 8 us of work."""

Team = Callable[[int, int, int], bool]
"""team(function, data, n_threads): calls the C function void(void*) at an address on the data at another, once in each
of n threads, and waits for them; or returns False, having called nothing."""

_C_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_NO_FLOATS = np.zeros(0, np.float32)


def unsupported(columns: int, block_size: int, float_format: FloatFormat) -> str | None:
    """Return why there is no product for weights with so many columns on this CPU, or None if there is one."""
    if best_instructions(float_format) is None:
        return "this CPU has neither AVX2 nor AVX-512"
    if columns == 0 or columns % GROUP or columns % block_size:
        return f"K = {columns} is no multiple of {max(GROUP, block_size)}"
    return None


@cache
def best_instructions(float_format: FloatFormat) -> ProductInstructions | None:
    """Return the fastest instructions that this CPU has for weights in a format."""
    return next((name for name in get_args(ProductInstructions) if _missing(name, float_format) is None), None)


class Product:
    """A packed weight W [N, K] made ready for products with few rows, its arrays checked once.

    The arrays are those of `cpu.decode_into` and `cpu.decode_nested_into`, nested_absmax None without the second level.
    W is, bit for bit, what they decode to in `float_format`; but instructions "bf16" take subnormal numbers for zero.

    Raises UsageError for arrays that do not fit together, a K that is no multiple of the block and of 64, or
    instructions that this CPU lacks.
    """

    def __init__(
        self,
        packed: NDArray[np.uint8],
        absmax: NDArray[Any],
        nested_absmax: NDArray[np.float32] | None,
        nested_offset: float,
        *,
        shape: tuple[int, int],
        block_size: int,
        float_format: FloatFormat,
        nested_quant_map: NDArray[np.float32] = DYNAMIC_MAP,
        instructions: ProductInstructions | None = None,
    ) -> None:
        self._check_weight(packed, absmax, nested_absmax, nested_quant_map, shape, block_size)
        name = instructions or best_instructions(float_format)
        if name is None or (reason := _missing(name, float_format)) is not None:
            raise UsageError(f"instructions {name!r}: {'this CPU has none' if name is None else reason}")
        self.shape = shape
        self.float_format = float_format
        self.instructions = name
        self._function = product_function(name, float_format, double_quant=nested_absmax is not None)
        self._address = int(self._function.address)
        self._call = _C_FUNCTION(self._address)
        self._n_shares = max(1, shape[0] * shape[1] // SMALLEST_SHARE)
        nested = _NO_FLOATS if nested_absmax is None else nested_absmax
        self._arrays = (packed, absmax, nested, nested_quant_map)  # the job has only their addresses
        self._job = bytes(
            Job(
                n_shares=self._n_shares,
                packed=packed.ctypes.data,
                absmax=absmax.ctypes.data,
                nested_absmax=nested.ctypes.data,
                nested_quant_map=nested_quant_map.ctypes.data,
                n_rows=shape[0],
                n_columns=shape[1],
                block_size=block_size,
                offset=float(np.float32(nested_offset)),
            )
        )

    def __call__(self, x: Raw, out: Raw, *, team: Team | None = None, n_threads: int = 1) -> None:
        """Write x [M * K] times W's transpose into `out` [M * N], both raw elements of the float format.

        Sums are float32, in an order that depends on K only, and rounded once: the same bits for any number of threads.
        team: what runs the work in n_threads threads, where there is enough of it.
        Raises UsageError for arrays of another dtype or size.
        """
        n, k = self.shape
        dtype = self.float_format.raw_dtype
        if x.dtype != dtype or x.ndim != 1 or x.size % k or not x.flags.c_contiguous:
            raise UsageError(f"x: {x.dtype} {list(x.shape)}, expected contiguous {dtype} [M * {k}]")
        if out.dtype != dtype or out.shape != (x.size // k * n,) or not out.flags.c_contiguous:
            raise UsageError(f"out: {out.dtype} {list(out.shape)}, expected contiguous {dtype} [{x.size // k * n}]")
        values = x if self.instructions == "bf16" else widen(x, self.float_format)
        self.at(values.ctypes.data, x.size, out.ctypes.data, team=team, n_threads=n_threads)

    def at(self, x: int, x_size: int, out: int, *, team: Team | None = None, n_threads: int = 1) -> None:
        """`__call__` on addresses, unchecked: x_size values at `x`, bf16 for instructions "bf16", else float32."""
        job = Job.from_buffer_copy(self._job)
        job.x, job.x_size, job.out = x, x_size, out
        address = ctypes.addressof(job)
        if team is None or self._n_shares == 1 or not team(self._address, address, min(n_threads, self._n_shares)):
            self._call(address)

    @staticmethod
    def _check_weight(
        packed: NDArray[np.uint8],
        absmax: NDArray[Any],
        nested_absmax: NDArray[np.float32] | None,
        nested_quant_map: NDArray[np.float32],
        shape: tuple[int, int],
        block_size: int,
    ) -> None:
        """Refuse what the kernels would misread: they trust dtypes, sizes and contiguity."""
        n, k = shape
        if block_size not in BLOCK_SIZES or k % GROUP or k % block_size or min(n, k) <= 0:
            raise UsageError(f"{n} x {k} weights: K must be a multiple of the block, {block_size}, and of {GROUP}")
        n_blocks = n * k // block_size
        expected: list[tuple[str, NDArray[Any], Any, int]] = [
            ("packed", packed, np.uint8, n * k // 2),
            ("absmax", absmax, np.float32 if nested_absmax is None else np.uint8, n_blocks),
        ]
        if nested_absmax is not None:
            expected += [
                ("nested_absmax", nested_absmax, np.float32, block_count(n_blocks, NESTED_BLOCK_SIZE)),
                ("nested_quant_map", nested_quant_map, np.float32, DYNAMIC_MAP.size),
            ]
        for name, array, dtype, size in expected:
            if array.dtype != dtype or array.shape != (size,) or not array.flags.c_contiguous:
                found = f"{array.dtype} {list(array.shape)}"
                raise UsageError(f"{name}: {found}, expected contiguous {np.dtype(dtype)} [{size}]")


def _missing(name: ProductInstructions, float_format: FloatFormat) -> str | None:
    if name not in NEEDED_FEATURES:
        return f"must be one of {', '.join(NEEDED_FEATURES)}"
    if name == "bf16" and float_format is not FloatFormat.BF16:
        return f"they multiply bfloat16, not {float_format.torch_name}"
    missing = NEEDED_FEATURES[name] - lanes.cpu_features()
    return f"this CPU lacks {', '.join(sorted(missing))}" if missing else None
