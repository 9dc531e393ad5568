"""Checks of the kernels' results on this GPU: bits against the reference, sums against their error bounds."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qformat.codec.nf4 import BLOCK_SIZES
from qformat.kernels.packed_weight import PackedWeight
from qformat.kernels.triton.block_dots import TILE as BLOCK_DOTS_TILE
from qformat.kernels.triton.block_dots import block_dots
from qformat.kernels.triton.dequantize import TILE, dequantize
from qformat.kernels.triton.product import product
from tools.gpu.results import Result, Settings
from tools.gpu.weights import bits, exact_block_dots, random_codes, random_weight, reference_bits


def check_dequantize_exact(settings: Settings) -> Iterator[Result]:
    """Compare every bit of decoded weights with the reference, for all block sizes, levels, dtypes and tails."""
    shapes = [(64, TILE // 64), (103, 241), (1, 1), (1, TILE + 1), *([] if settings.quick else [(4096, 4096)])]
    for shape in shapes:
        for block_size in BLOCK_SIZES:
            for double_quant in (True, False):
                weight = random_weight(
                    shape, block_size=block_size, double_quant=double_quant, device=str(settings.device)
                )
                for dtype in (torch.bfloat16, torch.float16, torch.float32):
                    out = torch.full(shape, 77.0, dtype=dtype, device=settings.device)
                    dequantize(weight, out)
                    wrong = int((bits(out) != reference_bits(weight, dtype)).sum())
                    yield mismatches("dequantize_exact", weight, dtype, wrong)


def check_product_exact(settings: Settings) -> Iterator[Result]:
    """Read every weight out of the product with unit vectors and compare its value; -0 becomes 0."""
    shapes = [(100, 448)] if settings.quick else [(100, 448), (576, 576), (896, 1152)]
    for shape in shapes:
        for block_size in BLOCK_SIZES:
            for double_quant in (True, False):
                weight = random_weight(
                    shape, block_size=block_size, double_quant=double_quant, device=str(settings.device)
                )
                for dtype in (torch.bfloat16, torch.float16):
                    yield mismatches("product_exact", weight, dtype, wrong_weights(weight, dtype))


def check_block_dots_close(settings: Settings) -> Iterator[Result]:
    """Compare the sums over blocks, which the gradient of the scales uses, with float64; report error / bound."""
    sizes = [1, 65, BLOCK_DOTS_TILE, 3 * BLOCK_DOTS_TILE + 517, *([] if settings.quick else [1 << 24])]
    for n in sizes:
        packed = random_codes(n).to(settings.device)
        for block_size in BLOCK_SIZES:
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                values = torch.randn(n, device=settings.device).to(dtype)
                out = torch.empty(-(-n // block_size), device=settings.device)
                block_dots(values, packed, block_size, out)
                exact, magnitude = exact_block_dots(values, packed, block_size)
                share = float(((out.double().cpu() - exact).abs() / (magnitude * block_size * 2.0**-24)).max())
                case = f"{str(dtype).removeprefix('torch.')} {n} block {block_size}"
                yield Result("block_dots_close", case, "error / bound", share, "", share <= 1)


def wrong_weights(weight: PackedWeight, dtype: torch.dtype) -> int:
    """Return the number of weights that the product uses with a wrong value."""
    n, k = weight.shape
    wanted = torch.empty((n, k), dtype=dtype)
    wanted.view(torch.int16).copy_(torch.from_numpy(reference_bits(weight, dtype).view("int16")))
    unit = torch.eye(k, dtype=dtype, device=weight.device)
    wrong = 0
    for rows in (8, 16):  # the plan for up to 8 rows of x, and the plan for up to 16
        for first in range(0, k, rows):
            out = torch.full((min(rows, k - first), n), 77.0, dtype=dtype, device=weight.device)
            product(unit[first : first + rows], weight, out)
            wrong += int((wanted[:, first : first + rows] != out.cpu().T).sum())
    return wrong


def check_product_close(settings: Settings) -> Iterator[Result]:
    """Compare the product of random rows with float64; report error / bound of its float32 sums."""
    for n, k in settings.shapes:
        weight = random_weight((n, k), device=str(settings.device))
        for m in (1, 7, 16):
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(torch.bfloat16).to(settings.device)
            out = torch.empty((m, n), dtype=torch.float32, device=settings.device)
            product(x, weight, out)
            again = torch.empty_like(out)
            product(x, weight, again)
            w = torch.empty((n, k), dtype=torch.bfloat16, device=settings.device)
            dequantize(weight, w)
            exact = x.double() @ w.double().T
            bound = x.double().abs() @ w.double().abs().T * k * 2.0**-24
            share = float(((out.double() - exact).abs() / bound).max())
            yield Result("product_close", f"m{m} {n}x{k}", "error / bound", share, "", share <= 1)
            repeatable = torch.equal(out, again)
            yield Result("product_close", f"m{m} {n}x{k}", "deterministic", float(repeatable), "", repeatable)


def mismatches(check: str, weight: PackedWeight, dtype: torch.dtype, wrong: int) -> Result:
    """Return the result of a comparison with `wrong` mismatches."""
    levels = "two levels" if weight.double_quant else "one level"
    shape = f"{weight.shape[0]}x{weight.shape[1]}"
    case = f"{str(dtype).removeprefix('torch.')} {shape} block {weight.block_size} {levels}"
    return Result(check, case, "wrong weights", wrong, "", wrong == 0)
