"""The fused node of base and adapter against its formula, and the cases in which PEFT's own code runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from qformat.errors import UsageError
from qformat.kernels.ops import dequantize_nf4
from qformat.model.load import load_model
from qformat.model.nf4_linear import NF4Linear
from qformat.training.adapter import lora_linear as module
from qformat.training.adapter.lora_linear import NF4LoraLinear, NF4Product, lora_linear
from tests.rounding import rounds_like, sum_error

pytestmark = pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")


@pytest.fixture(scope="module")
def layer(artifact: Path) -> NF4Linear:
    """A packed Linear with 64 inputs and 128 outputs."""
    model = load_model(artifact, device="cpu")
    found = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(found, NF4Linear)
    return found


def adapter(layer: NF4Linear, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    a = torch.randn(4, layer.in_features, generator=random) * 0.1
    b = torch.randn(layer.out_features, 4, generator=random) * 0.1
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


def product(layer: NF4Linear, bias: Tensor | None = None) -> NF4Product:
    return NF4Product(layer.held_weight(), bias)


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (64,), (1, 1, 64), (40, 64)], ids=str)
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_output_and_gradients_match_the_formula(
    layer: NF4Linear, shape: tuple[int, ...], dropped: bool, with_bias: bool
) -> None:
    random = torch.Generator().manual_seed(3)
    bias = torch.randn(layer.out_features, generator=random) if with_bias else None
    x, other = inputs(*shape), inputs(*shape, seed=2) if dropped else None
    a, b = adapter(layer)
    y = lora_linear(x, other, a, b, 0.5, product(layer, bias))
    grad = torch.randn(y.shape, generator=random)
    y.backward(grad)
    found = [y, *(t.grad for t in (x, other, a, b) if t is not None)]
    weight = layer.dequantize(torch.float32)
    tensors = (grad, weight, bias, x, other, a, b)
    exact, magnitudes = (by_formula(*tensors, of=of) for of in (torch.clone, torch.abs))
    # Each result is a sum of products, so the same sum of magnitudes bounds the rounding error. No chain of sums is
    # longer than all dimensions together. Seven more terms cover the bias, the factor and the sum of the two paths.
    off = sum_error(sum(weight.shape) + len(a) + x.shape[:-1].numel() + 7)
    for mine, theirs, magnitude in zip(found, exact, magnitudes, strict=True):
        assert mine is not None
        assert ((mine.double() - theirs).abs() <= off * magnitude).all()


def by_formula(
    grad: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, other: Tensor | None, a: Tensor, b: Tensor,
    *, of: Callable[[Tensor], Tensor],
) -> list[Tensor]:  # fmt: skip
    """Return y = x Wᵀ + bias + 0.5 other Aᵀ Bᵀ and its gradients by x, other, A, B, in float64.

    `of` is applied to each tensor first.
    """
    fixed = [None if t is None else of(t.double()) for t in (grad, weight, bias)]
    leaves = [None if t is None else of(t.detach().double()).requires_grad_() for t in (x, other, a, b)]
    x2, other2, a2, b2 = leaves
    y = nn.functional.linear(x2, fixed[1], fixed[2]) + 0.5 * (x2 if other2 is None else other2) @ a2.t() @ b2.t()
    y.backward(fixed[0])
    return [y.detach(), *(t.grad for t in leaves if t is not None)]


def test_gradients_have_the_dtypes_of_their_tensors(layer: NF4Linear) -> None:
    x = inputs(6, 64, dtype=torch.bfloat16)
    a, b = adapter(layer)
    y = lora_linear(x, None, a, b, 2.0, product(layer))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert a.grad is not None
    assert b.grad is not None
    assert (x.grad.dtype, a.grad.dtype, b.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_an_input_without_gradient_costs_no_product(layer: NF4Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.NF4Product, "input_gradient", lambda *_: pytest.fail("nobody asked for it"))
    a, b = adapter(layer)
    lora_linear(inputs(3, 64).detach(), None, a, b, 1.0, product(layer)).sum().backward()
    assert a.grad is not None


def test_an_input_without_rows_works(layer: NF4Linear) -> None:
    a, b = adapter(layer)
    y = lora_linear(inputs(0, 64), None, a, b, 1.0, product(layer))
    y.sum().backward()
    assert y.shape == (0, layer.out_features)
    assert a.grad is not None
    assert not a.grad.any()


def test_only_the_input_and_its_product_with_a_are_saved_for_backward(layer: NF4Linear) -> None:
    saved: list[Tensor] = []
    x = inputs(6, 64, dtype=torch.bfloat16)
    a, b = adapter(layer)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        lora_linear(x, None, a, b, 1.0, product(layer))
    assert sorted(tuple(t.shape) for t in saved) == sorted([(6, 64), (6, 4), (4, 64), (layer.out_features, 4)])
    assert any(t.data_ptr() == x.data_ptr() for t in saved)
    assert any(t.data_ptr() == a.data_ptr() for t in saved)


def test_autocast_computes_in_its_dtype(layer: NF4Linear) -> None:
    a, b = adapter(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(inputs(6, 64), None, a, b, 1.0, product(layer))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert a.grad is not None


def peft_model(artifact: Path, *, fused: bool = True, **options: Any) -> Any:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    if fused:
        config._register_custom_module({NF4Linear: NF4LoraLinear})
    torch.manual_seed(0)
    model = get_peft_model(load_model(artifact, device="cpu", dtype=torch.float32), config)
    random = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=random) * 0.05
    return model


def logits_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    tokens = torch.arange(40).reshape(2, 20)
    torch.manual_seed(5)
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    return output.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def in_float64(model: Any) -> Any:
    """Convert a model with PEFT's own layers to one that computes in float64 with the same weights."""
    for layer in list(model.modules()):
        base = getattr(layer, "base_layer", None)
        if isinstance(base, NF4Linear):
            layer.base_layer = nn.Linear(base.in_features, base.out_features, bias=False).requires_grad_(False)
            layer.base_layer.weight.copy_(base.dequantize(torch.float32))
    return model.double()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_dropout": 0.3},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
    ],
    ids=str,
)
def test_a_model_trains_the_same_as_with_pefts_own_layers(artifact: Path, options: dict[str, Any]) -> None:
    models = [peft_model(artifact, fused=fused, **options).train() for fused in (True, False, False)]
    models[2] = in_float64(models[2])
    (logits, gradients), (peers_logits, peers), (exact_logits, exact) = map(logits_and_gradients, models)
    assert rounds_like(logits, peers_logits, exact_logits)
    assert gradients.keys() == peers.keys() == exact.keys()
    for name, gradient in gradients.items():
        assert rounds_like(gradient, peers[name], exact[name]), name


