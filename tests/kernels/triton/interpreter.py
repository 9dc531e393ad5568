"""Corrections of Triton 3.9's interpreter, which a test under TRITON_INTERPRET=1 applies before it launches a kernel.

Without them every such test would be meaningless:

1. The conversion from float32 to bfloat16 truncates, so 47 % of decoded weights are off by one unit in the last place.
2. `tl.dot` multiplies the bit patterns of bfloat16 operands as integers.
3. There is no inline assembly. Here, the kernels' own PTX is evaluated (see `ptx`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.repository import ROOT


def run_interpreted(path: Path) -> None:
    """Run the tests of a file in a separate process under the interpreter, and fail with its report."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-p",
        "no:randomly",
        str(path),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@dataclass
class _Outputs:
    """Result of an operation as `inline_asm_elementwise` expects it."""

    handles: list[Any]

    def get_result(self, index: int) -> Any:
        return self.handles[index]


def patch() -> None:
    """Correct the interpreter of this process."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

    from qformat.codec.floats import FloatFormat, narrow, widen
    from tests.kernels.triton.ptx import evaluate

    cast_impl = InterpreterBuilder.cast_impl
    create_dot = InterpreterBuilder.create_dot

    def cast_rounded(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(narrow(src.data, FloatFormat.BF16).reshape(src.data.shape), tl.bfloat16)
        with np.errstate(over="ignore"):
            return cast_impl(self, src, dst_type)

    def dot_of_values(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        def values(operand: Any) -> Any:
            if operand.dtype.scalar == tl.bfloat16:
                return TensorHandle(widen(operand.data, FloatFormat.BF16), tl.float32)
            return operand

        return create_dot(self, values(a), values(b), d, *options)

    def inline_asm(
        self: Any, asm: str, constraints: str, values: Sequence[Any], types: Sequence[Any], is_pure: bool, pack: int
    ) -> _Outputs:
        assert is_pure
        assert pack == 1
        n_outputs = constraints.count("=")
        assert len(types) == n_outputs
        inputs = {f"${n_outputs + i}": _bits(value.data) for i, value in enumerate(values)}
        outputs = evaluate(asm, inputs)
        handles = []
        for i, kind in enumerate(types):
            dtype = _get_np_dtype(kind.scalar if hasattr(kind, "scalar") else kind)
            handles.append(TensorHandle(np.ascontiguousarray(outputs[f"${i}"]).view(dtype), kind.scalar))
        return _Outputs(handles)

    InterpreterBuilder.cast_impl = cast_rounded
    InterpreterBuilder.create_dot = dot_of_values
    InterpreterBuilder.create_inline_asm = inline_asm


def _bits(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    assert data.dtype.itemsize == 4
    return np.ascontiguousarray(data).view(np.uint32)
