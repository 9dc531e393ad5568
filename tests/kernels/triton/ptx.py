"""An evaluator of straight-line PTX in numpy, which runs the text of the kernels' inline assembly lane by lane."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from qformat.codec.floats import FloatFormat, narrow

Register = NDArray[np.uint32]


def evaluate(text: str, inputs: dict[str, Register]) -> dict[str, Register]:
    """Run PTX on registers of equal shape, as bits, and return every register that it writes.

    Raises ValueError for an unknown instruction.
    """
    registers = dict(inputs)
    for instruction in filter(None, (part.strip() for part in text.strip().strip("{}").split(";"))):
        if instruction.startswith(".reg"):
            continue
        opcode, operands = instruction.split(None, 1)
        target, *sources = (operand.strip() for operand in operands.split(","))
        registers[target] = _execute(opcode, [_read(registers, source) for source in sources])
    return {name: value for name, value in registers.items() if name not in inputs}


def _read(registers: dict[str, Register], operand: str) -> Register:
    if operand in registers:
        return registers[operand]
    if re.fullmatch(r"0f[0-9A-Fa-f]{8}", operand):
        return np.array(int(operand[2:], 16), np.uint32)
    return np.array(int(operand, 0), np.uint32)


def _execute(opcode: str, v: list[Register]) -> Register:
    if opcode in {"mov.f32", "mov.b32"}:
        return v[0]
    if opcode == "neg.f32":
        return v[0] ^ np.uint32(0x80000000)
    if opcode == "mul.rn.f32":
        return (v[0].view(np.float32) * v[1].view(np.float32)).view(np.uint32)
    if opcode in ("cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32"):
        float_format = FloatFormat.BF16 if "bf16" in opcode else FloatFormat.F16
        high, low = (narrow(np.ascontiguousarray(half).view(np.float32), float_format).astype(np.uint32) for half in v)
        return (high << np.uint32(16)) | low
    if opcode == "and.b32":
        return v[0] & v[1]
    if opcode == "shr.u32":
        return v[0] >> v[1]
    if opcode == "lop3.b32":
        return _lop3(v[0], v[1], v[2], int(v[3]))
    if opcode == "prmt.b32":
        return _prmt(*v)
    raise ValueError(f"unknown PTX instruction {opcode!r}")


def _lop3(a: Register, b: Register, c: Register, table: int) -> Register:
    """Return bit (4a + 2b + c) of the table for each bit."""
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def _prmt(a: Register, b: Register, selector: Register) -> Register:
    """Select bytes of b:a by the low 3 bits of each nibble; a nibble's top bit selects the byte's sign instead."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
    result = np.uint32(0)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result = result | (np.where(nibble & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * i))
    return np.asarray(result, np.uint32)