def test_only_plain_adapters_use_the_fused_node(artifact: Path) -> None:
    chosen = {}
    for name, options in {"plain": {}, "dora": {"use_dora": True}, "bias": {"lora_bias": True}}.items():
        layers = [m for m in peft_model(artifact, **options).modules() if isinstance(m, NF4LoraLinear)]  # type: ignore[arg-type]
        assert layers
        chosen[name] = {layer._plain_adapter() for layer in layers}
    assert chosen == {"plain": {"default"}, "dora": {None}, "bias": {None}}


def test_peft_handles_a_disabled_adapter_and_two_adapters(artifact: Path) -> None:
    model = peft_model(artifact).eval()
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        adapted = model(tokens).logits
        with model.disable_adapter():
            plain = model(tokens).logits
        expected = load_model(artifact, device="cpu", dtype=torch.float32)(tokens).logits
    assert torch.equal(plain, expected)
    assert not torch.equal(adapted, plain)
    config = copy.deepcopy(model.peft_config["default"])
    config._register_custom_module({NF4Linear: NF4LoraLinear})
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    assert all(m._plain_adapter() is None for m in model.modules() if isinstance(m, NF4LoraLinear))
    exact = in_float64(peft_model(artifact, fused=False).eval())
    with torch.no_grad():
        assert rounds_like(model(tokens).logits, adapted, exact(tokens).logits)  # the second adapter is still zero


def test_merging_into_four_bits_is_rejected_with_an_alternative(artifact: Path) -> None:
    with pytest.raises(UsageError, match="qformat export"):
        peft_model(artifact).merge_and_unload()


def test_gradient_checkpointing_gives_the_same_bits(artifact: Path) -> None:
    results = []
    for checkpointing in (False, True):
        model = peft_model(artifact, lora_dropout=0.2).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        results.append(logits_and_gradients(model))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], gradient) for name, gradient in results[1][1].items())


def test_an_evaluation_between_two_steps_changes_no_gradient(artifact: Path) -> None:
    model = peft_model(artifact).train()
    _, before = logits_and_gradients(model)
    before = {name: gradient.clone() for name, gradient in before.items()}
    model.eval()
    with torch.no_grad():
        model(torch.arange(10)[None])
    model.train().zero_grad()
    _, after = logits_and_gradients(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_product_uses_the_decoded_weight(layer: NF4Linear) -> None:
    """The identity matrix as input gives the columns of the weight."""
    eye = torch.eye(64)
    a, b = adapter(layer)
    y = lora_linear(eye, None, a, torch.zeros_like(b), 1.0, product(layer))
    weight = dequantize_nf4(*layer._components(), layer.out_features, layer.in_features, torch.float32)
    assert torch.equal(y.t(), weight)
