"""Structural checks of an artifact, which read a few kB per tensor and no weights (spec sections 2, 3, 7 and 10).

They cover the bytes of small files and headers, names, dtypes, shapes, offsets, alignment, limits, the quant_state, the
codebook and NaN or Inf among the scales. `qformat.artifact.reading.verify` also compares the digests of the weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qformat import strict_json
from qformat.artifact.components import Component, PackedShape
from qformat.artifact.header import DATA_ALIGNMENT, Header, TensorEntry
from qformat.artifact.layout import alignment
from qformat.artifact.limits import MAX_CONFIG_NBYTES, MAX_INDEX_NBYTES, MAX_MANIFEST_NBYTES, max_nbytes_of
from qformat.artifact.manifest import KeptRecord, Manifest, PackedRecord
from qformat.artifact.reading import manifest_parser
from qformat.artifact.reading.file_roles import accompanies
from qformat.artifact.reading.listed_files import check_size, check_small_file, read_header
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
    """Place of a component.

    Attributes:
        shard: Name of the shard.
        entry: Entry in the header of the shard.
    """

    shard: str
    entry: TensorEntry


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Checked shards of a directory.

    Attributes:
        path: Directory.
        shard_nbytes: Size of each shard in bytes.
        located: Place of each component, by its name in the shards.
        states: quant_state of each packed tensor.
    """

    path: Path
    shard_nbytes: Mapping[str, int]
    located: Mapping[str, Located]
    states: Mapping[str, QuantState]


@dataclass(frozen=True, slots=True)
class Structure(ShardLayout):
    """Checked shards and manifest of an artifact.

    Attributes:
        manifest: Manifest.
    """

    manifest: Manifest


def check_structure(path: Path, *, parsed: Manifest | None = None, compare_digests: bool = True) -> Structure:
    """Read the small files, headers and small components of an artifact and check everything that needs no weights.

    Args:
        path: Directory of the artifact.
        parsed: Manifest of the artifact, if the caller has already read it.
        compare_digests: Compare the SHA-256 of each small file of the model and the digest of each header with the
            manifest. A caller that compares them itself leaves this out.

    Raises:
        ArtifactError: The artifact is damaged or not supported.
    """
    parsed = parsed or read_manifest(path)
    with ExitStack() as stack:
        descriptors: dict[str, int] = {}
        headers: dict[str, Header] = {}
        for name, record in parsed.files.items():
            if accompanies(name, record):
                continue
            descriptor, file = stack.enter_context(open_regular(path, name, error=ArtifactError)), path / name
            check_size(descriptor, file, record)
            if record.header_xxh3 is not None:
                descriptors[name] = descriptor
                headers[name] = read_header(descriptor, file, record.header_xxh3 if compare_digests else None)
            elif compare_digests:
                check_small_file(descriptor, file, record)
        check_tensors(path, parsed, headers)
        check_index(_read_listed(path, INDEX_NAME, parsed), path / INDEX_NAME, headers)
        check_config(_read_listed(path, CONFIG_NAME, parsed), path / CONFIG_NAME, parsed)
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


def _read_listed(path: Path, name: str, parsed: Manifest) -> bytes:
    data = read_small(path, name, max_nbytes=max_nbytes_of(name), error=ArtifactError)
    if name not in parsed.files:
        raise ArtifactError(Reason.EXTRA_FILE, path / name, "is not in the manifest, so no digest proves its contents")
    return data


def check_directory(path: Path) -> None:
    """Check that the directory of an artifact exists.

    Raises:
        ArtifactError: The path does not exist or is not a directory.
    """
    if not os.path.isdir(path):
        problem = "is not a directory" if os.path.lexists(path) else "does not exist"
        raise ArtifactError(Reason.MISSING_FILE, path, problem, next_step="Check the path")


def read_manifest(path: Path) -> Manifest:
    """Read and parse the manifest of an artifact.

    Raises:
        ArtifactError: The directory does not exist, or the manifest is missing or invalid.
    """
    check_directory(path)
    data = read_small(path, MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES, error=ArtifactError)
    return manifest_parser.parse(data, path / MANIFEST_NAME)


def expected_tensors(parsed: Manifest) -> dict[str, tuple[str, Component, TensorSpec]]:
    """Return a dict from the name of every tensor in the shards to its owner, its component and its description.

    The names are unique, because parsing a manifest rejects tensors that share the name of a component.
    """
    expected: dict[str, tuple[str, Component, TensorSpec]] = {}
    for name, record in parsed.tensors.items():
        if isinstance(record, KeptRecord):
            expected[name] = (name, Component.PACKED, TensorSpec(name, record.dtype, record.shape))
        else:
            for part, new in record.layout.components(name).items():
                expected[new.name] = (name, part, new)
    return expected


