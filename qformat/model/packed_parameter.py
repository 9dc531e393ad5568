"""The weight of a packed layer as PEFT knows it, and the encoding of new values for such a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qformat.artifact.components import Component, PackedShape
from qformat.artifact.packed_arrays import encode_plain
from qformat.codec.floats import FloatFormat
from qformat.codec.quant_state import QuantState
from qformat.errors import UsageError


class Params4bit(nn.Parameter):
    """The codes of a packed weight, uint8, or new floating-point values for it. It never has a gradient.

    PEFT recognises a 4-bit weight by the name of its class, which is that of bitsandbytes. For OLoRA it makes another
    instance, from the changed values, and assigns it to the layer. `NF4Linear` then encodes the values as it encoded
    the old ones, so PEFT's arguments about the encoding have no effect.

    Saving and pickling write an ordinary parameter, which `torch.load(..., weights_only=True)` reads.
    """

    quant_type = "nf4"
    quant_storage = torch.uint8
    compress_statistics = None
    module = None

    def __new__(cls, data: Tensor, requires_grad: bool = False, **_options: Any) -> Params4bit:
        """Wrap a tensor. Nothing is copied.

        Args:
            data: Codes or values.
            requires_grad: Ignored: a packed weight is not trained.
            **_options: Options of bitsandbytes' class, ignored.
        """
        made: Params4bit = super().__new__(cls, data, False)
        return made


def encode_values(values: Tensor, state: QuantState) -> tuple[dict[Component, Tensor], QuantState]:
    """Encode new values of a packed weight as a conversion of float32 weights does.

    Args:
        values: Values [out_features, in_features] in any floating-point dtype, on any device.
        state: quant_state of the weight. The new one has the same shape, block size, float format and levels.

    Returns:
        The components, on the device of the values, and the new quant_state.

    Raises:
        UsageError: The shape differs, or a value is NaN or Inf.
    """
    if tuple(values.shape) != state.shape:
        raise UsageError(f"weight has shape {list(values.shape)}, expected {list(state.shape)}")
    raw = values.detach().to("cpu", torch.float32).contiguous().numpy().reshape(-1)
    if not np.isfinite(raw).all():
        raise UsageError("the new weight contains NaN or Inf, which cannot be encoded")
    encoded = encode_plain(raw, replace(PackedShape.of_state(state), float_format=FloatFormat.F32))
    encoded = replace(encoded, state=replace(encoded.state, float_format=state.float_format))
    return _tensors(encoded.components(), values.device), encoded.state


def _tensors(components: Mapping[Component, Any], device: torch.device) -> dict[Component, Tensor]:
    """Return components as tensors with memory of their own."""
    tensors = {part: torch.from_numpy(np.array(array)).to(device) for part, array in components.items()}
    tensors[Component.PACKED] = tensors[Component.PACKED].view(-1, 1)
    return tensors
