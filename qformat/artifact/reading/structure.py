"""The structural checks of an artifact: a few KB of reading a tensor, no weights (spec sections 2, 3, 7 and 10).

Names, dtypes, shapes, counts, offsets, alignment, limits, quant_state, codebook, finiteness of the small maps. Digests
are the business of `qformat.artifact.reading.verify`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qformat import strict_json
from qformat.artifact import header, manifest
from qformat.artifact.components import Component, PackedShape
from qformat.artifact.header import DATA_ALIGNMENT, Header, TensorEntry
from qformat.artifact.layout import alignment
from qformat.artifact.limits import MAX_CONFIG_NBYTES, MAX_INDEX_NBYTES, MAX_MANIFEST_NBYTES
from qformat.artifact.manifest import KeptRecord, Manifest, PackedRecord
from qformat.artifact.reading.regular_files import open_regular, read_exactly, read_small
from qformat.artifact.tensor_spec import TensorSpec
from qformat.codec import quant_state
from qformat.codec.codebooks import DYNAMIC_MAP, NF4_CODEBOOK
from qformat.codec.quant_state import QuantState
from qformat.errors import ArtifactError, Reason
from qformat.names import CONFIG_NAME, INDEX_NAME, MANIFEST_NAME

_CODEBOOK = NF4_CODEBOOK.astype("<f4").tobytes()
_DYNAMIC_MAP = DYNAMIC_MAP.astype("<f4").tobytes()


@dataclass(frozen=True, slots=True)
class Located:
    """Where a component lies: its shard and header entry."""

    shard: str
    entry: TensorEntry


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Checked shards of a folder: their sizes, where every component lies, by its name in them, and what the codes of
    each packed tensor mean."""

    path: Path
    shard_nbytes: Mapping[str, int]
    located: Mapping[str, Located]
    states: Mapping[str, QuantState]


@dataclass(frozen=True, slots=True)
class Structure(ShardLayout):
    """A checked artifact: its shards and its manifest."""

    manifest: Manifest


def check_structure(path: Path) -> Structure:
    """Read headers and small maps of an artifact and check all that can be checked without its weights.

    Raises: ArtifactError with the reason, the file, the tensor and the field.
    """
    parsed = read_manifest(path)
    with ExitStack() as stack:
        descriptors: dict[str, int] = {}
        headers: dict[str, Header] = {}
        for name, record in parsed.files.items():
            descriptor = stack.enter_context(open_regular(path, name, error=ArtifactError))
            nbytes = os.fstat(descriptor).st_size
            if nbytes != record.nbytes:
                raise size_error(path / name, nbytes, record.nbytes)
            if record.header_xxh3 is not None:
                descriptors[name] = descriptor
                headers[name] = header.read(descriptor, path / name, error=ArtifactError)
        check_tensors(path, parsed, headers)
        index = read_small(path, INDEX_NAME, max_nbytes=MAX_INDEX_NBYTES, error=ArtifactError)
        check_index(index, path / INDEX_NAME, headers)
        config = read_small(path, CONFIG_NAME, max_nbytes=MAX_CONFIG_NBYTES, error=ArtifactError)
        check_config(config, path / CONFIG_NAME, parsed)
        located = {
            name: Located(shard, entry) for shard, read in headers.items() for name, entry in read.tensors.items()
        }
        paths = {shard: path / shard for shard in descriptors}
        states = {
            name: check_small_parts(name, entry.layout, located, descriptors, paths)
            for name, entry in parsed.tensors.items()
            if isinstance(entry, PackedRecord)
        }
    shard_nbytes = {name: parsed.files[name].nbytes for name in headers}
    return Structure(path, shard_nbytes, located, states, parsed)


def read_manifest(path: Path) -> Manifest:
    """Read and parse the manifest of an artifact. Raises ArtifactError."""
    if not os.path.isdir(path):
        raise ArtifactError(Reason.MISSING_FILE, path, "there is no such folder")
    data = read_small(path, MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES, error=ArtifactError)
    return manifest.parse(data, path / MANIFEST_NAME)


