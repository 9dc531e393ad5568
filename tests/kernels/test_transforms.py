"""Every transform of torch gives the numbers of the decoded layer, and none is passed by without notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import jvp

from qformat.artifact.components import Component
from qformat.codec.floats import FloatFormat
from qformat.codec.quant_state import QuantState
from qformat.errors import UsageError
from qformat.kernels import ops, scaled_linear
from qformat.kernels.dispatch import may_bypass_dispatcher
from qformat.model.nf4_linear import NF4Linear
from tests.kernels import transforms
from tests.kernels.transforms import CALLS, COMPILED, GRADIENTS, TRACES, same_numbers
from tools.gpu.weights import random_weight

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # torch.func imports a module that uses it
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

SHAPE = (40, 192)


def packed_layer() -> NF4Linear:
    weight = random_weight(SHAPE)
    assert weight.nested_absmax is not None
    components = {
        Component.PACKED: weight.packed[:, None],
        Component.ABSMAX: weight.absmax,
        Component.NESTED_ABSMAX: weight.nested_absmax,
        Component.NESTED_QUANT_MAP: weight.nested_quant_map,
    }
    state = QuantState(64, FloatFormat.BF16, SHAPE, np.float32(weight.nested_offset))
    bias = torch.randn(SHAPE[0], generator=torch.Generator().manual_seed(1))
    return NF4Linear(SHAPE[1], SHAPE[0], components, state, bias)


def decoded_layer(layer: NF4Linear) -> nn.Linear:
    decoded = nn.Linear(layer.in_features, layer.out_features)
    with torch.no_grad():
        decoded.weight.copy_(layer.dequantize(torch.float32))
        decoded.bias.copy_(layer.bias)
    decoded.weight.requires_grad_(False)
    return decoded


def inputs(rows: int) -> Tensor:
    return torch.randn(rows, SHAPE[1], generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("rows", [3, 20])  # from the codes, and by decoding
@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_a_transform_gives_the_numbers_of_the_decoded_layer(name: str, with_gradients: bool, rows: int) -> None:
    layer = packed_layer()
    with torch.set_grad_enabled(with_gradients):
        assert same_numbers(CALLS[name], layer, decoded_layer(layer), inputs(rows))


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("name", TRACES)
def test_a_traced_program_gives_the_numbers_of_the_decoded_layer(name: str, with_gradients: bool) -> None:
    layer = packed_layer()
    with torch.set_grad_enabled(with_gradients):
        assert same_numbers(TRACES[name], layer, decoded_layer(layer), inputs(3))


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_derivative_is_that_of_the_decoded_layer(name: str) -> None:
    layer = packed_layer()
    assert same_numbers(GRADIENTS[name], layer, decoded_layer(layer), inputs(3))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_derivative_is_that_of_the_decoded_layer(name: str) -> None:
    layer = packed_layer()
    assert same_numbers(COMPILED[name], layer, decoded_layer(layer), inputs(3))


@pytest.mark.parametrize("name", CALLS)
def test_a_transform_in_inference_mode_gives_the_numbers_of_the_decoded_layer(name: str) -> None:
    layer = packed_layer()
    decoded = decoded_layer(layer)
    with torch.inference_mode():
        try:
            CALLS[name](decoded, inputs(3))
        except (RuntimeError, AssertionError):
            pytest.skip("torch's own layer does not work there")
        assert same_numbers(CALLS[name], layer, decoded, inputs(3))


@pytest.mark.parametrize("with_gradients", [True, False])
def test_fake_tensors_have_the_shape_and_dtype_of_the_output(with_gradients: bool) -> None:
    layer = packed_layer()
    with torch.set_grad_enabled(with_gradients), FakeTensorMode(allow_non_fake_inputs=True):
        y = layer(torch.empty(3, SHAPE[1]))
    assert (y.shape, y.dtype) == ((3, SHAPE[0]), torch.float32)


def test_an_operation_called_directly_has_a_tangent() -> None:
    layer = packed_layer()
    x, v = inputs(3), inputs(4)[:3]
    shape = (layer.out_features, layer.in_features)
    _, tangent = jvp(lambda x: torch.ops.qformat.linear_nf4(x, *layer._components(), *shape, layer.bias), (x,), (v,))
    assert torch.equal(tangent, v @ layer.dequantize(torch.float32).T)
    grad, w = inputs(3)[:, : SHAPE[0]].contiguous(), inputs(4)[:3, : SHAPE[0]].contiguous()
    _, tangent = jvp(
        lambda g: torch.ops.qformat.linear_nf4_input_gradient(g, *layer._components(), *shape), (grad,), (w,)
    )
    assert torch.equal(tangent, w @ layer.dequantize(torch.float32))


def test_operations_without_a_forward_mode_derivative_raise_instead_of_returning_zero() -> None:
    flat, x = random_weight(SHAPE, double_quant=False), inputs(3)
    parts = (flat.packed, flat.absmax, None, None, 0.0, 64, *SHAPE)
    grad = torch.ones(3, SHAPE[0])
    calls: dict[str, Callable[[Tensor], Any]] = {
        "gemv_nf4": lambda x: ops.gemv_nf4(x, *parts),
        "dequantize_nf4": lambda x: ops.dequantize_nf4(flat.packed, flat.absmax + x.sum(), *parts[2:], torch.float32),
        "linear_nf4": lambda x: ops.linear_nf4(x, flat.packed, flat.absmax + x.sum(), *parts[2:], None),
        "dequantize_nf4_into": lambda x: ops.dequantize_nf4_into(*parts[:6], x),
        "linear_nf4_scaled": lambda x: scaled_linear.linear_nf4_scaled(x, flat.packed, flat.absmax, 64, *SHAPE, None),
        "linear_nf4_scale_gradient": lambda x: scaled_linear.linear_nf4_scale_gradient(
            grad, x, flat.packed, flat.absmax, 64, *SHAPE
        ),
    }
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        for name, call in calls.items():
            with pytest.raises(UsageError, match="has no forward-mode derivative"):
                pytest.fail(f"{name} returned {call(dual)}")


def test_only_a_plain_call_may_bypass_the_dispatcher() -> None:
    x = torch.zeros(2)
    assert may_bypass_dispatcher(x)
    assert may_bypass_dispatcher(nn.Parameter(x))
    assert not may_bypass_dispatcher(x.as_subclass(transforms.Subclass))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("cpu"):
        assert may_bypass_dispatcher(x)
    for mode in (transforms.FunctionMode(), transforms.DispatchMode(), FakeTensorMode(), forward_ad.dual_level()):
        with mode:  # type: ignore[attr-defined]
            assert not may_bypass_dispatcher(x)
    assert may_bypass_dispatcher(x)


def test_one_row_has_the_gradients_of_many() -> None:
    layer, x = packed_layer(), inputs(3)
    layer(x[0]).sum().backward()
    assert torch.equal(layer.bias.grad, torch.ones(SHAPE[0]))


def test_ensembles_of_packed_weights_are_computed_one_by_one() -> None:
    layers, x = [packed_layer(), packed_layer()], inputs(3)
    layers[1].weight.data = layers[1].weight.flip(0)
    codes = torch.stack([layer.weight for layer in layers])
    with torch.no_grad():
        found = torch.vmap(lambda w: torch.func.functional_call(layers[0], {"weight": w}, (x,)))(codes)
        assert torch.equal(found, torch.stack([layer(x) for layer in layers]))
