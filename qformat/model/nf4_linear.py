"""A linear layer whose weight stays packed: its tensors are views of the artifact's file or of its copy on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qformat.artifact.components import Component
from qformat.codec import quant_state
from qformat.codec.quant_state import QuantState
from qformat.errors import UsageError
from qformat.kernels import ops
from qformat.kernels.dispatch import as_autocast, as_own_class, may_bypass_dispatcher
from qformat.kernels.held_weight import HeldWeight
from qformat.kernels.packed_weight import PackedWeight
from qformat.model.packed_parameter import Params4bit, encode_values

_BUFFERS = {
    Component.ABSMAX: "absmax",
    Component.NESTED_ABSMAX: "nested_absmax",
    Component.NESTED_QUANT_MAP: "nested_quant_map",
    Component.QUANT_MAP: "quant_map",
    Component.QUANT_STATE: "quant_state",
}
"""Buffer of each component other than the packed codes, which are the layer's `weight`."""

_FIXED = {
    "quant_map": "values of the codebook differ",
    "quant_state": "block size, shape or offset differ",
}
"""Buffers that the kernels do not read: they have the values that the layer was made with."""


class NF4Linear(nn.Linear):
    """`nn.Linear` with a 4-bit weight: y = x W^T + bias, with W decoded in the forward pass.

    `weight` is uint8 [ceil(n / 2), 1], two codes per byte, without a gradient. The other components are buffers under
    their names in the specification. `state_dict` returns the artifact's component names and bytes. A change of dtype
    (`.half()`, `.to(torch.float32)`) leaves the components unmodified; a change of device moves them.

    The class derives from `nn.Linear` so that PEFT wraps it in its ordinary LoRA layer. Adapters cannot be merged
    into it. `weight` is a `Params4bit`; if one with floating-point values is assigned, as OLoRA does, the layer encodes
    them and replaces all components. The file does not change.

    Attributes:
        absmax: uint8 [n_blocks] with double quantization, float32 [n_blocks] without.
        nested_absmax: float32 [ceil(n_blocks / 256)], or None without double quantization.
        nested_quant_map: float32 [256], or None without double quantization.
        block_size: Number of elements per block.
        nested_offset: Offset of the nested absmax, 0.0 without double quantization.
    """

    absmax: Tensor
    nested_absmax: Tensor | None
    nested_quant_map: Tensor | None
    block_size: int
    nested_offset: float
    _held_weight: HeldWeight | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        components: Mapping[Component, Tensor],
        state: QuantState,
        bias: Tensor | None = None,
    ) -> None:
        """Make the layer around existing tensors.

        Args:
            in_features: Size of the input.
            out_features: Size of the output.
            components: Tensors of the packed weight.
            state: Shape, block size and offset of the packed weight.
            bias: Bias [out_features], or None.

        Raises:
            UsageError: The shape of the weight is not [out_features, in_features].
        """
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate a float weight
        if tuple(state.shape) != (out_features, in_features):
            raise UsageError(f"weight has shape {list(state.shape)}, expected {[out_features, in_features]}")
        # Bypass `nn.Module.__setattr__` and `register_buffer`: a model has hundreds of these layers and should load in
        # milliseconds.
        self.__dict__.update(
            in_features=in_features,
            out_features=out_features,
            block_size=state.block_size,
            nested_offset=_offset_of(state),
            _held_weight=None,
        )
        self._parameters["bias"] = None if bias is None else nn.Parameter(bias)
        self._hold(components)
        self._non_persistent_buffers_set.update(_BUFFERS.values())

    def held_weight(self) -> HeldWeight:
        """Return the weight as the kernels take it. The components are checked at the first call."""
        held = self._held_weight
        if held is None or held.weight.packed is not self.weight:
            shape = (self.out_features, self.in_features)
            held = self._held_weight = HeldWeight(PackedWeight(*self._components(), shape))
        return held

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., in_features] times the transposed weight, plus bias: [..., out_features] in x's dtype."""
        if torch.is_grad_enabled() or not may_bypass_dispatcher(x):
            return self._dispatched(as_autocast(x))
        return ops.linear(as_autocast(x), self.held_weight(), self.bias)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return the decoded weight [out_features, in_features] as a new tensor in bf16, fp16 or fp32."""
        decoded: Tensor = ops.dequantize_nf4(*self._components(), self.out_features, self.in_features, dtype)
        return decoded

    @property
    def W_q(self) -> Tensor:
        """The packed codes. For DoRA, PEFT calls `dequantize` on layers that have an attribute of this name."""
        return self.weight

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, as an assignment to an attribute does. New values of the weight are encoded.

        Args:
            name: Name of the parameter.
            param: The parameter. A `Params4bit` in a floating-point dtype has values [out_features, in_features].

        Raises:
            UsageError: The values have another shape, or one is NaN or Inf.
        """
        if name == "weight" and isinstance(param, Params4bit) and param.is_floating_point():
            record = self._buffers["quant_state"]
            assert record is not None
            old = quant_state.parse(record.cpu().numpy().tobytes(), path=type(self).__name__, tensor=name)
            components, state = encode_values(param, old)
            self._hold(components)
            self.nested_offset = _offset_of(state)
            self._held_weight = None
        else:
            super().register_parameter(name, param)

    def extra_repr(self) -> str:
        """Return the text that `print(model)` shows for the layer."""
        levels = "one level" if self.nested_absmax is None else "double quantization"
        return f"{super().extra_repr()}, block_size={self.block_size}, {levels}"

    def _hold(self, components: Mapping[Component, Tensor]) -> None:
        self._parameters["weight"] = Params4bit(components[Component.PACKED])
        self._buffers.update((name, components.get(component)) for component, name in _BUFFERS.items())

    def _wrap_weight(self) -> None:
        """Give the weight its class back where torch has made an ordinary parameter of it."""
        weight = self._parameters["weight"]
        if type(weight) is nn.Parameter:
            self._parameters["weight"] = Params4bit(weight)

    def _dispatched(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product: Tensor = ops.linear_nf4(x, *self._components(), self.out_features, self.in_features, bias)
        return product

    def _components(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float, int]:
        return (
            as_own_class(self.weight),
            self.absmax,
            self.nested_absmax,
            self.nested_quant_map,
            self.nested_offset,
            self.block_size,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        """Move to another device but never change the dtype: components are bytes of a file format."""
        before = {name: getattr(self, name) for name in _BUFFERS.values()}
        streamed = not isinstance(self.weight, Params4bit)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not streamed:
            self._wrap_weight()
        for name, kept in before.items():
            moved = getattr(self, name)
            if kept is not None and moved.dtype != kept.dtype:
                setattr(self, name, kept.to(moved.device))
        self._held_weight = None
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for component, name in _BUFFERS.items():
            tensor = getattr(self, name)
            if tensor is not None:
                destination[f"{prefix}weight{component.value}"] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {f"{prefix}weight{component.value}": name for component, name in _BUFFERS.items()}
        rest = {key: value for key, value in state_dict.items() if key not in own}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._wrap_weight()
        for key, name in own.items():
            buffer = getattr(self, name)
            if key in state_dict and buffer is not None:
                if state_dict[key].shape != buffer.shape or state_dict[key].dtype != buffer.dtype:
                    error_msgs.append(f"{key}: shape {list(state_dict[key].shape)}, expected {list(buffer.shape)}")
                elif name in _FIXED and not torch.equal(state_dict[key].to(buffer.device), buffer):
                    error_msgs.append(f"{key}: {_FIXED[name]} from those of this layer")
                else:
                    buffer.copy_(state_dict[key])
            elif buffer is not None and strict:
                missing_keys.append(key)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_held_weight": None}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._wrap_weight()


def _offset_of(state: QuantState) -> float:
    return 0.0 if state.nested_offset is None else float(state.nested_offset)
