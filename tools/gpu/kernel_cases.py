"""Compilations of the Triton kernels whose machine code is counted, with the memory traffic of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qformat.kernels.triton import block_dots as triton_block_dots
from qformat.kernels.triton import dequantize as triton_dequantize
from qformat.kernels.triton import product as triton_product
from qformat.kernels.triton.block_dots_kernel import block_dots_kernel
from qformat.kernels.triton.dequantize_kernel import dequantize_kernel
from qformat.kernels.triton.product_kernel import product_kernel


@dataclass(frozen=True, slots=True)
class Case:
    """One compilation of one kernel.

    Attributes:
        name: Name of the case.
        kernel: The Triton kernel.
        signature: Type of each argument.
        constants: Compile-time arguments.
        options: Options of the compiler.
        weights: Weights that a program decodes on the counted path.
        bytes_per_weight: Memory traffic per weight.
        in_loop: Whether to count one step of the longest loop instead of the longest path.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    weights: int
    bytes_per_weight: float
    in_loop: bool

    @property
    def weights_per_thread(self) -> float:
        return self.weights / (32 * self.options["num_warps"])


def scale_nbytes(block_size: int, *, double_quant: bool) -> float:
    """Return the bytes of both levels of absmax that are read per weight."""
    return (1 + 4 / 256) / block_size if double_quant else 4 / block_size


def dequantize_case(
    name: str, *, out: str = "bf16", block_size: int = 64, double_quant: bool = True, tiles: str = "whole"
) -> Case:
    signature = {
        "packed_ptr": "*u8",
        "absmax_ptr": "*u8" if double_quant else "*fp32",
        "nested_absmax_ptr": "*fp32" if double_quant else "constexpr",
        "nested_quant_map_ptr": "*fp32" if double_quant else "constexpr",
        "nested_offset": "fp32",
        "codebook_ptr": "*fp32",
        "out_ptr": f"*{out}",
        "n": "i32",
    }
    return Case(
        f"dequantize_{name}", dequantize_kernel, signature,
        triton_dequantize.constants(block_size, double_quant=double_quant, tiles=tiles),
        options=triton_dequantize.OPTIONS, weights=triton_dequantize.TILE,
        bytes_per_weight=0.5 + scale_nbytes(block_size, double_quant=double_quant) + (4 if out == "fp32" else 2),
        in_loop=False,
    )  # fmt: skip


def product_case(
    name: str, m: int, *, dtype: str = "bf16", k: int = 4096, block_size: int = 64, double_quant: bool = True
) -> Case:
    plan = triton_product.plan(m, (4096, k), n_multiprocessors=132)
    signature = {
        "x_ptr": f"*{dtype}",
        "packed_ptr": "*u8",
        "absmax_ptr": "*u8" if double_quant else "*fp32",
        "nested_absmax_ptr": "*fp32" if double_quant else "constexpr",
        "nested_quant_map_ptr": "*fp32" if double_quant else "constexpr",
        "nested_offset": "fp32",
        "out_ptr": f"*{dtype}",
        "m": "i32",
        "n": "i32",
        "n_segments": "i32",
    }
    return Case(
        f"product_{name}", product_kernel, signature,
        triton_product.constants(plan, (4096, k), block_size, double_quant=double_quant),
        options=triton_product.options(plan), weights=plan.rows * triton_product.STEP,
        bytes_per_weight=0.5 + scale_nbytes(block_size, double_quant=double_quant), in_loop=True,
    )  # fmt: skip


def block_dots_case(name: str, *, values: str = "bf16", block_size: int = 64) -> Case:
    signature = {
        "values_ptr": f"*{values}",
        "packed_ptr": "*u8",
        "codebook_ptr": "*fp32",
        "out_ptr": "*fp32",
        "n": "i32",
    }
    return Case(
        f"block_dots_{name}", block_dots_kernel, signature, triton_block_dots.constants(block_size, aligned=True),
        options=triton_block_dots.OPTIONS, weights=triton_block_dots.TILE,
        bytes_per_weight=0.5 + 4 / block_size + (4 if values == "fp32" else 2), in_loop=False,
    )  # fmt: skip


CASES = {
    case.name: case
    for case in (
        dequantize_case("bf16"),
        dequantize_case("fp16", out="fp16"),
        dequantize_case("fp32", out="fp32"),
        dequantize_case("bf16_block32", block_size=32),
        dequantize_case("bf16_one_level", double_quant=False),
        dequantize_case("bf16_mixed", tiles="mixed"),
        product_case("m8_bf16", 8),
        product_case("m8_fp16_tail", 8, dtype="fp16", k=576),
        product_case("m8_bf16_block32", 8, block_size=32),
        product_case("m8_bf16_one_level", 8, double_quant=False),
        product_case("m16_bf16", 16),
        product_case("m16_fp16_block128_tail", 16, dtype="fp16", k=576, block_size=128),
        product_case("m16_bf16_block32_tail", 16, k=576, block_size=32),
        block_dots_case("bf16"),
        block_dots_case("fp32_block256", values="fp32", block_size=256),
    )
}
