"""The first stage of a conversion: computes every byte offset of the output from headers and recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from qformat import strict_json
from qformat.artifact.components import Component, PackedShape
from qformat.artifact.layout import Shard, natural_order, place
from qformat.artifact.limits import MAX_CONFIG_NBYTES, MAX_INDEX_NBYTES
from qformat.artifact.manifest import (
    FORMAT_VERSION,
    FileRecord,
    JsonObject,
    KeptRecord,
    Manifest,
    PackedRecord,
    TensorRecord,
)
from qformat.artifact.tensor_spec import TensorSpec
from qformat.codec.floats import FloatFormat
from qformat.converters.encode.refusals import (
    refuse_empty,
    refuse_names,
    refuse_quantized,
    refuse_unreadable,
    refuse_wrapped,
)
from qformat.converters.encode.small_files import config_bytes, index_bytes, small_json
from qformat.converters.encode.tasks import AdoptedTask, KeptTask, PackedTask, Place, Task, TensorDigests
from qformat.converters.rules import adoption
from qformat.converters.rules import recipe as recipes
from qformat.converters.rules.architectures import with_architectures
from qformat.converters.rules.recipe import NF4Options, Recipe
from qformat.converters.rules.skip_list import skip_modules
from qformat.converters.sources.source import PackedWeight, Source, SourceTensor
from qformat.errors import SourceError
from qformat.names import CONFIG_NAME, INDEX_NAME, MANIFEST_NAME
from qformat.version import __version__

LEFT_OUT = "left_out"
"""Member of the manifest's record of the source: why files and directories are not in the artifact, keyed by name."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Plan of a complete output, made before any weight is read.

    Attributes:
        tasks: One task per tensor, in the natural order of their names.
        shards: The shards with their headers and the offset of every component.
        small_files: Contents of the small files that the conversion writes, keyed by name.
        side_files: Sizes in bytes of the files to copy from the source, keyed by name.
        recipe: The recipe, as the manifest records it.
        source: The source, as the manifest records it.
        fingerprint: Digest of everything that determines the output bytes, except the weights.
        notes: What a user should know about the files of the source, one sentence each.
        left_out: Why files and directories of the source are not in the output, keyed by name.
    """

    tasks: tuple[Task, ...]
    shards: tuple[Shard, ...]
    small_files: Mapping[str, bytes]
    side_files: Mapping[str, int]
    recipe: JsonObject
    source: JsonObject
    fingerprint: str
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def packed(self) -> tuple[PackedTask, ...]:
        """The weights to encode."""
        return tuple(task for task in self.tasks if isinstance(task, PackedTask))

    @property
    def adopted(self) -> tuple[AdoptedTask, ...]:
        """The weights that are already in 4 bit."""
        return tuple(task for task in self.tasks if isinstance(task, AdoptedTask))

    @property
    def kept(self) -> tuple[KeptTask, ...]:
        """The tensors to copy."""
        return tuple(task for task in self.tasks if isinstance(task, KeptTask))

    @property
    def nbytes(self) -> int:
        """Size in bytes of the finished artifact: every file, the manifest included."""
        shards = sum(shard.nbytes for shard in self.shards)
        small = sum(len(data) for data in self.small_files.values()) + sum(self.side_files.values())
        return shards + small + self._manifest_nbytes()

    @property
    def source_nbytes(self) -> int:
        """Size in bytes of the source's tensors."""
        return sum(task.source_nbytes for task in self.tasks)

    @property
    def bits_per_weight(self) -> float:
        """Bits per quantized weight, counting all components. 0 if there are none."""
        weights: tuple[PackedTask | AdoptedTask, ...] = (*self.packed, *self.adopted)
        n_weights = sum(task.layout.n_elements for task in weights)
        nbytes = sum(place.nbytes for task in weights for place in task.places.values())
        return 8 * nbytes / n_weights if n_weights else 0.0

    def calibrated(self, record: JsonObject) -> Plan:
        """Return the plan of a calibrated conversion, which has the same layout.

        Args:
            record: Description of the calibration for the manifest.
        """
        fingerprint = hashlib.sha256((self.fingerprint + strict_json.dumps(record)).encode("utf-8")).hexdigest()
        return replace(self, recipe={**self.recipe, "calibration": record}, fingerprint=fingerprint)

    def manifest(self, digests: Mapping[str, TensorDigests], files: Mapping[str, FileRecord]) -> Manifest:
        """Return the manifest of the finished artifact.

        Args:
            digests: Digests of each tensor, keyed by name.
            files: Size and digests of each file, keyed by name.
        """
        return Manifest(
            tensors={task.source.name: _record(task, digests[task.source.name]) for task in self.tasks},
            files=files,
            recipe=self.recipe,
            source=self.source,
            generator=f"qformat {__version__}",
        )

    def _manifest_nbytes(self) -> int:
        """Return the manifest's size. Digests have a fixed length, so placeholders give the same size."""
        digests = {task.source.name: TensorDigests(dict.fromkeys(Component, "0" * 32), "0" * 32) for task in self.tasks}
        files = {shard.name: FileRecord(shard.nbytes, "0" * 64, "0" * 32) for shard in self.shards}
        files |= {name: FileRecord(len(data), "0" * 64) for name, data in self.small_files.items()}
        files |= {name: FileRecord(nbytes, "0" * 64) for name, nbytes in self.side_files.items()}
        return len(self.manifest(digests, files).to_bytes())


