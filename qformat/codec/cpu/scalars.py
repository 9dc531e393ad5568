"""Operations on single numbers that the numba kernels share: the nearest code, and conversions of the float formats.

A literal argument, the name of a float format (`FloatFormat.value`), selects the implementation of `widened`,
`narrowed` and the like, so that one kernel serves all formats. They are inlined into the kernels, whose loops LLVM then
vectorises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.extending import overload

from qformat.codec.codebooks import NF4_THRESHOLDS
from qformat.codec.cpu.lanes import as_bits, as_float

F32_INFINITY = np.uint32(0x7F800000)
"""Bits of infinity in float32. The bits of a NaN have a larger magnitude."""
_F16_SCALE = np.float32(2.0**112)
"""Factor that corrects the exponent of float16 bits after a shift to their place in float32, even for subnormals."""

_inline = numba.njit(inline="always")
(_T0, _T1, _T2, _T3, _T4, _T5, _T6, _T7, _T8, _T9, _T10, _T11, _T12, _T13, _T14) = NF4_THRESHOLDS


@_inline
def nearest_code(value: Any) -> Any:
    """Return the number of thresholds below a scaled weight. LLVM turns the sum of comparisons into vector masks."""
    return (
        np.int32(value > _T0)
        + np.int32(value > _T1)
        + np.int32(value > _T2)
        + np.int32(value > _T3)
        + np.int32(value > _T4)
        + np.int32(value > _T5)
        + np.int32(value > _T6)
        + np.int32(value > _T7)
        + np.int32(value > _T8)
        + np.int32(value > _T9)
        + np.int32(value > _T10)
        + np.int32(value > _T11)
        + np.int32(value > _T12)
        + np.int32(value > _T13)
        + np.int32(value > _T14)
    )


@_inline
def rounded_to_bf16(value: Any) -> Any:
    """Return the bfloat16 bits of a float32, rounded as in `floats.narrow`."""
    bits = as_bits(value)
    upper = bits >> np.uint32(16)
    rounded = (bits + np.uint32(0x7FFF) + (upper & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > F32_INFINITY
    return np.uint16(upper | np.uint32(0x40) if is_nan else rounded)


@_inline
def _rounded_to_f16(value: Any) -> Any:
    """Return the float16 bits of a float32. Values of 65520 and more become infinity."""
    bits = as_bits(value)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    if magnitude > F32_INFINITY:
        half = np.uint32(0x7E00)
    elif magnitude >= np.uint32(0x477FF000):  # 65520, half way between the largest value and the next
        half = np.uint32(0x7C00)
    elif magnitude < np.uint32(0x38800000):  # below 2**-14: adding 0.5 rounds to units of 2**-24
        half = as_bits(abs(value) + np.float32(0.5)) - np.uint32(0x3F000000)
    else:
        odd = (magnitude >> np.uint32(13)) & np.uint32(1)
        half = (magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13)
    return np.uint16(sign | half)


@_inline
def _bf16_value(raw: Any) -> Any:
    return as_float(np.uint32(np.uint32(raw) << np.uint32(16)))


@_inline
def _f16_value(raw: Any) -> Any:
    """Return the value of float16 bits. The result is undefined for Inf and NaN."""
    half = np.uint32(raw)
    moved = ((half & np.uint32(0x8000)) << np.uint32(16)) | ((half & np.uint32(0x7FFF)) << np.uint32(13))
    return as_float(np.uint32(moved)) * _F16_SCALE


@_inline
def _f16_value_or_nan(raw: Any) -> Any:
    exponent_full = (raw & np.uint16(0x7C00)) == np.uint16(0x7C00)
    return np.float32(np.nan) if exponent_full else _f16_value(raw)


def _by_format(*, bf16: Callable[..., Any], f16: Callable[..., Any], f32: Callable[..., Any]) -> Any:
    """Return a function (value, float_format) for compiled kernels with one implementation per float format."""
    implementations = {"BF16": bf16, "F16": f16, "F32": f32}

    def chosen(value: Any, float_format: Any) -> Any:
        raise NotImplementedError("only compiled kernels call this")

    # numba compares the parameters with those of the implementations, so neither may have annotations.
    overload(chosen, inline="always", prefer_literal=True)(
        lambda value, float_format: implementations.get(getattr(float_format, "literal_value", ""))
    )
    return chosen


widened = _by_format(
    bf16=lambda value, float_format: _bf16_value(value),
    f16=lambda value, float_format: _f16_value(value),
    f32=lambda value, float_format: value,
)
"""Function that returns the float32 value of a raw element. It is undefined for Inf and NaN in float16."""

widened_or_nan = _by_format(
    bf16=lambda value, float_format: _bf16_value(value),
    f16=lambda value, float_format: _f16_value_or_nan(value),
    f32=lambda value, float_format: value,
)
"""Function that returns the float32 value of a raw element. Inf and NaN in float16 give NaN."""

narrowed = _by_format(
    bf16=lambda value, float_format: rounded_to_bf16(value),
    f16=lambda value, float_format: _rounded_to_f16(value),
    f32=lambda value, float_format: value,
)
"""Function that rounds a float32 to a raw element, as in `floats.narrow`."""

magnitude_bits = _by_format(
    bf16=lambda value, float_format: np.uint16(value & np.uint16(0x7FFF)),
    f16=lambda value, float_format: np.uint16(value & np.uint16(0x7FFF)),
    f32=lambda value, float_format: np.uint32(as_bits(value) & np.uint32(0x7FFFFFFF)),
)
"""Function that returns a raw element without its sign, as an unsigned integer with the order of the magnitudes."""

magnitude = _by_format(
    bf16=lambda value, float_format: _bf16_value(value),
    f16=lambda value, float_format: _f16_value(value),
    f32=lambda value, float_format: as_float(value),
)
"""Function that returns the float32 value of a finite result of `magnitude_bits`."""

is_finite = _by_format(
    bf16=lambda value, float_format: value < np.uint16(0x7F80),
    f16=lambda value, float_format: value < np.uint16(0x7C00),
    f32=lambda value, float_format: value < F32_INFINITY,
)
"""Function that returns whether a result of `magnitude_bits` is finite."""
