"""How the operations behave under torch's transforms: tracing, modes, `torch.func` and forward-mode derivatives.

Transforms work by intercepting calls in torch's dispatcher. A kernel reads and writes memory that the dispatcher does
not see, so there are two rules:

    code that calls a kernel directly       asks `may_bypass_dispatcher` first
    an operation in a derivative that its   computes with the decoded weight and operations of torch, which have all
    registered gradient does not cover      derivatives (`decode_in_transforms`), or raises an error

Without the second rule, forward-mode derivatives would be zero: torch does not ask a custom operation for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import (
    _get_function_stack_at,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import peek_interpreter_stack
from torch._library.autograd import make_autograd_impl
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils._device import DeviceContext

from qformat.errors import UsageError

_PLAIN_TYPES = (Tensor, nn.Parameter)

_AUTOGRAD_KEYS = ("AutogradCPU", "AutogradCUDA", "AutogradXPU", "AutogradMPS", "AutogradMeta")
"""The keys that precede the one for which torch registers a custom operation, on the devices that may hold a model."""

_library = torch.library.Library("qformat", "FRAGMENT")  # type: ignore[no-untyped-call]
"""The registrations of this module. They end with this object."""


def may_bypass_dispatcher(x: Tensor) -> bool:
    """Return whether a kernel can be called with x directly, because nothing wants to see or change the call.

    Takes less than 1 us. Calling an operation through the dispatcher takes 20 us.

    Args:
        x: Input of the kernel.

    Returns:
        False if x is of a subclass of `Tensor` (fake tensors are), or while a program is traced or compiled, a mode is
        active (except for a default device), or a transform of `torch.func` or forward-mode differentiation runs.
    """
    return (
        not is_compiling()  # first: the compiler evaluates it and drops the rest
        and type(x) in _PLAIN_TYPES
        and _len_torch_dispatch_stack() == 0
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and _get_tracing_state() is None
        and (_len_torch_function_stack() == 0 or _only_default_devices())
    )


def as_own_class(weight: Tensor) -> Tensor:
    """Return a parameter of a subclass as a tensor of torch's own class while a mode is active.

    `make_fx` refuses other classes. Without a mode the parameter stays what it is, so that programs which look at the
    tensors that autograd saves recognise it.

    Args:
        weight: Parameter of any class.
    """
    if is_compiling() or type(weight) in _PLAIN_TYPES:
        return weight
    if _len_torch_dispatch_stack() == 0 and _len_torch_function_stack() == 0:
        return weight
    plain: Tensor = Tensor._make_subclass(Tensor, weight)
    return plain


def as_autocast(x: Tensor) -> Tensor:
    """Return x in the dtype in which autocast computes products, or x itself outside of autocast."""
    if not _is_any_autocast_enabled():
        return x
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # as torch's own linear operation
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def decode_in_transforms(operation: Any, decoded: Callable[..., Tensor]) -> None:
    """Give a custom operation that is linear in its first argument the derivatives that its gradient does not cover.

    For inputs with a tangent (forward-mode derivatives) and in the derivatives of `torch.func`, it computes with the
    decoded weight. `torch.vmap` over the first argument becomes one call with more rows.

    Args:
        operation: Result of `torch.library.custom_op`. Its first argument is [..., K].
        decoded: Function with the arguments of the operation that computes the same with operations of torch.
    """

    def in_batches(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        first, *others = in_dims
        if first is not None and set(others) == {None}:
            return operation(args[0].movedim(first, 0), *args[1:]), 0
        singles = (
            [arg if dim is None else arg.select(dim, index) for arg, dim in zip(args, in_dims, strict=True)]
            for index in range(info.batch_size)
        )
        return torch.stack([operation(*single) for single in singles]), 0

    operation.register_vmap(in_batches)
    _replace_autograd(operation, decoded, lambda args: peek_interpreter_stack() is not None or _has_tangent(args))


def refuse_forward_mode(operation: Any) -> None:
    """Make a custom operation raise an error for inputs with a tangent, which it would otherwise ignore."""

    def refused(*_: Any) -> Tensor:
        raise UsageError(f"{operation._opoverload} has no forward-mode derivative")

    _replace_autograd(operation, refused, _has_tangent)


def _replace_autograd(
    operation: Any, replacement: Callable[..., Tensor], applies: Callable[[tuple[Any, ...]], bool]
) -> None:
    ordinary = make_autograd_impl(operation._opoverload, operation)

    def kernel(keyset: Any, *args: Any) -> Tensor:
        result: Tensor = replacement(*args) if applies(args) else ordinary(keyset, *args)
        return result

    for key in _AUTOGRAD_KEYS:
        _library.impl(operation._opoverload, kernel, key, with_keyset=True)  # type: ignore[no-untyped-call]


def _has_tangent(args: tuple[Any, ...]) -> bool:
    if forward_ad._current_level < 0:
        return False
    floats = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
    return any(forward_ad.unpack_dual(value).tangent is not None for value in floats)  # type: ignore[no-untyped-call]


def _only_default_devices() -> bool:
    """Return whether each active TorchFunctionMode only gives new tensors a device (`torch.set_default_device`)."""
    modes = (_get_function_stack_at(index) for index in range(_len_torch_function_stack()))
    return all(isinstance(mode, DeviceContext) for mode in modes)