def make_plan(source: Source, recipe: Recipe, *, max_shard_nbytes: int) -> Plan:
    """Plan the conversion of a source.

    Args:
        source: The open source.
        recipe: Rules and default options. They do not apply to a source that is adopted.
        max_shard_nbytes: Largest size of a shard in bytes.

    Raises:
        SourceError: The checkpoint cannot be converted.
        UsageError: The recipe does not fit the checkpoint.
    """
    refuse_wrapped(source)
    refuse_empty(source)
    for tensor in source.tensors.values():
        refuse_quantized(source, tensor)
    adopted = {name: _adopted_tensor(source, name, weight) for name, weight in source.packed.items()}
    tensors = sorted([*source.tensors.values(), *adopted.values()], key=lambda tensor: natural_order(tensor.name))
    choices = adoption.choose(tensors, source) if adopted else recipes.apply(recipe, tensors, source.config)
    layouts = {
        tensor.name: _layout(tensor, options)
        for tensor in tensors
        if (options := choices[tensor.name].options) is not None
    }
    refuse_names(source, tensors, layouts)
    groups = [_components(tensor, layouts.get(tensor.name)) for tensor in tensors]
    shards = place([list(group.values()) for group in groups], max_shard_nbytes=max_shard_nbytes)
    places = {
        placed.tensor.name: Place(shard.name, placed.start, placed.tensor.nbytes)
        for shard in shards
        for placed in shard.tensors
    }
    tasks: list[Task] = []
    for tensor, group in zip(tensors, groups, strict=True):
        choice = choices[tensor.name]
        if tensor.name in adopted:
            where = {part: places[new.name] for part, new in group.items()}
            tasks.append(AdoptedTask(tensor, source.packed[tensor.name], where))
        elif tensor.name in layouts:
            where = {part: places[new.name] for part, new in group.items()}
            tasks.append(PackedTask(tensor, layouts[tensor.name], where, choice.vouched))
        else:
            assert choice.reason is not None
            tasks.append(KeptTask(tensor, places[tensor.name], choice.reason))
    described, note = with_architectures(source.config, list(choices), source.location)
    if adopted:
        quantization = adoption.quantization_config(choices, source)
        config = small_json({**described, "quantization_config": quantization}, python_numbers=True)
    else:
        config = config_bytes(described, skip_modules(choices, source.config), recipe, layouts)
    index = index_bytes(shards)
    refuse_unreadable(source, CONFIG_NAME, config, max_nbytes=MAX_CONFIG_NBYTES)
    refuse_unreadable(source, INDEX_NAME, index, max_nbytes=MAX_INDEX_NBYTES)
    small_files = {CONFIG_NAME: config, INDEX_NAME: index}
    canonical: JsonObject = {"adopted": source.kind} if adopted else _as_json(recipe.canonical())
    return Plan(
        tasks=tuple(tasks),
        shards=shards,
        small_files=small_files,
        side_files=source.side_files,
        recipe=canonical,
        source={**source.describe(), **({LEFT_OUT: {**source.left_out}} if source.left_out else {})},
        fingerprint=_fingerprint(source, shards, small_files),
        notes=tuple(source.notes) if note is None else (*source.notes, note),
        left_out=source.left_out,
    )


def _layout(tensor: SourceTensor, options: NF4Options) -> PackedShape:
    return PackedShape(tensor.shape, FloatFormat(tensor.dtype), options.block_size, options.double_quant)


def _adopted_tensor(source: Source, name: str, weight: PackedWeight) -> SourceTensor:
    file = weight.parts[Component.PACKED].file
    return SourceTensor(name, weight.layout.float_format.value, weight.layout.shape, file)


def _components(tensor: SourceTensor, layout: PackedShape | None) -> dict[Component, TensorSpec]:
    if layout is None:
        return {Component.PACKED: tensor}
    return layout.components(tensor.name)


def _record(task: Task, digests: TensorDigests) -> TensorRecord:
    if isinstance(task, KeptTask):
        return KeptRecord(task.source.dtype, task.source.shape, digests.source_xxh3, task.reason.value)
    components = {part: digests.components[part] for part in task.places}
    # The original 16-bit weight of an adopted one is not known.
    return PackedRecord(task.layout, components, digests.source_xxh3 if isinstance(task, PackedTask) else None)


def _as_json(value: Mapping[str, object]) -> JsonObject:
    parsed = strict_json.loads(
        strict_json.dumps(value).encode("utf-8"), path=MANIFEST_NAME, max_nbytes=2**24, error=SourceError
    )
    assert isinstance(parsed, dict)
    return parsed


def _fingerprint(source: Source, shards: tuple[Shard, ...], small_files: Mapping[str, bytes]) -> str:
    """Return a digest of everything that determines the output bytes, except the weights."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {__version__} {source.fingerprint()}".encode())
    for shard in shards:
        digest.update(shard.name.encode("utf-8") + shard.header)
    for name, data in sorted(small_files.items()):
        digest.update(name.encode("utf-8") + data)
    return digest.hexdigest()