def expected_tensors(parsed: Manifest) -> dict[str, tuple[str, Component, TensorSpec]]:
    """Return what the shards must hold: by name in the shards, the tensor, the component, and its dtype and shape.

    No two tensors of a parsed manifest have a component of the same name.
    """
    expected: dict[str, tuple[str, Component, TensorSpec]] = {}
    for name, record in parsed.tensors.items():
        if isinstance(record, KeptRecord):
            expected[name] = (name, Component.PACKED, TensorSpec(name, record.dtype, record.shape))
        else:
            for part, new in record.layout.components(name).items():
                expected[new.name] = (name, part, new)
    return expected


def size_error(path: Path, found: int, expected: int) -> ArtifactError:
    """Return the error of a file that does not have the size that the manifest gives."""
    return ArtifactError(
        Reason.FILE_SIZE, path, f"{found} bytes, expected {expected}", next_step="Fetch the file again"
    )


def check_tensors(path: Path, parsed: Manifest, headers: Mapping[str, Header]) -> None:
    """Check that the shards, by name, hold just what a manifest implies, each where it may lie. Raises ArtifactError.

    path: the folder, or whatever messages name as the artifact.
    """
    expected = expected_tensors(parsed)
    seen: dict[str, str] = {}
    for shard, read in headers.items():
        if read.data_start % DATA_ALIGNMENT:
            raise ArtifactError(
                Reason.ALIGNMENT,
                read.path,
                f"data begins at byte {read.data_start}, no multiple of {DATA_ALIGNMENT}",
            )
        for name, entry in read.tensors.items():
            if name in seen:
                raise ArtifactError(Reason.DUPLICATE_TENSOR, read.path, f"is in {seen[name]}, too", tensor=name)
            seen[name] = shard
            if name not in expected:
                raise ArtifactError(Reason.UNKNOWN_TENSOR, read.path, "is not in the manifest", tensor=name)
            _check_entry(read.path, entry, expected[name][2])
    for name, (tensor, part, _) in expected.items():
        if name not in seen:
            what = f"no shard has its {part.label}" if part.value else "no shard has it"
            raise ArtifactError(Reason.MISSING_COMPONENT, path, what, tensor=tensor, field=part.label)


def _check_entry(path: Path, entry: TensorEntry, expected: TensorSpec) -> None:
    if entry.dtype != expected.dtype:
        raise ArtifactError(
            Reason.COMPONENT_DTYPE,
            path,
            f"{entry.dtype}, expected {expected.dtype}",
            tensor=entry.name,
            field="dtype",
        )
    if entry.shape != expected.shape:
        raise ArtifactError(
            Reason.COMPONENT_SHAPE, path, f"{list(entry.shape)}, expected {list(expected.shape)}",
            tensor=entry.name, field="shape",
        )  # fmt: skip
    if entry.start % alignment(entry.nbytes):
        raise ArtifactError(
            Reason.ALIGNMENT, path, f"lies at byte {entry.start}, no multiple of {alignment(entry.nbytes)}",
            tensor=entry.name,
        )  # fmt: skip


def check_index(data: bytes, path: Path, headers: Mapping[str, Header]) -> None:
    """Check that the bytes of an index name just the tensors of the shards. Raises ArtifactError."""
    index = strict_json.loads(data, path=path, max_nbytes=MAX_INDEX_NBYTES, error=ArtifactError)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise ArtifactError(Reason.INDEX_MISMATCH, path, "missing or not an object", field="weight_map")
    found = {name: shard for shard, read in headers.items() for name in read.tensors}
    for name in sorted(weight_map.keys() | found.keys()):
        if name not in found or weight_map.get(name) != found[name]:
            raise ArtifactError(
                Reason.INDEX_MISMATCH,
                path,
                f"{weight_map.get(name, 'missing')!r}, but it is in {found.get(name, 'no shard')!r}",
                tensor=name,
                field="weight_map",
            )


