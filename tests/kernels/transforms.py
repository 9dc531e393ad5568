"""The transforms of torch, each as a function that applies it to a layer: (layer, x) -> numbers.

Transforms that make a program are given another input than the one with which they traced it: a program that holds the
traced values as constants gives wrong numbers then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rounding import rounds_like

Transform = Callable[[nn.Module, Tensor], Any]


class Subclass(Tensor):
    pass


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def other(x: Tensor) -> Tensor:
    """Return a second input, or a direction in which to differentiate."""
    return x.flip(0) * 0.5 + 0.25


def squares(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x).square().sum()


def under(context: Callable[[], Any], layer: nn.Module, x: Tensor) -> Tensor:
    with context():
        y: Tensor = layer(x)
        return y


def deterministic(layer: nn.Module, x: Tensor) -> Tensor:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        y: Tensor = layer(x)
        return y
    finally:
        torch.use_deterministic_algorithms(before)


def changed_in_place(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x)
    return y.add_(1).mul_(2)


def with_forward_ad(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, other(x))))
        assert tangent is not None
        return y, tangent


def with_another_bias(layer: nn.Module, x: Tensor) -> Tensor:
    changed = {name: value + 1 for name, value in layer.named_parameters() if name.endswith("bias")}
    assert changed
    y: Tensor = functional_call(layer, changed, (x,))
    return y


def tangent_of_bias(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    (name, bias), *_ = ((name, value) for name, value in layer.named_parameters() if name.endswith("bias"))
    return jvp(lambda new: functional_call(layer, {name: new}, (x,)), (bias.detach(),), (bias.detach() + 1,))


def double_backward(layer: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(squares(layer)(x), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


def made_with_fake_tensors(tracing_mode: str, layer: nn.Module, x: Tensor) -> Any:
    return make_fx(layer, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(x)(other(x))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


CALLS: dict[str, Transform] = {
    "call": lambda layer, x: layer(x),
    "one row": lambda layer, x: layer(x[0]),
    "autocast": lambda layer, x: under(lambda: torch.autocast("cpu", torch.bfloat16), layer, x),
    "deterministic": deterministic,
    "changed in place": changed_in_place,
    "subclass": lambda layer, x: layer(x.as_subclass(Subclass)),
    "function mode": lambda layer, x: under(FunctionMode, layer, x),
    "dispatch mode": lambda layer, x: under(DispatchMode, layer, x),
    "default device": lambda layer, x: under(lambda: torch.device("meta"), layer, x),
    "functional_call": with_another_bias,
    "vmap": lambda layer, x: vmap(layer)(x),
    "vmap over columns": lambda layer, x: vmap(layer, in_dims=1, out_dims=1)(torch.stack((x, other(x)), 1)),
    "jvp": lambda layer, x: jvp(layer, (x,), (other(x),)),
    "jvp of the bias": tangent_of_bias,
    "forward_ad": with_forward_ad,
    "jacfwd": lambda layer, x: jacfwd(layer)(x),
    "vmap of jvp": lambda layer, x: vmap(lambda v: jvp(layer, (x,), (v,)))(torch.stack((x, other(x)))),
}
"""Transforms that work with and without gradients."""

TRACES: dict[str, Transform] = {
    "jit.trace": lambda layer, x: torch.jit.trace(layer, (x,), check_trace=False)(other(x)),
    "make_fx": lambda layer, x: make_fx(layer)(x)(other(x)),
    "make_fx, fake": lambda layer, x: make_fx(layer, tracing_mode="fake", _allow_non_fake_inputs=True)(x)(other(x)),
    "make_fx, symbolic": lambda layer, x: make_fx(layer, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)(
        other(x)
    ),
    "make_fx, before dispatch": lambda layer, x: make_fx(layer, pre_dispatch=True)(x)(other(x)),
    "make_fx of jvp": lambda layer, x: make_fx(lambda x: jvp(layer, (x,), (other(x),)))(x)(other(x)),
    "fx": lambda layer, x: torch.fx.symbolic_trace(layer)(x),
    "compile": lambda layer, x: compiled(layer)(x),
    "export": lambda layer, x: torch.export.export(layer, (x,)).module()(other(x)),
}
"""Transforms that make a program, with and without gradients."""

GRADIENTS: dict[str, Transform] = {
    "vjp": lambda layer, x: vjp(layer, x)[1](torch.ones_like(layer(x))),
    "grad": lambda layer, x: grad(squares(layer))(x),
    "gradients of samples": lambda layer, x: vmap(grad(squares(layer)))(x),
    "jacrev": lambda layer, x: jacrev(layer)(x),
    "hessian": lambda layer, x: hessian(squares(layer))(x[:2]),
    "jvp of grad": lambda layer, x: jvp(grad(squares(layer)), (x,), (other(x),)),
    "grad of jvp": lambda layer, x: grad(lambda x: jvp(squares(layer), (x,), (other(x),))[1])(x),
    "double backward": double_backward,
}
"""Transforms that need gradients."""

COMPILED: dict[str, Transform] = {
    "jvp": lambda layer, x: compiled(lambda x: jvp(layer, (x,), (other(x),)))(x),
    "gradients of samples": lambda layer, x: compiled(vmap(grad(squares(layer))))(x),
}
"""Transforms of `torch.func` in a compiled program. They take seconds."""


def same_numbers(transform: Transform, layer: nn.Module, decoded: nn.Module, x: Tensor) -> bool:
    """Return whether a transform of a packed layer gives the numbers of the decoded one, up to its rounding.

    Args:
        transform: One of the transforms above.
        layer: Packed layer.
        decoded: The same layer with a decoded weight, in float32. It is in float64 afterwards.
        x: Input, [M, K], float32.
    """
    found, peers = transform(layer, x), transform(decoded, x)
    exact = transform(decoded.double(), x.double())
    sides = [torch.utils._pytree.tree_leaves(side) for side in (found, peers, exact)]
    return len(sides[0]) == len(sides[1]) > 0 and all(
        type(ours) is type(peer)
        and (ours.dtype, ours.shape, ours.device) == (peer.dtype, peer.shape, peer.device)
        and rounds_like(ours, peer, right)
        for ours, peer, right in zip(*sides, strict=True)
    )
