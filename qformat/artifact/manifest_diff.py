"""Comparison of two artifacts by the digests in their manifests, without reading any weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from qformat import strict_json
from qformat.artifact.components import Component
from qformat.artifact.manifest import KeptRecord, Manifest, PackedRecord, TensorRecord


class Aspect(StrEnum):
    """Properties in which two tensors of the same name can differ."""

    SHAPE = "shape"
    DTYPE = "dtype"
    ENCODING = "encoding"
    """One tensor is packed and the other is kept, or both are packed with different options."""

    CODES = "codes"
    SCALES = "scales"
    DATA = "data"
    """Bytes of a kept tensor."""

    SOURCE = "source"
    """Bytes of the source tensor, if both manifests have their digest."""


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """Difference between two tensors of the same name.

    Attributes:
        name: Name of the tensor.
        aspects: Properties that differ.
    """

    name: str
    aspects: tuple[Aspect, ...]


@dataclass(frozen=True, slots=True)
class ManifestDifference:
    """Result of `diff_manifests`.

    Attributes:
        only_in_a: Tensors that only the first artifact has.
        only_in_b: Tensors that only the second artifact has.
        tensors: Tensors in both artifacts that differ.
        n_tensors: Number of tensors in both artifacts.
        n_sources: Number of those that have a source digest in both manifests.
        n_same_sources: Number of those whose source digests are equal.
        members: Other members of the manifests that differ, with both values.
        files_only_in_a: Files other than shards that only the first artifact has.
        files_only_in_b: Files other than shards that only the second artifact has.
        changed_files: Files other than shards that differ. Shards are compared by their tensors.
        same_shards: Whether the shards have the same names, sizes and digests.
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
        """Whether both artifacts have tensors of the same names and shapes."""
        shapes = any(Aspect.SHAPE in tensor.aspects for tensor in self.tensors)
        return not (self.only_in_a or self.only_in_b or shapes)

    @property
    def same_source(self) -> bool | None:
        """Whether both artifacts come from the same source weights; None if the manifests have no source digests."""
        if not self.same_model:
            return False
        return None if self.n_sources == 0 else self.n_same_sources == self.n_sources

    @property
    def same_weights(self) -> bool:
        """Whether every tensor has the same bytes. Its place in the shards does not matter."""
        return self.same_model and all(tensor.aspects == (Aspect.SOURCE,) for tensor in self.tensors)

    @property
    def equal(self) -> bool:
        """Whether the artifacts are byte-identical."""
        files = self.files_only_in_a or self.files_only_in_b or self.changed_files
        return self.same_weights and not (self.tensors or self.members or files) and self.same_shards


def diff_manifests(a: Manifest, b: Manifest) -> ManifestDifference:
    """Compare two manifests.

    Args:
        a: Manifest of the first artifact.
        b: Manifest of the second artifact.
    """
    common = [name for name in a.tensors if name in b.tensors]
    found = {name: _aspects(a.tensors[name], b.tensors[name]) for name in common}
    sources = [(_source(a.tensors[name]), _source(b.tensors[name])) for name in common]
    known = [(one, other) for one, other in sources if one is not None and other is not None]
    small = {name for manifest in (a, b) for name, file in manifest.files.items() if not file.is_shard}
    shards_a, shards_b = ({name: file for name, file in manifest.files.items() if file.is_shard} for manifest in (a, b))
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
        # The quant_state counts as part of the scales because it contains the nested offset.
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
