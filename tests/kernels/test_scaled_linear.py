"""The linear operation with trainable scales: opcheck, the bits of `linear_nf4`, gradients against the dense form."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qformat.errors import UsageError
from qformat.kernels import backends, ops
from qformat.kernels.held_weight import HeldWeight
from qformat.kernels.packed_weight import PackedWeight
from qformat.kernels.scaled_linear import linear_nf4_scale_gradient, linear_nf4_scaled, scale_gradient
from tests.kernels.guarded import guarded_weight
from tests.rounding import rounding, sum_error
from tools.gpu.weights import random_weight

SHAPES = [(96, 192), (9, 7), (40, 100)]
"""Shapes with blocks within rows, with one partial block, and with blocks across rows and a tail."""


@pytest.fixture(autouse=True)
def _same_backend_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.VARIABLE, os.environ.get(backends.VARIABLE, ""))


def dense(weight: PackedWeight, scales: Tensor, *, magnitudes: bool = False) -> Tensor:
    """Return the weight, or its magnitudes, in float64 as a differentiable function of its scales."""
    ones = torch.ones_like(weight.absmax)
    parts = (weight.packed, ones, None, None, 0.0, weight.block_size, *weight.shape)
    codes = ops.dequantize_nf4(*parts, torch.float32).double().view(-1)
    codes = codes.abs() if magnitudes else codes
    return (codes * scales.repeat_interleave(weight.block_size)[: codes.numel()]).view(weight.shape)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [32, 64])
def test_all_gradients_equal_those_of_the_dense_form(backend: str, shape: tuple[int, int], block_size: int) -> None:
    backends.force_backend(backend)
    weight = guarded_weight(random_weight(shape, block_size=block_size, double_quant=False))
    generator = torch.Generator().manual_seed(0)
    x, bias, grad = (
        torch.randn(*size, generator=generator) for size in ((3, 20, shape[1]), shape[:1], (3, 20, shape[0]))
    )
    mine = [tensor.clone().requires_grad_() for tensor in (x, weight.absmax, bias)]
    exact = [tensor.double().requires_grad_() for tensor in (x, weight.absmax, bias)]
    y = linear_nf4_scaled(mine[0], weight.packed, mine[1], block_size, *shape, mine[2])
    y.backward(grad)
    wanted = functional.linear(exact[0], dense(weight, exact[1]), exact[2])
    wanted.backward(grad.double())
    # The same computation with magnitudes gives the sums that errors are relative to.
    sizes = [tensor.double().abs().requires_grad_() for tensor in (x, weight.absmax, bias)]
    size = functional.linear(sizes[0], dense(weight, sizes[1], magnitudes=True), sizes[2])
    size.backward(grad.double().abs())
    rows, columns = shape
    # Terms per sum, plus one for the rounding of a weight: y, then the gradients of x, of the scales, of the bias.
    n_summed = [columns + 2, rows + 1, 60 + block_size + 1, 60]
    for found, true, size_of, n in zip(
        [y, *(tensor.grad for tensor in mine)],
        [wanted, *(tensor.grad for tensor in exact)],
        [size, *(tensor.grad for tensor in sizes)],
        n_summed,
        strict=True,
    ):
        assert ((found.double() - true).abs() <= sum_error(n) * size_of).all()


def test_the_gradient_of_the_scales_is_the_slope_of_the_loss() -> None:
    """The loss is quadratic in each scale, so a central difference is exact except for rounding."""
    weight = random_weight((8, 96), double_quant=False)
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(1))
    scales = weight.absmax.clone().requires_grad_()

    def loss(scales: Tensor) -> Tensor:
        return linear_nf4_scaled(x, weight.packed, scales, 64, 8, 96, None).square().double().sum()

    loss(scales).backward()
    # The error of y is relative to `size`; that of y squared is twice that times y, plus the rounding of the square.
    size = x.double().abs() @ dense(weight, scales.detach().double().abs() + 1, magnitudes=True).T
    off = sum_error(97)
    loss_error = float((2 * size * off * size + (off * size) ** 2 + 2.0**-23 * size**2).sum())
    grad_error = (off + sum_error(4 + 64 + 3)) * 2 * float(size.square().sum())
    for block in range(scales.numel()):
        moved = torch.zeros_like(scales)
        moved[block] = 1.0
        slope = (loss(scales.detach() + moved) - loss(scales.detach() - moved)) / 2
        assert abs(float(scales.grad[block]) - float(slope)) <= loss_error + grad_error


def test_in_bf16_the_gradient_is_that_of_the_rounded_products() -> None:
    weight = random_weight((96, 192), double_quant=False)
    x = torch.randn(64, 192).to(torch.bfloat16)
    grad = torch.randn(64, 96).to(torch.bfloat16)
    found = linear_nf4_scale_gradient(grad, x, weight.packed, weight.absmax, 64, 96, 192)
    scales = weight.absmax.double().requires_grad_()
    functional.linear(x.double(), dense(weight, scales)).backward(grad.double())
    # Products of rows are sums of 64 terms in float32, rounded to bf16; then the codes of a block are summed.
    outer, size = grad.double().T @ x.double(), grad.double().abs().T @ x.double().abs()
    codes = dense(weight, torch.ones_like(scales), magnitudes=True)
    rounded = rounding(torch.bfloat16) * (outer.abs() + sum_error(64) * size)
    bound = (codes * (rounded + sum_error(64 + 64) * size)).view(-1, 64).sum(1)
    assert found.dtype == torch.float32
    assert ((found.double() - scales.grad).abs() <= bound).all()


def test_the_forward_has_the_bits_of_the_plain_operation() -> None:
    weight = random_weight((96, 192), double_quant=False)
    for rows in (1, 40):  # the product from codes and the product that decodes
        x = torch.randn(rows, 192).to(torch.bfloat16)
        scaled = linear_nf4_scaled(x, weight.packed, weight.absmax, 64, 96, 192, None)
        assert torch.equal(scaled, ops.linear(x, HeldWeight(weight)))


@pytest.mark.parametrize("with_bias", [True, False])
def test_both_operations_pass_opcheck(with_bias: bool) -> None:
    weight = random_weight((40, 192), double_quant=False)
    scales = weight.absmax.clone().requires_grad_()
    x = torch.randn(3, 20, 192, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(40, dtype=torch.bfloat16, requires_grad=True) if with_bias else None
    torch.library.opcheck(linear_nf4_scaled, (x, weight.packed, scales, 64, 40, 192, bias))
    grad = torch.randn(3, 20, 40, dtype=torch.bfloat16)
    arguments = (grad, x.detach(), weight.packed, weight.absmax, 64, 40, 192)
    torch.library.opcheck(linear_nf4_scale_gradient, arguments)


def test_the_gradient_does_not_depend_on_the_size_of_the_bands() -> None:
    weight = random_weight((100, 448), block_size=128, double_quant=False)  # a block ends at every second row
    x, grad = torch.randn(20, 448), torch.randn(20, 100)
    assert len(weight.bands(4_000)) > 5
    chunked = scale_gradient(grad, x, weight, max_elements=4_000)
    codes = dense(weight, torch.ones_like(weight.absmax), magnitudes=True)
    size = (codes * (grad.double().abs().T @ x.double().abs())).view(-1, 128).sum(1)
    apart = (chunked - scale_gradient(grad, x, weight)).double().abs()
    assert (apart <= 2 * sum_error(20 + 128) * size).all()  # both are sums over 20 rows, then over a block


def test_only_needed_tensors_are_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight((40, 192), double_quant=False)
    x = torch.randn(20, 192, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = linear_nf4_scaled(x, weight.packed, weight.absmax, 64, 40, 192, None)
    y.sum().backward()
    assert set(kept) == {weight.packed.data_ptr(), weight.absmax.data_ptr()}
    assert x.grad is not None


def test_shapes_that_do_not_fit_are_rejected() -> None:
    weight = random_weight((40, 192), double_quant=False)
    with pytest.raises(UsageError, match=r"x: found shape \[2, 191\]"):
        linear_nf4_scaled(torch.zeros(2, 191), weight.packed, weight.absmax, 64, 40, 192, None)
    with pytest.raises(UsageError, match="absmax: found contiguous"):
        linear_nf4_scaled(torch.zeros(2, 192), weight.packed, weight.absmax[1:], 64, 40, 192, None)
    with pytest.raises(UsageError, match=r"grad: found torch\.float32 \[2, 41\]"):
        linear_nf4_scale_gradient(torch.zeros(2, 41), torch.zeros(2, 192), weight.packed, weight.absmax, 64, 40, 192)
