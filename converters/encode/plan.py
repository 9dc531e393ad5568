"""The first step of a conversion: from headers and recipe to every byte offset of the output. Reads no weight."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import qformat
from qformat import strict_json
from qformat.artifact.components import Component, PackedShape
from qformat.artifact.layout import Shard, natural_order, place
from qformat.artifact.limits import MAX_CONFIG_NBYTES, MAX_INDEX_NBYTES, MAX_NAME_NBYTES
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
from qformat.converters.rules import adoption
from qformat.converters.rules import recipe as recipes
from qformat.converters.rules.recipe import NF4Options, Recipe
from qformat.converters.rules.rules import KeepReason, module_path, skip_modules
from qformat.converters.sources.source import PackedWeight, Source, SourceTensor
from qformat.errors import Reason, SourceError
from qformat.names import CONFIG_NAME, INDEX_NAME, MANIFEST_NAME

_QUANTIZED_SUFFIXES = {
    ".absmax": "bitsandbytes",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes",
    ".SCB": "bitsandbytes int8",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors or fp8",
    ".weight_scale_inv": "fp8 with block scales",
    "_blocks": "MXFP4",
}

_REGEX_SYNTAX = re.compile(r"[][\\^$*+?{}|()]")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a component goes: a shard and the byte range in its file."""

    shard: str
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _SourceTask:
    """What every task has: the tensor of the source that it is about."""

    source: SourceTensor

    @property
    def source_nbytes(self) -> int:
        """Bytes that the task reads from the source."""
        return self.source.nbytes


@dataclass(frozen=True, slots=True)
class PackedTask(_SourceTask):
    """A weight to encode, and where each of its components goes. `vouched`: only the recipe says it is a Linear."""

    layout: PackedShape
    places: Mapping[Component, Place]
    vouched: bool


@dataclass(frozen=True, slots=True)
class KeptTask(_SourceTask):
    """A tensor to copy bit for bit, where it goes, and why it is kept."""

    place: Place
    reason: KeepReason


@dataclass(frozen=True, slots=True)
class AdoptedTask(_SourceTask):
    """A weight that the source has in 4 bit already: its components are copied, and where each of them goes.

    `source` stands for all of them: its shape and dtype are the weight's.
    """

    weight: PackedWeight
    places: Mapping[Component, Place]

    @property
    def source_nbytes(self) -> int:
        """Bytes of the components that are copied."""
        return self.weight.nbytes

    @property
    def layout(self) -> PackedShape:
        """Layout of the weight."""
        return self.weight.layout


Task = PackedTask | AdoptedTask | KeptTask


