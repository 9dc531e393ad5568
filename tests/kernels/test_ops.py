"""The torch operations: opcheck, the reference's bits, gradients, torch.compile, and equal results of all backends."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.nn import functional

from qformat.codec.cpu.product import unsupported
from qformat.codec.floats import FloatFormat
from qformat.codec.nf4 import BLOCK_SIZES
from qformat.errors import BackendError, UsageError
from qformat.kernels import backends, cpu, cpu_features, ops
from qformat.kernels.held_weight import HeldWeight
from qformat.kernels.packed_weight import PackedWeight
from tests.kernels.guarded import guarded, guarded_weight
from tests.rounding import rounding, sum_error
from tools.gpu.weights import FORMATS, bits, random_weight, reference_bits

HAS_FEW_ROWS = unsupported(192, 64, FloatFormat.BF16) is None
"""Whether this CPU supports the product that does not decode the weight first."""


@pytest.fixture(autouse=True)
def _same_backend_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.VARIABLE, os.environ.get(backends.VARIABLE, ""))


def components(weight: PackedWeight) -> tuple[Any, ...]:
    return (
        weight.packed, weight.absmax, weight.nested_absmax, weight.nested_quant_map, weight.nested_offset,
        weight.block_size, *weight.shape,
    )  # fmt: skip


def decoded(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(reference_bits(weight, dtype).view("int32" if dtype == torch.float32 else "int16")).view(
        dtype
    )


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_dequantize_gives_the_bits_of_the_reference(
    backend: str, dtype: torch.dtype, double_quant: bool, block_size: int
) -> None:
    backends.force_backend(backend)
    for shape in ((9, 7), (3, 192), (100, 576)):
        weight = guarded_weight(random_weight(shape, block_size=block_size, double_quant=double_quant))
        out = torch.ops.qformat.dequantize_nf4(*components(weight), dtype)
        assert (bits(out) == reference_bits(weight, dtype)).all()
        into = guarded(torch.full(shape, 77.0, dtype=dtype))
        torch.ops.qformat.dequantize_nf4_into(*components(weight)[:6], into)
        assert (bits(into) == reference_bits(weight, dtype)).all()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_every_operation_passes_opcheck(double_quant: bool, with_bias: bool) -> None:
    weight = random_weight((40, 192), double_quant=double_quant)
    x = torch.randn(3, 20, 192, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(40, dtype=torch.bfloat16, requires_grad=True) if with_bias else None
    torch.library.opcheck(ops.dequantize_nf4, (*components(weight), torch.float16))
    torch.library.opcheck(ops.dequantize_nf4_into, (*components(weight)[:6], torch.empty(40, 192)))
    torch.library.opcheck(ops.linear_nf4, (x, *components(weight), bias))
    if HAS_FEW_ROWS:
        torch.library.opcheck(ops.gemv_nf4, (torch.randn(2, 192, dtype=torch.bfloat16), *components(weight)))
    grad = torch.randn(5, 40, dtype=torch.bfloat16)
    torch.library.opcheck(ops.linear_nf4_input_gradient, (grad, *components(weight)))


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_linear_and_its_gradients_equal_those_of_the_decoded_weight(backend: str, dtype: torch.dtype) -> None:
    backends.force_backend(backend)
    weight = random_weight((96, 192))
    computed = cpu_features.compute_dtype(dtype)
    x = torch.randn(2, 17, 192, dtype=dtype, requires_grad=True)
    bias = torch.randn(96, dtype=dtype, requires_grad=True)
    y = ops.linear_nf4(x, *components(weight), bias)
    y.sum().backward()
    x2, bias2 = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    y2 = functional.linear(x2.to(computed), decoded(weight, computed), bias2.to(computed)).to(dtype)
    y2.sum().backward()
    assert torch.equal(y, y2)
    assert torch.equal(x.grad, x2.grad)
    assert (bias.grad == 34).all()  # a sum of ones is exact in every format


def test_no_decoded_weight_is_kept_for_the_backward_pass() -> None:
    weight = random_weight((96, 192))
    kept = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(2, 192, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ops.linear_nf4(x, *components(weight), None)
    addresses = {part.data_ptr() for part in components(weight)[:4]}
    assert {tensor.data_ptr() for tensor in kept} == addresses


@pytest.mark.parametrize("m", [1, 4, 8, 17])
def test_linear_compiles_without_a_graph_break(m: int) -> None:
    weight = random_weight((40, 192))
    x = torch.randn(m, 192, dtype=torch.bfloat16)

    def twice(x: torch.Tensor) -> torch.Tensor:
        return ops.linear_nf4(x, *components(weight), None) * 2

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), twice(x))


@pytest.mark.parametrize("m", [1, 3, 8])
def test_few_rows_give_what_decoding_gives_within_the_bound_of_its_sums(m: int) -> None:
    weight = random_weight((100, 576))
    x = torch.randn(m, 576).to(torch.bfloat16)
    y = ops.linear(x, HeldWeight(weight))
    if HAS_FEW_ROWS:
        assert torch.equal(y, ops.gemv_nf4(x, *components(weight)))
    else:
        with pytest.raises(UsageError, match=r"neither AVX2 nor AVX-512\. Use linear_nf4"):
            ops.gemv_nf4(x, *components(weight))
    within = []
    for computed in (torch.bfloat16, torch.float32):  # some CPUs round the weights to bf16, others do not
        w = decoded(weight, computed).double()
        exact = x.double() @ w.T
        bound = sum_error(576) * (x.double().abs() @ w.abs().T)
        last_rounding = rounding(torch.bfloat16) * (exact.abs() + bound)
        within.append(bool(((y.double() - exact).abs() <= bound + last_rounding).all()))
    assert any(within)


def test_weights_larger_than_the_scratch_buffer_are_decoded_in_bands() -> None:
    weight = random_weight((100, 448), block_size=128)  # a block ends at every second row
    x = torch.randn(20, 448, dtype=torch.float32)
    grad = torch.randn(20, 100, dtype=torch.float32)
    bias = torch.randn(100)
    whole, banded = cpu.DecodingProducts(), cpu.DecodingProducts(scratch_nbytes=16_000)
    bands = banded._bands(weight, torch.float32)
    assert len(bands) > 5
    assert all(last * 448 % 128 == 0 or last == 100 for _, last in bands)
    assert len(whole._bands(weight, torch.float32)) == 1
    w = decoded(weight, torch.float32).abs()
    # Both results are sums in float32: of 448 products and the bias, and of 100 products.
    apart = (banded.linear(x, weight, bias) - whole.linear(x, weight, bias)).double().abs()
    assert (apart <= 2 * sum_error(449) * functional.linear(x.abs(), w, bias.abs())).all()
    apart = (banded.input_gradient(grad, weight) - whole.input_gradient(grad, weight)).double().abs()
    assert (apart <= 2 * sum_error(100) * (grad.abs() @ w)).all()


def test_no_rows_give_no_rows() -> None:
    assert ops.linear(torch.zeros(2, 0, 64), HeldWeight(random_weight((5, 64)))).shape == (2, 0, 5)


def test_a_shape_that_does_not_fit_is_rejected() -> None:
    with pytest.raises(UsageError, match=r"x: found shape \[2, 63\], expected \[..., 64\]"):
        ops.linear(torch.zeros(2, 63), HeldWeight(random_weight((5, 64))))
    with pytest.raises(UsageError, match="x has 17 rows; with more than 16, decoding the weight is faster"):
        ops.gemv_nf4(torch.zeros(17, 64), *components(random_weight((5, 64))))


def test_fake_cuda_tensors_work_without_a_driver() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    weight = random_weight((5, 64))
    with FakeTensorMode():
        parts = [torch.empty(part.shape, dtype=part.dtype, device="cuda") for part in components(weight)[:4]]
        x = torch.empty(3, 64, dtype=torch.bfloat16, device="cuda")
        y = ops.linear_nf4(x, *parts, *components(weight)[4:], None)
        assert (y.shape, y.device.type, y.dtype) == ((3, 5), "cuda", torch.bfloat16)


def test_a_forced_backend_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight((5, 64))
    monkeypatch.setenv(backends.VARIABLE, "triton")
    with pytest.raises(BackendError, match="QFORMAT_BACKEND: the forced backend 'triton' cannot run here"):
        ops.linear(torch.zeros(1, 64), HeldWeight(weight))
    backends.force_backend("torch")
    assert backends.choose("cpu") == backends.Choice("torch", "forced by QFORMAT_BACKEND")
    assert ops.linear(torch.zeros(1, 64), HeldWeight(weight)).shape == (1, 5)


def test_a_forced_backend_runs_in_every_thread_until_none_is_forced() -> None:
    backends.force_backend("torch")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(backends.choose, "cpu").result().backend == "torch"
    backends.force_backend(None)
    assert backends.choose("cpu") == backends.Choice("numba", "the fastest for this device")


def test_the_error_for_an_unknown_backend_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="unknown backend 'cuda': must be one of numba, triton, torch"):
        backends.force_backend("cuda")
    monkeypatch.setenv(backends.VARIABLE, "fast")
    with pytest.raises(BackendError, match="QFORMAT_BACKEND: unknown backend 'fast'"):
        backends.choose("cpu")


def test_a_cpu_without_bf16_instructions_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_features, "has_fast_bf16", lambda: False)
    weight = random_weight((40, 192))
    x = torch.randn(20, 192).to(torch.bfloat16)
    y = ops.linear(x, HeldWeight(weight))
    assert torch.equal(y, functional.linear(x.float(), decoded(weight, torch.float32)).to(torch.bfloat16))
