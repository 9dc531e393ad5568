"""Every transform of torch gives the numbers of PEFT's layer around the decoded weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from qformat.model.nf4_linear import NF4Linear
from qformat.training.adapter.lora_linear import NF4LoraLinear
from tests.kernels.test_transforms import decoded_layer, inputs, packed_layer
from tests.kernels.transforms import CALLS, GRADIENTS, TRACES, Transform, same_numbers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

# torch.fx cannot trace PEFT's layer, which branches on its arguments.
SLOW_TRACES = [pytest.param(name, marks=pytest.mark.slow) for name in TRACES if name != "fx"]


def with_lora(layer: nn.Module) -> Any:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    config._register_custom_module({NF4Linear: NF4LoraLinear})
    wrapped: Any = get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    random = torch.Generator().manual_seed(2)
    for matrix in (wrapped.lora_A["default"], wrapped.lora_B["default"]):
        matrix.weight.data = torch.randn(matrix.weight.shape, generator=random) * 0.1
    return wrapped.eval()


def run(transform: Transform, x: Tensor) -> None:
    layer = packed_layer()
    packed, decoded = with_lora(layer), with_lora(decoded_layer(layer))
    assert type(packed) is NF4LoraLinear
    assert same_numbers(transform, packed, decoded, x)


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("name", [*CALLS, *SLOW_TRACES])
def test_a_transform_gives_the_numbers_of_the_decoded_layer(name: str, with_gradients: bool) -> None:
    with torch.set_grad_enabled(with_gradients):
        run({**CALLS, **TRACES}[name], inputs(3))


@pytest.mark.parametrize("name", sorted(GRADIENTS.keys() - {"double backward"}))
def test_a_derivative_is_that_of_the_decoded_layer(name: str) -> None:
    run(GRADIENTS[name], inputs(3))


def test_a_second_derivative_of_the_fused_node_is_refused() -> None:
    layer, x = with_lora(packed_layer()), inputs(3).requires_grad_()
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()
