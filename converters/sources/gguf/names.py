"""Maps the tensors of a GGUF file to transformers' names, with what llama.cpp's converter did to each.

Tested against gguf-py's table of names and against transformers' conversion of the same files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qformat.artifact.manifest import JsonObject
from qformat.converters.sources.gguf.architectures import (
    ARCHITECTURES,
    LONG_FACTORS_NAME,
    ROPE_FACTORS_NAME,
    SHORT_FACTORS_NAME,
    Architecture,
    Part,
)
from qformat.converters.sources.gguf.config import config_of
from qformat.converters.sources.gguf.header import GgufHeader, GgufTensor
from qformat.converters.sources.gguf.metadata import Metadata
from qformat.converters.sources.gguf.rope import ReadVector
from qformat.converters.sources.gguf.sizes import Sizes, read_sizes
from qformat.errors import Reason, SourceError

_IN_CONFIG = {ROPE_FACTORS_NAME, LONG_FACTORS_NAME, SHORT_FACTORS_NAME}
"""Tensors that become part of config.json."""


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor of the model and its stored form.

    Attributes:
        name: Name in transformers.
        shape: Shape in transformers.
        stored: Tensor in the file.
        expert: Index of its matrix in `stored`, or None if it is all of `stored`.
        n_heads: Number of heads whose rows llama.cpp permuted. 0 if it did not.
        offset: What llama.cpp added to every value.
    """

    name: str
    shape: tuple[int, ...]
    stored: GgufTensor
    expert: int | None = None
    n_heads: int = 0
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A model as transformers describes it.

    Attributes:
        config: Contents of config.json without the dtype.
        tensors: All tensors of the model.
        architecture: Architecture of the model.
    """

    config: JsonObject
    tensors: tuple[NamedTensor, ...]
    architecture: Architecture


def name_model(header: GgufHeader, path: Path, read_vector: ReadVector) -> GgufModel:
    """Map a GGUF file to a transformers model.

    Args:
        header: Header of the file.
        path: Path of the file, for messages.
        read_vector: Reads a vector of the file.

    Raises:
        SourceError: The architecture, a tensor, a shape or the metadata is not supported.
    """
    metadata = Metadata(header.metadata, path)
    name = metadata.text("general.architecture")
    if name not in ARCHITECTURES:
        raise SourceError(
            Reason.UNSUPPORTED_SOURCE, path,
            f"architecture {name!r} is not supported (supported: {', '.join(ARCHITECTURES)})",
            field="general.architecture", next_step="Convert the original 16-bit checkpoint",
        )  # fmt: skip
    architecture = ARCHITECTURES[name]
    metadata.prefix = name
    sizes = read_sizes(metadata, header, architecture)
    config = config_of(metadata, header, architecture, sizes, read_vector)
    return GgufModel(config, _tensors(header, path, architecture, sizes), architecture)


def _tensors(header: GgufHeader, path: Path, architecture: Architecture, sizes: Sizes) -> tuple[NamedTensor, ...]:
    expected = dict(architecture.outside)
    for layer, has_attention in enumerate(sizes.has_attention):
        parts = {**architecture.parts, **(architecture.attention if has_attention else architecture.convolution)}
        for name, part in parts.items():
            named = f"model.layers.{layer}.{part.name}"
            expected[f"blk.{layer}.{name}"] = Part(named, part.shape, part.required, part.new_axis)
    for name, part in expected.items():
        if part.required and name not in header.tensors:
            raise SourceError(Reason.MISSING_COMPONENT, path, "is missing", tensor=name)
    found: list[NamedTensor] = []
    for name, stored in header.tensors.items():
        if name in _IN_CONFIG:
            continue
        if name not in expected:
            raise SourceError(
                Reason.UNKNOWN_TENSOR, path,
                f"is not part of a {architecture.model_type} model with {sizes.n_layers} layers", tensor=name,
            )  # fmt: skip
        part = expected[name]
        shape = tuple(sizes.letters[letter] for letter in part.shape)
        if stored.shape != shape:
            problem = f"shape {list(stored.shape)}, expected {list(shape)}"
            raise SourceError(Reason.COMPONENT_SHAPE, path, problem, tensor=name)
        found += _named(stored, part, architecture, sizes)
    return tuple(found)


def _named(stored: GgufTensor, part: Part, architecture: Architecture, sizes: Sizes) -> Iterator[NamedTensor]:
    if "{}" in part.name:
        for expert in range(stored.shape[0]):
            yield NamedTensor(part.name.format(expert), stored.shape[1:], stored, expert)
        return
    n_heads = 0
    if architecture.permuted:
        n_heads = {"q_proj": sizes.letters["n"], "k_proj": sizes.letters["g"]}.get(part.name.split(".")[-2], 0)
    axis = part.new_axis
    shape = stored.shape if axis is None else (*stored.shape[:axis], 1, *stored.shape[axis:])
    offset = architecture.norm_offset if stored.name.endswith("norm.weight") else 0.0
    yield NamedTensor(part.name, shape, stored, None, n_heads, offset)
