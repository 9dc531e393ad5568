"""Finds out how a model calls its decoder layers by running the model's forward with every layer's forward replaced.

Embeddings, positions, masks and rotary tables are left to the model: whatever it passes to a layer besides the hidden
states is recorded for each layer, and passed to that layer again later. This requires that a layer gets the output of
the layer before it unmodified, and that the other inputs do not depend on the text. Both are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from qformat.errors import first_line


class UnsupportedModelError(Exception):
    """The layers of the model cannot be run one by one. The text says why and continues a sentence about the model."""


@dataclass(frozen=True, slots=True)
class LayerCall:
    """Inputs of a layer besides the hidden states.

    Attributes:
        others: Further positional arguments.
        named: Keyword arguments.
        keyword: Name of the hidden states' argument, or None if they are the first positional one.
    """

    others: tuple[Any, ...]
    named: Mapping[str, Any]
    keyword: str | None

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Run a layer on hidden states [n, length, width] and return its output."""
        if self.keyword is None:
            output = layer(hidden, *self.others, **self.named)
        else:
            output = layer(*self.others, **{self.keyword: hidden}, **self.named)
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found

    def equals(self, other: LayerCall) -> bool:
        """Return whether two calls are the same, comparing tensors by value."""
        mine, my_shape = _pytree.tree_flatten((self.others, dict(self.named)))
        others, other_shape = _pytree.tree_flatten((other.others, dict(other.named)))
        return self.keyword == other.keyword and my_shape == other_shape and all(map(_same, mine, others))


@dataclass(frozen=True, slots=True)
class Recorded:
    """One run of a model.

    Attributes:
        hidden: Hidden states before the first layer, [n, length, width].
        calls: How each layer is called.
    """

    hidden: Tensor
    calls: tuple[LayerCall, ...]


def record_calls(decoder: nn.Module, layers: Sequence[nn.Module], ids: Tensor) -> Recorded:
    """Run a model on token ids and record how it calls its layers, which are not run.

    Args:
        decoder: The module that calls the layers.
        layers: The layers in order.
        ids: Token ids, int64 [n, length].

    Raises:
        UnsupportedModelError: The layers cannot be run one by one.
    """
    for in_tuples in (False, True):  # it is unknown what a layer returns; the wrong type fails in the next call
        found = _attempt(decoder, layers, ids, in_tuples=in_tuples)
        if found is not None:
            return found
    raise UnsupportedModelError("changes the hidden states between its layers, or calls them in another order")


def _attempt(decoder: nn.Module, layers: Sequence[nn.Module], ids: Tensor, *, in_tuples: bool) -> Recorded | None:
    seen: list[Tensor] = []
    calls: list[LayerCall] = []

    def stand_in(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, call = _split(args, kwargs)
            if index != len(calls) or (seen and hidden is not seen[-1]):
                raise _OtherCallError
            seen.append(hidden)
            calls.append(call)
            if len(calls) == len(layers):
                raise _AllCalledError
            return (hidden,) if in_tuples else hidden

        return forward

    with _forwards_replaced({layer: stand_in(index) for index, layer in enumerate(layers)}):
        try:
            decoder(input_ids=ids, use_cache=False)
        except _AllCalledError:
            return Recorded(seen[0], tuple(calls))
        except _OtherCallError:
            return None
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError, NotImplementedError) as error:
            if calls:  # it could not use the type that the layer returned
                return None
            raise UnsupportedModelError(f"cannot be run with token ids only: {first_line(error)}") from error
    return None


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, LayerCall]:
    if args and isinstance(args[0], Tensor):
        return args[0], LayerCall(args[1:], kwargs, None)
    for keyword in ("hidden_states", "x"):
        if isinstance(kwargs.get(keyword), Tensor):
            rest = {name: value for name, value in kwargs.items() if name != keyword}
            return kwargs[keyword], LayerCall(args, rest, keyword)
    raise UnsupportedModelError("calls its layers without hidden states")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and (one is other or bool(one == other))


@contextmanager
def _forwards_replaced(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    for module, forward in replacements.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in replacements:
            del module.forward  # restores the class's method


class _AllCalledError(Exception):
    """The last layer was called, so the rest of the model need not run."""


class _OtherCallError(Exception):
    """A layer was not called with the output of the layer before it."""