def check_tensors(path: Path, parsed: Manifest, headers: Mapping[str, Header]) -> None:
    """Check that the shards contain exactly the components that a manifest implies, correctly aligned.

    Args:
        path: Directory of the artifact, or its name in error messages.
        parsed: Manifest.
        headers: Headers by name of the shard.

    Raises:
        ArtifactError: A tensor is missing, unknown, in two shards or misaligned, or has the wrong dtype or shape.
    """
    expected = expected_tensors(parsed)
    seen: dict[str, str] = {}
    for shard, read in headers.items():
        if read.data_start % DATA_ALIGNMENT:
            raise ArtifactError(
                Reason.ALIGNMENT,
                read.path,
                f"the data begins at byte {read.data_start}, not a multiple of {DATA_ALIGNMENT}",
            )
        for name, entry in read.tensors.items():
            if name in seen:
                raise ArtifactError(Reason.DUPLICATE_TENSOR, read.path, f"also occurs in {seen[name]}", tensor=name)
            seen[name] = shard
            if name not in expected:
                raise ArtifactError(Reason.UNKNOWN_TENSOR, read.path, "is not in the manifest", tensor=name)
            _check_entry(read.path, entry, expected[name][2])
    for name, (tensor, part, _) in expected.items():
        if name not in seen:
            what = f"no shard contains its {part.label}" if part.value else "no shard contains it"
            raise ArtifactError(Reason.MISSING_COMPONENT, path, what, tensor=tensor, field=part.label)


def _check_entry(path: Path, entry: TensorEntry, expected: TensorSpec) -> None:
    if entry.dtype != expected.dtype:
        raise ArtifactError(
            Reason.COMPONENT_DTYPE,
            path,
            f"is {entry.dtype}, expected {expected.dtype}",
            tensor=entry.name,
            field="dtype",
        )
    if entry.shape != expected.shape:
        raise ArtifactError(
            Reason.COMPONENT_SHAPE, path, f"is {list(entry.shape)}, expected {list(expected.shape)}",
            tensor=entry.name, field="shape",
        )  # fmt: skip
    if entry.start % alignment(entry.nbytes):
        raise ArtifactError(
            Reason.ALIGNMENT, path, f"begins at byte {entry.start}, not a multiple of {alignment(entry.nbytes)}",
            tensor=entry.name,
        )  # fmt: skip


def check_index(data: bytes, path: Path, headers: Mapping[str, Header]) -> None:
    """Check that an index lists exactly the tensors of the shards.

    Args:
        data: Bytes of the index.
        path: Path of the index, for error messages.
        headers: Headers by name of the shard.

    Raises:
        ArtifactError: The index is invalid, or differs from the shards (index_mismatch).
    """
    index = strict_json.loads(data, path=path, max_nbytes=MAX_INDEX_NBYTES, error=ArtifactError)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise ArtifactError(Reason.INDEX_MISMATCH, path, "is missing or is not an object", field="weight_map")
    found = {name: shard for shard, read in headers.items() for name in read.tensors}
    for name in sorted(weight_map.keys() | found.keys()):
        if name not in found or weight_map.get(name) != found[name]:
            raise ArtifactError(
                Reason.INDEX_MISMATCH,
                path,
                f"the index has {repr(weight_map[name]) if name in weight_map else 'no entry'}, "
                f"but the tensor is in {repr(found[name]) if name in found else 'no shard'}",
                tensor=name,
                field="weight_map",
            )


def check_config(data: bytes, where: Path, parsed: Manifest) -> None:
    """Check the fields of `config.json` that other readers of bitsandbytes checkpoints rely on (spec section 10).

    Args:
        data: Bytes of `config.json`.
        where: Path of the file, for error messages.
        parsed: Manifest of the artifact.

    Raises:
        ArtifactError: The file is invalid (config_field, skip_modules).
    """
    config = strict_json.loads(data, path=where, max_nbytes=MAX_CONFIG_NBYTES, error=ArtifactError, python_numbers=True)
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(quantization, dict):
        raise ArtifactError(Reason.CONFIG_FIELD, where, "is missing or is not an object", field="quantization_config")
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
                f"is {found!r}, expected {value!r}",
                field=f"quantization_config.{name}",
            )
    field = "quantization_config.llm_int8_skip_modules"
    skip = quantization.get("llm_int8_skip_modules")
    if not isinstance(skip, list) or not all(isinstance(entry, str) for entry in skip):
        raise ArtifactError(Reason.SKIP_MODULES, where, "is missing or is not a list of module paths", field=field)
    for name, record in parsed.tensors.items():
        if isinstance(record, PackedRecord) and not _parents(name.removesuffix(".weight")).isdisjoint(skip):
            raise ArtifactError(
                Reason.SKIP_MODULES,
                where,
                "the tensor is packed, but the list says that its module stays in 16 bit",
                tensor=name,
                field=field,
            )


def _parents(module: str) -> set[str]:
    """Return the path of a module and of all modules that contain it."""
    parts = module.split(".")
    return {".".join(parts[:length]) for length in range(1, len(parts) + 1)}


def check_small_parts(
    name: str,
    layout: PackedShape,
    located: Mapping[str, Located],
    descriptors: Mapping[str, int],
    paths: Mapping[str, Path],
) -> QuantState:
    """Check the quant_state, the codebook and the stored scales of one packed tensor.

    Args:
        name: Name of the tensor.
        layout: Shape, float format and options that the tensor must have.
        located: Places of all components.
        descriptors: File descriptors by name of the shard.
        paths: Paths by name of the shard, for error messages.

    Returns:
        The quant_state.

    Raises:
        ArtifactError: A component is invalid (quant_state, codebook, nonfinite_scale).
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
                f"the quant_state has {found}, but the manifest has {expected}",
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
                f"contains {values[index]} at index {index}",
                tensor=name,
                field=part.label,
            )
    return state
