"""An encoder in plain Python, written from sections 4 to 6 of spec/README.md to show that they are sufficient."""

from __future__ import annotations

import ctypes
import math
import struct
from dataclasses import dataclass
from itertools import pairwise

CODEBOOK_BITS = """
    BF800000 BF3239B1 BF066B30 BECA32A0 BE91A24D BE3D353F BDBA7871 00000000
    3DA2FAFF 3E24CAE3 3E7C04DD 3EAD033A 3EE1A4B8 3F1007AB 3F3913B3 3F800000
"""


def f32(value: float) -> float:
    """Round to float32. A single operation on float32 values in float64, rounded again, is rounded correctly."""
    return ctypes.c_float(value).value


CODEBOOK = [struct.unpack(">f", bytes.fromhex(bits))[0] for bits in CODEBOOK_BITS.split()]


def midpoints(values: list[float]) -> list[float]:
    return [f32(f32(a + b) / 2) for a, b in pairwise(values)]


def dynamic_map() -> list[float]:
    values = [0.0, 1.0]
    for e in range(7):
        c = 2**e
        q, tenth = f32(f32(0.9) / c), f32(0.1)
        boundaries = [f32(tenth + q * i) if i < (c + 1) // 2 else f32(1 - q * (c - i)) for i in range(c + 1)]
        magnitudes = [f32(f32(10.0 ** (e - 6)) * middle) for middle in midpoints(boundaries)]
        values += magnitudes + [-magnitude for magnitude in magnitudes]
    return sorted(values)


THRESHOLDS, DYNAMIC_THRESHOLDS = midpoints(CODEBOOK), midpoints(dynamic_map())
SMALLEST = struct.unpack(">f", bytes.fromhex("006CE3EE"))[0]


@dataclass
class Encoded:
    packed: bytes
    absmax: bytes
    nested_absmax: bytes = b""
    offset_bits: str = ""


def widen(data: bytes, dtype: str) -> list[float]:
    if dtype == "BF16":
        return [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]
    return [value for (value,) in struct.iter_unpack("<e" if dtype == "F16" else "<f", data)]


def encode(data: bytes, dtype: str, block_size: int, *, double_quant: bool) -> Encoded:
    weights = widen(data, dtype)
    assert all(map(math.isfinite, weights))
    codes, absmax = [], []
    for start in range(0, len(weights), block_size):
        block = weights[start : start + block_size]
        absmax.append(max(map(abs, block)))
        d = max(absmax[-1], SMALLEST)
        r = f32(1 / d)
        scaled = [f32(x * r) for x in block] if len(block) == block_size else [f32(x / d) for x in block]
        codes += [sum(threshold < s for threshold in THRESHOLDS) for s in scaled]
    if len(codes) % 2:
        codes.append(7)
    packed = bytes(high << 4 | low for high, low in zip(codes[::2], codes[1::2], strict=True))
    if not double_quant:
        return Encoded(packed, struct.pack(f"<{len(absmax)}f", *absmax))
    total = 0.0
    for value in absmax:
        total += value
    offset = f32(total / len(absmax))
    centered = [f32(value - offset) for value in absmax]
    nested, nested_codes = [], []
    for start in range(0, len(centered), 256):
        group = centered[start : start + 256]
        nested.append(max(map(abs, group)))
        for value in group:
            normalised = f32(value / nested[-1]) if nested[-1] else -math.inf
            nested_codes.append(sum(threshold < normalised for threshold in DYNAMIC_THRESHOLDS))
    return Encoded(
        packed, bytes(nested_codes), struct.pack(f"<{len(nested)}f", *nested), struct.pack(">f", offset).hex().upper()
    )
