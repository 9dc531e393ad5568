"""Products of a few rows with a packed weight on the CPU: functions that check their arrays and call the kernels.

    x [M, K]             W [N, K], packed                         out [M, N]

    +-----------+        +------+------+------+------+            +-----------+
    | row m     |   x    | s0   | s1   | ...         |  row n  =  | [m, n]    |
    +-----------+        +------+------+------+------+            +-----------+
                           blocks of a row, one scale each

    out[m, n] = sum over k of x[m, k] * codebook[code[n, k]] * scale of the block of [n, k]

K is a multiple of the block size, so that no block extends over two rows. Threads share the rows of W. The arrays of W
are described in `qformat.codec.cpu.blocks`, the order of the work inside a row in `product_rows`.
"""

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
"""Number of weights that a thread processes at a time: 8 us of work."""

Team = Callable[[int, int, int], bool]
"""Function team(function, data, n_threads) that calls a C function void(void*), given by its address, on the data at
another address, once in each of n threads, and waits for them. It returns False if it did not call the function."""

_C_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_NO_FLOATS = np.zeros(0, np.float32)


def unsupported(columns: int, block_size: int, float_format: FloatFormat) -> str | None:
    """Return why this CPU cannot multiply with a weight, or None if it can.

    Args:
        columns: Number of columns of the weight (K).
        block_size: Number of elements per block.
        float_format: Float format of the weight.
    """
    if best_instructions(float_format) is None:
        return "this CPU has neither AVX2 nor AVX-512"
    if columns == 0 or columns % GROUP or columns % block_size:
        return f"K = {columns} is not a multiple of {max(GROUP, block_size)}"
    return None


@cache
def best_instructions(float_format: FloatFormat) -> ProductInstructions | None:
    """Return the fastest instructions of this CPU for weights in a float format, None if it has none."""
    return next((name for name in get_args(ProductInstructions) if _missing(name, float_format) is None), None)


class Product:
    """Packed weight W [N, K], checked and prepared for products with a few rows.

    The values of W are bit-identical to its decoded values in the float format, except that the instructions "bf16"
    treat subnormal numbers as zero.
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
        """Check the arrays of a weight and prepare its kernel.

        Args:
            packed: Packed codes, uint8 [N * K / 2].
            absmax: Scales, float32 [N * K / block_size]; with double quantization codes, uint8.
            nested_absmax: Nested absmax values, float32; None without double quantization.
            nested_offset: Mean of the absmax values with double quantization.
            shape: N and K.
            block_size: Number of elements per block.
            float_format: Float format of the weight, the rows and the result.
            nested_quant_map: Codebook of the absmax values, float32 [256].
            instructions: Instructions to use, by default the best of this CPU.

        Raises:
            UsageError: The dtypes or sizes of the arrays do not match, K is not a multiple of the block size and of 64,
                or this CPU lacks the instructions.
        """
        self._check_weight(packed, absmax, nested_absmax, nested_quant_map, shape, block_size)
        name = instructions or best_instructions(float_format)
        if name is None or (reason := _missing(name, float_format)) is not None:
            problem = "this CPU has neither AVX2 nor AVX-512" if name is None else f"instructions {name!r}: {reason}"
            raise UsageError(problem)
        self.shape = shape
        self.float_format = float_format
        self.instructions = name
        self._function = product_function(name, float_format, double_quant=nested_absmax is not None)
        self._address = int(self._function.address)
        self._call = _C_FUNCTION(self._address)
        self._n_shares = max(1, shape[0] * shape[1] // SMALLEST_SHARE)
        nested = _NO_FLOATS if nested_absmax is None else nested_absmax
        self._arrays = (packed, absmax, nested, nested_quant_map)  # keeps them alive: the job has only addresses
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
        """Multiply rows with the transpose of W.

        Sums are float32, in an order that depends only on K, and rounded once. The result is bit-identical for any
        number of threads.

        Args:
            x: Rows, raw elements [M * K].
            out: Array for the result, raw elements [M * N].
            team: Function that runs the work in several threads, if there is enough of it.
            n_threads: Number of threads.

        Raises:
            UsageError: An array has the wrong dtype or size.
        """
        n, k = self.shape
        dtype = self.float_format.raw_dtype
        if x.dtype != dtype or x.ndim != 1 or x.size % k or not x.flags.c_contiguous:
            raise UsageError(f"x: found {x.dtype} {list(x.shape)}, expected contiguous {dtype} [M * {k}]")
        if out.dtype != dtype or out.shape != (x.size // k * n,) or not out.flags.c_contiguous:
            size = x.size // k * n
            raise UsageError(f"out: found {out.dtype} {list(out.shape)}, expected contiguous {dtype} [{size}]")
        values = x if self.instructions == "bf16" else widen(x, self.float_format)
        self.at(values.ctypes.data, x.size, out.ctypes.data, team=team, n_threads=n_threads)

    def at(self, x: int, x_size: int, out: int, *, team: Team | None = None, n_threads: int = 1) -> None:
        """Multiply rows with the transpose of W, given addresses instead of arrays and without checks.

        Args:
            x: Address of the rows: bfloat16 with the instructions "bf16", otherwise float32.
            x_size: Number of elements of the rows.
            out: Address of the result.
            team: Function that runs the work in several threads, if there is enough of it.
            n_threads: Number of threads.
        """
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
        """Raise UsageError for arrays that the kernels would misread, because they do not check their arrays."""
        n, k = shape
        if block_size not in BLOCK_SIZES or k % GROUP or k % block_size or min(n, k) <= 0:
            raise UsageError(
                f"weight of shape [{n}, {k}]: K must be a multiple of the block size {block_size} and of {GROUP}"
            )
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
                found = f"found {array.dtype} {list(array.shape)}"
                raise UsageError(f"{name}: {found}, expected contiguous {np.dtype(dtype)} [{size}]")


def _missing(name: ProductInstructions, float_format: FloatFormat) -> str | None:
    if name not in NEEDED_FEATURES:
        return f"must be one of {', '.join(NEEDED_FEATURES)}"
    if name == "bf16" and float_format is not FloatFormat.BF16:
        return f"they multiply bfloat16, not {float_format.torch_name}"
    missing = NEEDED_FEATURES[name] - lanes.cpu_features()
    return f"this CPU lacks {', '.join(sorted(missing))}" if missing else None
