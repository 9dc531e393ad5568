"""The functions of each backend, with the same signatures for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from qformat.kernels.backends import choose
from qformat.kernels.held_weight import HeldWeight
from qformat.kernels.packed_weight import PackedWeight

Dequantize = Callable[[PackedWeight, Tensor], None]
BlockDots = Callable[[Tensor, Tensor, int, Tensor], None]
Product = Callable[[Tensor, HeldWeight, Tensor], None]

MAX_ROWS_FROM_CODES = 16
"""Largest number of rows of x for a product from codes. With more rows, the backends decode the weight and let torch
multiply. The Triton kernel would decode the weight again for every 16 rows, the size of one tensor-core operand. On a
CPU, 16 rows take 0.25 to 0.68 of the time of decoding plus torch's product (2 cores with AVX512-BF16, measured with
`python -m tools.bench.kernels --crossover`)."""


@dataclass(frozen=True, slots=True)
class Implementation:
    """The functions of one backend.

    Their arguments are already checked, contiguous and on one device. x has the dtype in which the product is computed.

    Attributes:
        dequantize: (weight, out [N, K]). Decodes the weight.
        linear: (x [M, K], weight, bias [N] or None) -> [M, N]. Decodes the weight and multiplies.
        input_gradient: (grad [M, N], weight) -> [M, K]. Decodes the weight and multiplies.
        product: (x [M, K], held weight, out [..., N] with M * N elements). Multiplies with the codes, without a decoded
            weight in memory. Call it only if `product_unsupported` returns None.
        product_unsupported: (m, weight, dtype) -> reason or None. Returns why `product` cannot be used.
        block_dots: (values [n], packed [ceil(n / 2)], block_size, out [n_blocks]). Sums values times codebook entries
            over each block, in float32.
    """

    dequantize: Dequantize
    linear: Callable[[Tensor, PackedWeight, Tensor | None], Tensor]
    input_gradient: Callable[[Tensor, PackedWeight], Tensor]
    product: Product
    product_unsupported: Callable[[int, PackedWeight, torch.dtype], str | None]
    block_dots: BlockDots


def implementation(device: torch.device) -> Implementation:
    """Return the functions for tensors on a device.

    Raises:
        BackendError: The forced backend cannot run on the device.
    """
    return _MAKERS[choose(device.type).backend]()


@cache
def _numba() -> Implementation:
    from qformat.kernels import cpu

    decoding = cpu.DecodingProducts()
    return Implementation(
        cpu.dequantize, decoding.linear, decoding.input_gradient, cpu.product, cpu.product_unsupported, cpu.block_dots
    )


@cache
def _triton() -> Implementation:
    from qformat.kernels.triton import block_dots as triton_block_dots
    from qformat.kernels.triton import dequantize as triton_dequantize
    from qformat.kernels.triton import product as triton_product

    def product(x: Tensor, held: HeldWeight, out: Tensor) -> None:
        triton_product.product(x, held.weight, out.view(x.shape[0], held.weight.shape[0]))

    def unsupported(m: int, weight: PackedWeight, dtype: torch.dtype) -> str | None:
        return triton_product.product_unsupported(m, weight.shape, weight.block_size, dtype)

    return _by_decoding(triton_dequantize.dequantize, product, unsupported, triton_block_dots.block_dots)


@cache
def _torch() -> Implementation:
    from qformat.kernels import torch_decode

    def product(x: Tensor, held: HeldWeight, out: Tensor) -> None:
        raise AssertionError("product_unsupported rejects every call")

    def unsupported(_m: int, _weight: PackedWeight, _dtype: torch.dtype) -> str | None:
        return "the torch backend has no such product"

    return _by_decoding(torch_decode.dequantize, product, unsupported, torch_decode.block_dots)


_MAKERS = {"numba": _numba, "triton": _triton, "torch": _torch}


def _by_decoding(
    dequantize: Dequantize,
    product: Product,
    product_unsupported: Callable[[int, PackedWeight, torch.dtype], str | None],
    block_dots: BlockDots,
) -> Implementation:
    """Return products that decode the whole weight. The device's caching allocator reuses the same memory each time."""

    def decoded(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        dequantize(weight, out)
        return out

    return Implementation(
        dequantize=dequantize,
        linear=lambda x, weight, bias: functional.linear(x, decoded(weight, x.dtype), bias),
        input_gradient=lambda grad, weight: torch.mm(grad, decoded(weight, grad.dtype)),
        product=product,
        product_unsupported=product_unsupported,
        block_dots=block_dots,
    )
