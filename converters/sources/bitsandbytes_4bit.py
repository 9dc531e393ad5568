"""The bitsandbytes source: a checkpoint that is already in NF4 and is adopted without re-encoding.

Codes and scales are copied byte for byte into the layout of an artifact. What bitsandbytes reads from the file is
checked: names, dtypes, shapes and the quant_state when the source is opened; the codebook and the scales' finiteness
while they are copied.
"""

from __future__ import annotations

from collections.abc import Mapping

from qformat.artifact.components import Component, PackedShape
from qformat.artifact.limits import MAX_DIMENSIONS, MAX_SIZE
from qformat.artifact.tensor_spec import ELEMENT_NBYTES, TensorSpec
from qformat.codec import quant_state
from qformat.codec.quant_state import QuantState
from qformat.converters.sources.encoded.decoding_source import DecodingSource
from qformat.converters.sources.source import PackedWeight, Source, SourceTensor
from qformat.errors import ArtifactError, Reason, SourceError
from qformat.names import CONFIG_NAME

_FP4_STATE = ".quant_state.bitsandbytes__fp4"
_STORAGE_DTYPES = ("U8", "BF16", "F16", "F32")
"""Dtypes that packed codes may be stored in (`bnb_4bit_quant_storage`). FSDP needs the dtype of the model."""


class Bitsandbytes4Bit(DecodingSource):
    """A checkpoint whose 4-bit weights are adopted. Its config keeps the quantization_config, which readers rely on."""

    kind = "bitsandbytes_4bit"

    def __init__(self, stored: Source) -> None:
        super().__init__(stored)
        self.config = stored.config
        for name, tensor in stored.tensors.items():
            if name.endswith(_FP4_STATE):
                raise SourceError(
                    Reason.QUANT_STATE,
                    stored.location / tensor.file,
                    "is in FP4, but only NF4 can be adopted, because an artifact has a single codebook",
                    tensor=name.removesuffix(_FP4_STATE),
                    next_step="Convert the original 16-bit checkpoint",
                )
        states = [name for name in stored.tensors if name.endswith(Component.QUANT_STATE)]
        names = [name.removesuffix(Component.QUANT_STATE) for name in states]
        if not names:
            raise SourceError(
                Reason.ALREADY_QUANTIZED,
                stored.location / CONFIG_NAME,
                "is for bitsandbytes, but no tensor is in NF4 (8-bit checkpoints cannot be adopted)",
                field="quantization_config",
                next_step="Convert the original 16-bit checkpoint",
            )
        self.packed: Mapping[str, PackedWeight] = {name: self._packed_weight(name) for name in names}
        parts = {part.name for weight in self.packed.values() for part in weight.parts.values()}
        parts |= {*states}
        self.tensors = {name: tensor for name, tensor in stored.tensors.items() if name not in parts}
        for name, tensor in self.tensors.items():
            if name.endswith(Component.ABSMAX):
                raise SourceError(
                    Reason.MISSING_COMPONENT,
                    stored.location / tensor.file,
                    f"{Component.QUANT_STATE.label} is missing from every shard",
                    tensor=name.removesuffix(Component.ABSMAX),
                    field=Component.QUANT_STATE.label,
                )

    def _packed_weight(self, name: str) -> PackedWeight:
        state = self._read_state(name)
        path = self.location / self.stored.tensors[name + Component.QUANT_STATE].file
        layout = PackedShape.of_state(state)
        if not name.endswith(".weight"):
            raise SourceError(Reason.QUANT_STATE, path, "is packed, but its name does not end in .weight", tensor=name)
        if len(state.shape) > MAX_DIMENSIONS or not 0 < layout.n_elements <= MAX_SIZE:
            problem = f"{list(state.shape)} has too many dimensions or elements, or none"
            raise SourceError(Reason.QUANT_STATE, path, problem, tensor=name, field="shape")
        components = layout.components(name)
        if len(state.to_json()) > components[Component.QUANT_STATE].nbytes:
            raise SourceError(Reason.QUANT_STATE, path, "quant_state is longer than an artifact allows", tensor=name)
        parts: dict[Component, SourceTensor] = {}
        for part, new in components.items():
            if part is Component.QUANT_STATE:
                continue
            found = self.stored.tensors.get(new.name)
            if found is None:
                raise SourceError(
                    Reason.MISSING_COMPONENT,
                    path,
                    f"{part.label} is missing from every shard",
                    tensor=name,
                    field=part.label,
                )
            self._check_part(name, part, found, new)
            parts[part] = found
        return PackedWeight(layout, state, parts)

    def _read_state(self, name: str) -> QuantState:
        tensor = self.stored.tensors[name + Component.QUANT_STATE]
        path = self.location / tensor.file
        if tensor.nbytes > quant_state.MAX_NBYTES:
            problem = f"quant_state has {tensor.nbytes} bytes, the limit is {quant_state.MAX_NBYTES}"
            raise SourceError(Reason.QUANT_STATE, path, problem, tensor=name)
        try:
            return quant_state.parse(bytes(self.read_whole(tensor)), path=path, tensor=name)
        except ArtifactError as error:
            raise SourceError(error.reason, path, error.problem, tensor=name, field=error.field) from None

    def _check_part(self, name: str, part: Component, found: SourceTensor, new: TensorSpec) -> None:
        path = self.location / found.file
        if part is Component.PACKED:
            # Codes stored as wider elements are padded to a full one; bitsandbytes reads a vector as a column.
            spare = found.nbytes - new.nbytes
            is_column = len(found.shape) == 1 or (len(found.shape) == 2 and found.shape[1] == 1)
            if found.dtype not in _STORAGE_DTYPES:
                expected = f"{found.dtype}, expected {' or '.join(_STORAGE_DTYPES)}"
                raise SourceError(Reason.COMPONENT_DTYPE, path, expected, tensor=name, field=part.label)
            if not is_column or not 0 <= spare < ELEMENT_NBYTES[found.dtype]:
                expected = f"{list(found.shape)} of {found.dtype}, expected {new.nbytes} bytes in a column"
                raise SourceError(Reason.COMPONENT_SHAPE, path, expected, tensor=name, field=part.label)
        elif found.dtype != new.dtype:
            expected = f"{found.dtype}, expected {new.dtype}"
            raise SourceError(Reason.COMPONENT_DTYPE, path, expected, tensor=name, field=part.label)
        elif found.shape != new.shape:
            expected = f"{list(found.shape)}, expected {list(new.shape)}"
            raise SourceError(Reason.COMPONENT_SHAPE, path, expected, tensor=name, field=part.label)
