"""How far decoded weights are from their source: sums that give the error figures, and counts of codes.

Sums are taken in float64, in columns that are added in one fixed order and without fastmath, so that a figure depends
neither on the CPU nor on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from qformat.codec.cpu.kernels import Kernel, filled, format_literal, jit, raw_type, taken
from qformat.codec.cpu.scalars import widened_or_nan
from qformat.codec.floats import FloatFormat, Raw
from qformat.codec.nf4 import packed_nbytes

TILE = 4096
"""Elements widened at a time: the float32 weights and values of a tile stay in the L1 cache."""

COLUMNS = 64
"""Running sums beside each other: LLVM adds them as vectors without reordering any addition. A divisor of TILE.
One core adds 1,470 M bf16 weights/s in 64 columns, 560 in 8."""


@dataclass(frozen=True, slots=True)
class ErrorSums:
    """Sums over weights w and their decoded values q, and the figures that they give.

    A figure is None where it does not exist: of no weights, of zero weights, of values that are not finite.
    """

    n_weights: int = 0
    weights_squared: float = 0.0
    decoded_squared: float = 0.0
    products: float = 0.0
    errors_squared: float = 0.0
    largest_error: float = 0.0

    @property
    def finite(self) -> bool:
        """Whether every weight and every decoded value is finite (their squares cannot overflow float64)."""
        return math.isfinite(self.errors_squared)

    @property
    def relative_rms(self) -> float | None:
        """Root of the sum of (w - q)^2 over the sum of w^2."""
        if not self.finite or not self.weights_squared:
            return None
        return math.sqrt(self.errors_squared / self.weights_squared)

    @property
    def snr_db(self) -> float | None:
        """The sum of w^2 over the sum of (w - q)^2, in decibels; None also where there is no error at all."""
        if not self.finite or not self.weights_squared or not self.errors_squared:
            return None
        return 10 * math.log10(self.weights_squared / self.errors_squared)

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between weights and decoded values, each taken as one vector."""
        if not self.finite or not self.weights_squared or not self.decoded_squared:
            return None
        return self.products / math.sqrt(self.weights_squared * self.decoded_squared)

    @property
    def max_abs_error(self) -> float | None:
        """The largest |w - q|."""
        return self.largest_error if self.finite and self.n_weights else None


def add_up(parts: Iterable[ErrorSums]) -> ErrorSums:
    """Return the sums of several tensors, added in the given order. What is not finite is left out."""
    total = ErrorSums()
    for part in parts:
        if part.finite:
            total = ErrorSums(
                total.n_weights + part.n_weights,
                total.weights_squared + part.weights_squared,
                total.decoded_squared + part.decoded_squared,
                total.products + part.products,
                total.errors_squared + part.errors_squared,
                max(total.largest_error, part.largest_error),
            )
    return total


class RunningErrors:
    """The sums of one tensor, fed chunk by chunk in order."""

    def __init__(self, float_format: FloatFormat) -> None:
        self._add = _ADDERS[float_format]
        self._columns = np.zeros((4, COLUMNS), np.float64)
        self._largest = np.zeros(COLUMNS, np.float32)
        self._n_weights = 0

    def add(self, weights: Raw, decoded: Raw) -> None:
        """Add raw weights [n] and the raw values [n] that their codes decode to."""
        assert weights.size == decoded.size
        self._add(weights, decoded, self._columns, self._largest)
        self._n_weights += weights.size

    def sums(self) -> ErrorSums:
        """Return the sums of all that was added."""
        weights, decoded, products, errors = (sum(column) for column in self._columns.tolist())
        return ErrorSums(self._n_weights, weights, decoded, products, errors, max(self._largest.tolist(), default=0.0))


def count_codes(packed: NDArray[np.uint8], *, n_elements: int) -> NDArray[np.int64]:
    """Return how often each code occurs, int64 [16], among the first `n_elements` of packed bytes [ceil(n/2)]."""
    assert packed.size == packed_nbytes(n_elements)
    counts_of_bytes = np.zeros((4, 256), np.int64)
    _count_bytes(packed, counts_of_bytes)
    pairs = counts_of_bytes.sum(axis=0).reshape(16, 16)  # [high nibble, low nibble]
    counts: NDArray[np.int64] = pairs.sum(axis=1) + pairs.sum(axis=0)
    if n_elements % 2:
        counts[packed[-1] & 15] -= 1
    return counts


# The kernels loop over slices that begin at 0: numba cannot vectorise `array[start + i]`, which might be negative
# and then count from the end (610 instead of 8,000 M elements/s where 16 bits are widened to 32).


@jit
def _add_tile(weights: Any, decoded: Any, n: Any, columns: Any, largest: Any) -> None:
    """Add weights[:n] and decoded[:n], both [TILE], to columns [4, COLUMNS] and largest [COLUMNS]."""
    for i in range(n, n + (-n) % COLUMNS):
        weights[i] = 0
        decoded[i] = 0
    w_squared, q_squared, products, e_squared = columns[0], columns[1], columns[2], columns[3]
    for start in range(0, n, COLUMNS):
        row_of_weights = weights[start : start + COLUMNS]
        row_of_decoded = decoded[start : start + COLUMNS]
        for i in range(COLUMNS):
            w = np.float64(row_of_weights[i])
            q = np.float64(row_of_decoded[i])
            e = w - q
            w_squared[i] += w * w
            q_squared[i] += q * q
            products[i] += w * q
            e_squared[i] += e * e
            size = np.float32(abs(e))
            largest[i] = size if size > largest[i] else largest[i]


@jit
def _widen(raw: Any, values: Any, float_format: Any) -> None:
    """Widen raw elements [n] into values[:n]; infinities and NaNs become NaN, since only `finite` asks for them."""
    for i in range(raw.size):
        values[i] = widened_or_nan(raw[i], float_format)


@jit
def _add(weights: Any, decoded: Any, columns: Any, largest: Any, float_format: Any) -> None:
    wide_weights = np.empty(TILE, np.float32)
    wide_decoded = np.empty(TILE, np.float32)
    for start in range(0, weights.size, TILE):
        stop = min(start + TILE, weights.size)
        _widen(weights[start:stop], wide_weights, float_format)
        _widen(decoded[start:stop], wide_decoded, float_format)
        _add_tile(wide_weights, wide_decoded, stop - start, columns, largest)


@jit
def _count_bytes(packed: Any, counts: Any) -> None:
    """Add to counts [4, 256] how often each byte occurs; in one table, equal neighbours would wait on each other."""
    whole = packed.size - packed.size % 4
    for i in range(0, whole, 4):
        counts[0, packed[i]] += 1
        counts[1, packed[i + 1]] += 1
        counts[2, packed[i + 2]] += 1
        counts[3, packed[i + 3]] += 1
    for i in range(whole, packed.size):
        counts[0, packed[i]] += 1


def _adder(float_format: FloatFormat) -> Kernel:
    """add(weights [n], decoded [n], columns [4, COLUMNS], largest [COLUMNS])."""
    raw = taken(raw_type(float_format))
    columns = types.Array(types.float64, 2, "C", aligned=False)
    return Kernel(_add, types.void(raw, raw, columns, filled(types.float32), format_literal(float_format)))


_ADDERS = {each: _adder(each) for each in FloatFormat}
