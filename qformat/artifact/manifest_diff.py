"""What differs between two artifacts, as far as their manifests tell: every digest is there, no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from qformat import strict_json
from qformat.artifact.components import Component
from qformat.artifact.manifest import KeptRecord, Manifest, PackedRecord, TensorRecord


class Aspect(StrEnum):
    """In what two tensors of the same name can differ."""

    SHAPE = "shape"
    DTYPE = "dtype"
    ENCODING = "encoding"
    """Packed in one and kept in the other, or packed with other options."""

    CODES = "codes"
    SCALES = "scales"
    DATA = "data"
    """The bytes of a kept tensor."""

    SOURCE = "source"
    """The source's bytes, where both manifests know them."""


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A tensor that both have, and in what it differs."""

    name: str
    aspects: tuple[Aspect, ...]


@dataclass(frozen=True, slots=True)
class ManifestDifference:
    """The result of `diff_manifests`. `members`: what differs besides tensors and files, with both values.

    n_tensors: that both have. n_sources: of these, how many have a source digest in both; n_same_sources: the same.
    changed_files: that both list with other bytes; shards are left out, since their tensors are compared.
    """

    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    tensors: tuple[TensorDifference, ...]
    n_tensors: int
    n_sources: int
    n_same_sources: int
    members: Mapping[str, tuple[strict_json.Json, strict_json.Json]]
    files_only_in_a: tuple[str, ...]
    files_only_in_b: tuple[str, ...]
    changed_files: tuple[str, ...]
    same_shards: bool

    @property
    def same_model(self) -> bool:
        """Whether both have the same tensors, by name and shape."""
        shapes = any(Aspect.SHAPE in tensor.aspects for tensor in self.tensors)
        return not (self.only_in_a or self.only_in_b or shapes)

    @property
    def same_source(self) -> bool | None:
        """Whether both were made from the same weights; None where the manifests do not tell of any tensor."""
        if not self.same_model:
            return False
        return None if self.n_sources == 0 else self.n_same_sources == self.n_sources

    @property
    def same_weights(self) -> bool:
        """Whether every tensor has the same bytes, wherever in the shards it lies."""
        return self.same_model and all(tensor.aspects == (Aspect.SOURCE,) for tensor in self.tensors)

    @property
    def equal(self) -> bool:
        """Whether the artifacts are the same, byte for byte."""
        files = self.files_only_in_a or self.files_only_in_b or self.changed_files
        return self.same_weights and not (self.tensors or self.members or files) and self.same_shards


def diff_manifests(a: Manifest, b: Manifest) -> ManifestDifference:
    """Compare two manifests."""
    common = [name for name in a.tensors if name in b.tensors]
    found = {name: _aspects(a.tensors[name], b.tensors[name]) for name in common}
    sources = [(_source(a.tensors[name]), _source(b.tensors[name])) for name in common]
    known = [(one, other) for one, other in sources if one is not None and other is not None]
    small = {name for manifest in (a, b) for name, file in manifest.files.items() if file.header_xxh3 is None}
    shards_a, shards_b = (
        {name: file for name, file in manifest.files.items() if file.header_xxh3 is not None} for manifest in (a, b)
    )
    return ManifestDifference(
        only_in_a=tuple(name for name in a.tensors if name not in b.tensors),
        only_in_b=tuple(name for name in b.tensors if name not in a.tensors),
        tensors=tuple(TensorDifference(name, aspects) for name, aspects in found.items() if aspects),
        n_tensors=len(common),
        n_sources=len(known),
        n_same_sources=sum(one == other for one, other in known),
        members=_members(a, b),
        files_only_in_a=tuple(sorted(small & a.files.keys() - b.files.keys())),
        files_only_in_b=tuple(sorted(small & b.files.keys() - a.files.keys())),
        changed_files=tuple(
            name for name in sorted(small & a.files.keys() & b.files.keys()) if a.files[name] != b.files[name]
        ),
        same_shards=shards_a == shards_b,
    )


def _aspects(a: TensorRecord, b: TensorRecord) -> tuple[Aspect, ...]:
    aspects: list[Aspect] = []
    shape_a, shape_b = (one.layout.shape if isinstance(one, PackedRecord) else one.shape for one in (a, b))
    dtype_a, dtype_b = (one.layout.float_format.value if isinstance(one, PackedRecord) else one.dtype for one in (a, b))
    if shape_a != shape_b:
        aspects.append(Aspect.SHAPE)
    if dtype_a != dtype_b:
        aspects.append(Aspect.DTYPE)
    if isinstance(a, PackedRecord) and isinstance(b, PackedRecord):
        if (a.layout.block_size, a.layout.double_quant) != (b.layout.block_size, b.layout.double_quant):
            aspects.append(Aspect.ENCODING)
        if a.components[Component.PACKED] != b.components[Component.PACKED]:
            aspects.append(Aspect.CODES)
        # The nested offset, a part of the scales, is in the quant_state.
        if _without_codes(a) != _without_codes(b):
            aspects.append(Aspect.SCALES)
    elif isinstance(a, KeptRecord) and isinstance(b, KeptRecord):
        if a.xxh3 != b.xxh3:
            aspects.append(Aspect.DATA)
    else:
        aspects.append(Aspect.ENCODING)
    source_a, source_b = _source(a), _source(b)
    if source_a is not None and source_b is not None and source_a != source_b:
        aspects.append(Aspect.SOURCE)
    return tuple(aspects)


def _without_codes(record: PackedRecord) -> dict[Component, str]:
    return {part: digest for part, digest in record.components.items() if part is not Component.PACKED}


def _source(record: TensorRecord) -> str | None:
    if isinstance(record, KeptRecord) and record.source_xxh3 is None:
        return record.xxh3
    return record.source_xxh3


def _members(a: Manifest, b: Manifest) -> dict[str, tuple[strict_json.Json, strict_json.Json]]:
    def members(manifest: Manifest) -> dict[str, strict_json.Json]:
        return {
            "format_version": manifest.format_version,
            "generator": manifest.generator,
            "source": manifest.source,
            "recipe": manifest.recipe,
            "evaluation": manifest.evaluation,
            **manifest.extra,
        }

    one, other = members(a), members(b)
    return {
        name: (one.get(name), other.get(name))
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
    }
