"""The fused product by Triton: the kernel in the interpreter, its PTX exhaustively, and the plan of the launch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qformat.codec.codebooks import NF4_CODEBOOK
from qformat.codec.floats import FloatFormat, narrow
from qformat.codec.nf4 import BLOCK_SIZES
from qformat.errors import UsageError
from qformat.kernels.implementations import MAX_ROWS_FROM_CODES
from qformat.kernels.triton import launch as triton_launch
from qformat.kernels.triton import product_kernel as kernel
from qformat.kernels.triton.product import LaunchPlan, plan, product, product_unsupported
from tests.kernels.triton.interpreter import ROOT, run_interpreted
from tests.kernels.triton.ptx import evaluate
from tools.gpu.weights import random_weight

REAL_SHAPES = [
    (576, 576), (192, 576), (1536, 576), (576, 1536),  # SmolLM2-135M
    (896, 896), (128, 896), (4864, 896), (896, 4864),  # Qwen2.5-0.5B
    (960, 960), (320, 960), (2560, 960), (960, 2560),  # SmolLM2-360M
    (1024, 1152), (6912, 1152), (1152, 6912),  # Gemma 3 1B
    (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096),  # Llama 3.1 8B
]  # fmt: skip


def test_the_kernel_equals_the_reference_under_the_interpreter() -> None:
    run_interpreted(Path(__file__).parent / "interpreted" / "product.py")


@pytest.mark.parametrize("float_format", [FloatFormat.BF16, FloatFormat.F16])
def test_the_ptx_decodes_every_word_correctly(float_format: FloatFormat) -> None:
    """Try all 65,536 half words in both halves for 203 scales: tiny, huge, negative and zero."""
    table_ptx = (kernel.TABLE_BF16 if float_format is FloatFormat.BF16 else kernel.TABLE_FP16).value
    generator = np.random.default_rng(0)
    scales = generator.standard_normal(200) * 10.0 ** generator.integers(-6, 3, 200)
    half = np.arange(65536, dtype=np.uint32)
    for i, scale in enumerate(np.array([*scales, 0, 1, 6.1e-5], np.float32)):
        table = evaluate(table_ptx, {"$8": np.array([scale]).view(np.uint32)})
        word = half | (np.roll(half, 17 * i + 1) << np.uint32(16))
        found = evaluate(kernel.LOOKUP.value, {"$4": word} | {f"${5 + k}": table[f"${k}"] for k in range(8)})
        values = NF4_CODEBOOK * scale
        values[7] = 0  # the PTX drops the sign of zero
        weights = narrow(values.astype(np.float32), float_format).astype(np.uint32)
        for k in range(4):
            first = weights[(word >> np.uint32(8 * k + 4)) & np.uint32(15)]
            second = weights[(word >> np.uint32(8 * k)) & np.uint32(15)]
            assert np.array_equal(found[f"${k}"], first | (second << np.uint32(16)))


@pytest.mark.parametrize("ptx", [kernel.TABLE_BF16.value, kernel.TABLE_FP16.value, kernel.LOOKUP.value])
def test_the_ptx_is_a_pure_function_of_its_elements(ptx: str) -> None:
    """Triton may evaluate it in any layout, so it must not depend on its lane, on memory or on neighbours."""
    assert [word for word in ("%", "@", "shfl", "vote", "match", "bar", "ld.", "st.") if word in ptx] == []


@pytest.mark.parametrize("shape", REAL_SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_linear_of_real_models_is_supported(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert all(product_unsupported(m, shape, b, dtype) is None for m in (1, MAX_ROWS_FROM_CODES) for b in BLOCK_SIZES)


@pytest.mark.parametrize(
    ("m", "shape", "block_size", "dtype", "reason"),
    [
        (17, (64, 64), 64, torch.bfloat16, "x has 17 rows; the fused product supports at most 16"),
        (1, (64, 96), 64, torch.bfloat16, "K = 96 is not a multiple of 64"),
        (1, (64, 64), 64, torch.float32, "bfloat16 and float16"),
        (1, (64, 64), 48, torch.bfloat16, "block size 48"),
        (1, (2**20, 2**15), 64, torch.bfloat16, "2**34"),
    ],
)
def test_unsupported_products_have_a_reason(
    m: int, shape: tuple[int, int], block_size: int, dtype: torch.dtype, reason: str
) -> None:
    found = product_unsupported(m, shape, block_size, dtype)
    assert found is not None
    assert reason in found


@given(st.integers(1, 16), st.integers(1, 300_000), st.integers(1, 512), st.integers(1, 200))
def test_a_plan_is_sound_for_every_shape(m: int, n: int, n_segments: int, n_multiprocessors: int) -> None:
    chosen = plan(m, (n, 64 * n_segments), n_multiprocessors=n_multiprocessors)
    assert m <= chosen.batch
    assert chosen.rows % (16 * chosen.n_warps) == 0
    assert 1 <= chosen.splits <= max(1, n_segments // 8)
    assert chosen.splits == 1 or chosen.splits * m * 8 <= n_segments * 64 / 8


@pytest.mark.parametrize(
    ("m", "shape", "expected"),
    [
        (1, (4096, 4096), LaunchPlan(8, 32, 8)),
        (1, (14336, 4096), LaunchPlan(8, 32, 2)),
        (1, (128256, 4096), LaunchPlan(8, 32, 1)),
        (8, (4096, 4096), LaunchPlan(8, 32, 8)),
        (16, (4096, 4096), LaunchPlan(16, 64, 4)),
        (1, (576, 576), LaunchPlan(8, 32, 1)),
    ],
)
def test_a_small_grid_is_split_over_the_columns(m: int, shape: tuple[int, int], expected: LaunchPlan) -> None:
    assert plan(m, shape, n_multiprocessors=132) == expected


def tensors(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(m, k, dtype=dtype), torch.empty(m, n, dtype=dtype)


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (torch.ones(17, 64, dtype=torch.bfloat16), torch.empty(17, 32), "M <= 16"),
        (torch.ones(64, dtype=torch.bfloat16), torch.empty(32), "M <= 16"),
        (torch.ones(1, 128, dtype=torch.bfloat16), torch.empty(1, 32), r"expected \[M, 64\]"),
        (torch.ones(1, 64), torch.empty(1, 32), "Dequantize the weight"),
        (torch.ones(1, 64, dtype=torch.bfloat16), torch.empty(32, 1), "out: found torch.float32"),
        (torch.ones(1, 64, dtype=torch.bfloat16), torch.empty(1, 32, dtype=torch.float16), "out: found torch.float16"),
        (torch.ones(1, 64, dtype=torch.bfloat16), torch.empty(1, 32), "CUDA device"),
    ],
)
def test_operands_that_do_not_fit_are_rejected(x: torch.Tensor, out: torch.Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        product(x, random_weight((32, 64)), out)


def test_a_misaligned_x_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "interpreting", lambda: True)
    x = torch.ones(65, dtype=torch.bfloat16)[1:].view(1, 64)
    with pytest.raises(UsageError, match=r"x: address 0x[0-9a-f]+ is not a multiple of 16"):
        product(x, random_weight((32, 64)), torch.empty(1, 32))


def test_importing_the_launch_modules_needs_no_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import qformat.kernels.triton.product as p, qformat.kernels.triton.dequantize as d\n"
        "from qformat.kernels.triton.launch import triton_unavailable\n"
        "assert triton_unavailable().startswith('triton is not installed'), triton_unavailable()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env=dict(os.environ))