@dataclass(frozen=True, slots=True)
class TensorDigests:
    """What executing a task found: XXH3-128 of each component, or of the kept tensor, and of the source's bytes.

    Those of an adopted weight are its stored components, one after another.
    """

    components: Mapping[Component, str]
    source_xxh3: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A complete output, known before any weight is read: tasks, shards, small files, and the exact final size."""

    tasks: tuple[Task, ...]
    shards: tuple[Shard, ...]
    small_files: Mapping[str, bytes]
    side_files: Mapping[str, int]
    recipe: JsonObject
    source: JsonObject
    fingerprint: str

    @property
    def packed(self) -> tuple[PackedTask, ...]:
        """The weights to encode."""
        return tuple(task for task in self.tasks if isinstance(task, PackedTask))

    @property
    def adopted(self) -> tuple[AdoptedTask, ...]:
        """The weights that are in 4 bit already."""
        return tuple(task for task in self.tasks if isinstance(task, AdoptedTask))

    @property
    def kept(self) -> tuple[KeptTask, ...]:
        """The tensors to copy."""
        return tuple(task for task in self.tasks if isinstance(task, KeptTask))

    @property
    def nbytes(self) -> int:
        """Size of the finished artifact in bytes: every file, the manifest included."""
        shards = sum(shard.nbytes for shard in self.shards)
        small = sum(len(data) for data in self.small_files.values()) + sum(self.side_files.values())
        return shards + small + self._manifest_nbytes()

    @property
    def source_nbytes(self) -> int:
        """Bytes of the source's tensors."""
        return sum(task.source_nbytes for task in self.tasks)

    @property
    def bits_per_weight(self) -> float:
        """Bits that an encoded weight takes, all components counted; 0 without any."""
        weights: tuple[PackedTask | AdoptedTask, ...] = (*self.packed, *self.adopted)
        n_weights = sum(task.layout.n_elements for task in weights)
        nbytes = sum(place.nbytes for task in weights for place in task.places.values())
        return 8 * nbytes / n_weights if n_weights else 0.0

    def calibrated(self, record: JsonObject) -> Plan:
        """Return the plan of the same bytes with codes chosen as `record`, which the manifest will tell, says."""
        fingerprint = hashlib.sha256((self.fingerprint + strict_json.dumps(record)).encode("utf-8")).hexdigest()
        return replace(self, recipe={**self.recipe, "calibration": record}, fingerprint=fingerprint)

    def manifest(self, digests: Mapping[str, TensorDigests], files: Mapping[str, FileRecord]) -> Manifest:
        """Return the manifest of the finished artifact."""
        return Manifest(
            tensors={task.source.name: _record(task, digests[task.source.name]) for task in self.tasks},
            files=files,
            recipe=self.recipe,
            source=self.source,
            generator=f"qformat {qformat.__version__}",
        )

    def _manifest_nbytes(self) -> int:
        """Digests have a fixed length, so that a manifest of empty ones is as long as the real one."""
        digests = {task.source.name: TensorDigests(dict.fromkeys(Component, "0" * 32), "0" * 32) for task in self.tasks}
        files = {shard.name: FileRecord(shard.nbytes, "0" * 64, "0" * 32) for shard in self.shards}
        files |= {name: FileRecord(len(data), "0" * 64) for name, data in self.small_files.items()}
        files |= {name: FileRecord(nbytes, "0" * 64) for name, nbytes in self.side_files.items()}
        return len(self.manifest(digests, files).to_bytes())


