"""Names, dtypes and shapes of the components of a packed tensor, as bitsandbytes writes them (spec section 3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from qformat.artifact.tensor_spec import TensorSpec
from qformat.codec import quant_state
from qformat.codec.floats import FloatFormat
from qformat.codec.nested import NESTED_BLOCK_SIZE
from qformat.codec.nf4 import block_count, packed_nbytes
from qformat.codec.quant_state import QuantState


class Component(StrEnum):
    """Components of a packed tensor `X.weight`. The value is the suffix that follows `X.weight` in a shard."""

    PACKED = ""
    ABSMAX = ".absmax"
    NESTED_ABSMAX = ".nested_absmax"
    NESTED_QUANT_MAP = ".nested_quant_map"
    QUANT_MAP = ".quant_map"
    QUANT_STATE = ".quant_state.bitsandbytes__nf4"

    @property
    def label(self) -> str:
        """Name in manifests and messages: `packed`, `absmax`, ..., `quant_state`."""
        return _LABELS[self]


_LABELS = {part: part.name.lower() for part in Component}

SINGLE_LEVEL = (Component.PACKED, Component.ABSMAX, Component.QUANT_MAP, Component.QUANT_STATE)
DOUBLE_QUANT = tuple(Component)


@dataclass(frozen=True, slots=True)
class PackedShape:
    """Properties of a packed tensor that determine its components.

    Attributes:
        shape: Shape of the weight.
        float_format: Float format of the source tensor.
        block_size: Number of elements per block.
        double_quant: Whether the absmax values are quantized as well.
    """

    shape: tuple[int, ...]
    float_format: FloatFormat
    block_size: int
    double_quant: bool

    @classmethod
    def of_state(cls, state: QuantState) -> PackedShape:
        """Return the properties of the tensor that a quant_state describes."""
        return cls(state.shape, state.float_format, state.block_size, state.nested_offset is not None)

    def state(self, *, nested_offset: float | None) -> QuantState:
        """Return the quant_state of a tensor with these properties.

        Args:
            nested_offset: Mean of the absmax values with double quantization, otherwise None.
        """
        assert (nested_offset is not None) == self.double_quant
        return QuantState(self.block_size, self.float_format, self.shape, nested_offset)

    @property
    def n_elements(self) -> int:
        """Number of elements of the weight."""
        return math.prod(self.shape)

    @property
    def n_blocks(self) -> int:
        """Number of blocks, including a partial last one."""
        return block_count(self.n_elements, self.block_size)

    @property
    def n_nested_blocks(self) -> int:
        """Number of groups of absmax values that share a nested absmax."""
        return block_count(self.n_blocks, NESTED_BLOCK_SIZE)

    def components(self, name: str) -> dict[Component, TensorSpec]:
        """Return the name, dtype and shape of every component of the packed tensor `name` in a shard."""
        state_nbytes = quant_state.padded_nbytes(
            block_size=self.block_size,
            float_format=self.float_format,
            shape=self.shape,
            double_quant=self.double_quant,
        )
        layout: dict[Component, tuple[str, tuple[int, ...]]] = {
            Component.PACKED: ("U8", (packed_nbytes(self.n_elements), 1)),
            Component.ABSMAX: ("U8" if self.double_quant else "F32", (self.n_blocks,)),
            Component.NESTED_ABSMAX: ("F32", (self.n_nested_blocks,)),
            Component.NESTED_QUANT_MAP: ("F32", (256,)),
            Component.QUANT_MAP: ("F32", (16,)),
            Component.QUANT_STATE: ("U8", (state_nbytes,)),
        }
        present = DOUBLE_QUANT if self.double_quant else SINGLE_LEVEL
        return {part: TensorSpec(name + part, *layout[part]) for part in present}