def check_config(data: bytes, where: Path, parsed: Manifest) -> None:
    """Check the fields that make a bitsandbytes reader read the artifact as what it is. Raises ArtifactError.

    data, where: config.json and its path (spec section 10).
    """
    config = strict_json.loads(data, path=where, max_nbytes=MAX_CONFIG_NBYTES, error=ArtifactError)
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(quantization, dict):
        raise ArtifactError(Reason.CONFIG_FIELD, where, "missing or not an object", field="quantization_config")
    required = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": "uint8",
    }
    for name, value in required.items():
        found = quantization.get(name)
        if type(found) is not type(value) or found != value:
            raise ArtifactError(
                Reason.CONFIG_FIELD,
                where,
                f"{found!r}, expected {value!r}",
                field=f"quantization_config.{name}",
            )
    field = "quantization_config.llm_int8_skip_modules"
    skip = quantization.get("llm_int8_skip_modules")
    if not isinstance(skip, list) or not all(isinstance(entry, str) for entry in skip):
        raise ArtifactError(Reason.SKIP_MODULES, where, "missing or not a list of module paths", field=field)
    for name, record in parsed.tensors.items():
        if isinstance(record, PackedRecord) and not _parents(name.removesuffix(".weight")).isdisjoint(skip):
            raise ArtifactError(
                Reason.SKIP_MODULES,
                where,
                "is listed to stay in 16 bit, but it is packed",
                tensor=name,
                field=field,
            )


def _parents(module: str) -> set[str]:
    """Return the path of a module and those of the modules that hold it."""
    parts = module.split(".")
    return {".".join(parts[:length]) for length in range(1, len(parts) + 1)}


def check_small_parts(
    name: str,
    layout: PackedShape,
    located: Mapping[str, Located],
    descriptors: Mapping[str, int],
    paths: Mapping[str, Path],
) -> QuantState:
    """Check quant_state, codebook and finiteness of the scales' maps of one packed tensor; return the first.

    Raises: ArtifactError. descriptors, paths: open files, and their names, by shard.
    """

    def read(part: Component) -> tuple[Path, bytes]:
        where = located[name + part]
        data = bytearray(where.entry.nbytes)
        shard = paths[where.shard]
        read_exactly(descriptors[where.shard], where.entry.start, memoryview(data), path=shard, error=ArtifactError)
        return shard, bytes(data)

    shard, data = read(Component.QUANT_STATE)
    state = quant_state.parse(data, path=shard, tensor=name)
    for field, found, expected in (
        ("blocksize", state.block_size, layout.block_size),
        ("dtype", state.float_format.torch_name, layout.float_format.torch_name),
        ("shape", list(state.shape), list(layout.shape)),
        ("nested_offset", state.nested_offset is not None, layout.double_quant),
    ):
        if found != expected:
            raise ArtifactError(
                Reason.QUANT_STATE,
                shard,
                f"{found}, but the manifest says {expected}",
                tensor=name,
                field=field,
            )
    shard, data = read(Component.QUANT_MAP)
    if data != _CODEBOOK:
        raise ArtifactError(Reason.CODEBOOK, shard, "is not the NF4 codebook", tensor=name, field="quant_map")
    scales = (Component.NESTED_ABSMAX, Component.NESTED_QUANT_MAP) if layout.double_quant else (Component.ABSMAX,)
    for part in scales:
        shard, data = read(part)
        if part is Component.NESTED_QUANT_MAP and data == _DYNAMIC_MAP:
            continue
        values = np.frombuffer(data, "<f4")
        if not np.isfinite(values).all():
            index = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ArtifactError(
                Reason.NONFINITE_SCALE,
                shard,
                f"{values[index]} at entry {index}",
                tensor=name,
                field=part.label,
            )
    return state