def make_plan(source: Source, recipe: Recipe, *, max_shard_nbytes: int) -> Plan:
    """Plan the conversion of a source.

    Raises: SourceError for a checkpoint that cannot be converted; UsageError for a recipe that does not fit it.
    """
    for tensor in source.tensors.values():
        _refuse_quantized(source, tensor)
    adopted = {name: _adopted_tensor(source, name, weight) for name, weight in source.packed.items()}
    tensors = sorted([*source.tensors.values(), *adopted.values()], key=lambda tensor: natural_order(tensor.name))
    choices = adoption.choose(recipe, tensors, source) if adopted else recipes.apply(recipe, tensors, source.config)
    layouts = {
        tensor.name: _layout(tensor, options)
        for tensor in tensors
        if (options := choices[tensor.name].options) is not None
    }
    _refuse_names(source, tensors, layouts)
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
    if adopted:
        config = small_json({**source.config, "quantization_config": adoption.quantization_config(choices, source)})
    else:
        config = _config_bytes(source.config, skip_modules(choices, source.config), recipe, layouts)
    index = index_bytes(shards)
    _refuse_unreadable(source, CONFIG_NAME, config, max_nbytes=MAX_CONFIG_NBYTES)
    _refuse_unreadable(source, INDEX_NAME, index, max_nbytes=MAX_INDEX_NBYTES)
    small_files = {CONFIG_NAME: config, INDEX_NAME: index}
    canonical: JsonObject = {"adopted": source.kind} if adopted else _as_json(recipe.canonical())
    return Plan(
        tasks=tuple(tasks),
        shards=shards,
        small_files=small_files,
        side_files=source.side_files,
        recipe=canonical,
        source=source.describe(),
        fingerprint=_fingerprint(source, shards, small_files),
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


def _refuse_quantized(source: Source, tensor: SourceTensor) -> None:
    path = source.location / tensor.file
    for suffix, kind in _QUANTIZED_SUFFIXES.items():
        if tensor.name.endswith(suffix):
            raise SourceError(
                Reason.ALREADY_QUANTIZED, path, f"the checkpoint is quantized already ({kind})", tensor=tensor.name,
                next_step="Convert the 16-bit checkpoint that it was made from",
            )  # fmt: skip
    if tensor.name.endswith(".weight") and tensor.dtype not in {"BF16", "F16", "F32"}:
        what = "8-bit floats" if tensor.dtype.startswith("F8") else tensor.dtype
        raise SourceError(
            Reason.UNSUPPORTED_DTYPE, path, f"{what} weights cannot be converted", tensor=tensor.name, field="dtype",
            next_step="Save the checkpoint in bfloat16, float16 or float32 first",
        )  # fmt: skip


def _refuse_names(source: Source, tensors: Sequence[SourceTensor], layouts: Mapping[str, PackedShape]) -> None:
    """Refuse a name that a component must get, one too long for a component's suffix, and one with regex syntax."""
    for tensor in tensors:
        path = source.location / tensor.file
        if tensor.name.endswith(".weight") and (found := _REGEX_SYNTAX.search(tensor.name)):
            raise SourceError(
                Reason.SKIP_MODULES,
                path,
                f"readers take the names of 16-bit modules as regular expressions, and {found[0]!r} is their syntax",
                tensor=tensor.name,
                next_step="Rename the module",
            )
        if tensor.name not in layouts:
            continue
        for part in Component:
            name = tensor.name + part.value
            if part is not Component.PACKED and name in source.tensors:
                raise SourceError(
                    Reason.DUPLICATE_TENSOR,
                    path,
                    f"has the name that the {part.label} of {tensor.name!r} must get",
                    tensor=name,
                    next_step=f"Keep that one as it is with --skip {module_path(tensor.name)!r}",
                )
            if len(name.encode("utf-8")) > MAX_NAME_NBYTES:
                raise SourceError(
                    Reason.HEADER_LIMIT,
                    path,
                    f"the name of its {part.label} would have more than {MAX_NAME_NBYTES} bytes",
                    tensor=tensor.name,
                    next_step="Keep it as it is with --skip",
                )


def _refuse_unreadable(source: Source, name: str, data: bytes, *, max_nbytes: int) -> None:
    """Refuse what would be written but not read again: a file that is larger than a reader takes."""
    path = source.location / f"{name} (as it would be written)"
    strict_json.loads(data, path=path, max_nbytes=max_nbytes, error=SourceError)


def _record(task: Task, digests: TensorDigests) -> TensorRecord:
    if isinstance(task, KeptTask):
        return KeptRecord(task.source.dtype, task.source.shape, digests.source_xxh3, task.reason.value)
    components = {part: digests.components[part] for part in task.places}
    # The weight that an adopted one was made from is not known.
    return PackedRecord(task.layout, components, digests.source_xxh3 if isinstance(task, PackedTask) else None)


def _config_bytes(config: JsonObject, skip: list[str], recipe: Recipe, layouts: Mapping[str, PackedShape]) -> bytes:
    """Return config.json with the quantization_config that transformers writes for bitsandbytes."""
    formats = Counter(layout.float_format for layout in layouts.values())
    compute = formats.most_common(1)[0][0] if formats else FloatFormat.BF16
    quantization: JsonObject = {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute.torch_name,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": recipe.defaults.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skip),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
    return small_json({**config, "quantization_config": quantization})


def index_bytes(shards: tuple[Shard, ...]) -> bytes:
    """Return model.safetensors.index.json: which shard holds each tensor."""
    weight_map = {placed.tensor.name: shard.name for shard in shards for placed in shard.tensors}
    total = sum(placed.tensor.nbytes for shard in shards for placed in shard.tensors)
    return small_json({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def small_json(value: object) -> bytes:
    """Return a JSON file for people: indented, with a last line end."""
    return (strict_json.dumps(value, indent=2) + "\n").encode("utf-8")


def _as_json(value: Mapping[str, object]) -> JsonObject:
    parsed = strict_json.loads(
        strict_json.dumps(value).encode("utf-8"), path=MANIFEST_NAME, max_nbytes=2**24, error=SourceError
    )
    assert isinstance(parsed, dict)
    return parsed


def _fingerprint(source: Source, shards: tuple[Shard, ...], small_files: Mapping[str, bytes]) -> str:
    """Return a digest of everything that decides the output's bytes, but for the weights themselves."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {qformat.__version__} {source.fingerprint()}".encode())
    for shard in shards:
        digest.update(shard.name.encode("utf-8") + shard.header)
    for name, data in sorted(small_files.items()):
        digest.update(name.encode("utf-8") + data)
    return digest.hexdigest()
