"""Open an artifact: every structural check, then mapped, lazy, read-only tensors (spec sections 2, 3 and 7).

What is checked here costs a few KB of reading a tensor: names, dtypes, shapes, counts, offsets, alignment, limits,
quant_state, codebook, finiteness of the small maps. Digests are the business of `qformat.artifact.verify`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformat import strict_json
from qformat.artifact import header, manifest
from qformat.artifact.components import Component, PackedShape
from qformat.artifact.header import DATA_ALIGNMENT, Header, NewTensor, TensorEntry
from qformat.artifact.layout import alignment
from qformat.artifact.limits import MAX_CONFIG_NBYTES, MAX_INDEX_NBYTES, MAX_MANIFEST_NBYTES
from qformat.artifact.manifest import MANIFEST_NAME, KeptRecord, Manifest, PackedRecord
from qformat.artifact.regular_files import open_regular, read_exactly, read_small
from qformat.codec import quant_state
from qformat.codec.codebooks import NF4_CODEBOOK
from qformat.codec.floats import FloatFormat, Raw, widen
from qformat.codec.quant_state import QuantState
from qformat.errors import ArtifactError, Reason, UsageError

INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"

_NUMPY_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
    "F8_E4M3FNUZ": "u1", "F8_E5M2FNUZ": "u1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "BF16": "<u2",
    "I32": "<i4", "U32": "<u4", "F32": "<f4", "I64": "<i8", "U64": "<u8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Located:
    """Where a component lies: its shard and header entry."""

    shard: str
    entry: TensorEntry


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A 4-bit weight; every array is a read-only view of the mapped file.

    packed: uint8 [ceil(n/2)]; absmax: uint8 codes [n_blocks], or float32 without double quantization;
    nested_absmax: float32 [n_nested_blocks] and nested_quant_map: float32 [256], or None.
    """

    name: str
    layout: PackedShape
    state: QuantState
    packed: NDArray[np.uint8]
    absmax: NDArray[Any]
    nested_absmax: NDArray[np.float32] | None
    nested_quant_map: NDArray[np.float32] | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.layout.shape

    def scales(self) -> NDArray[np.float32]:
        """Return the decoded absmax of each block, float32 [n_blocks]."""
        if self.nested_absmax is None or self.nested_quant_map is None or self.state.nested_offset is None:
            return self.absmax.astype(np.float32, copy=False)
        out = np.empty(self.layout.n_blocks, np.float32)
        cpu = _cpu()
        cpu.decode_scales_into(
            self.absmax, self.nested_absmax, self.nested_quant_map, np.float32(self.state.nested_offset), out
        )
        return out

    def decode(self, float_format: FloatFormat | None = None, out: Raw | None = None) -> Raw:
        """Return the weight in its shape: raw elements of `float_format` (default: what the source was).

        bf16 comes as its bits in uint16, fp16 as its bits in uint16, fp32 as float32. `out`: a flat buffer to reuse.
        """
        float_format = float_format or self.layout.float_format
        if out is None:
            out = np.empty(self.layout.n_elements, float_format.raw_dtype)
        elif out.size != self.layout.n_elements or out.dtype != float_format.raw_dtype:
            raise UsageError(
                f"{self.name}: out has {out.size} elements of {out.dtype}, expected {self.layout.n_elements} of "
                f"{float_format.raw_dtype}"
            )
        _cpu().decode_into(
            self.packed,
            self.scales(),
            n_elements=self.layout.n_elements,
            block_size=self.layout.block_size,
            float_format=float_format,
            out=out,
        )
        return out.reshape(self.shape)


@dataclass(frozen=True, slots=True)
class KeptTensor:
    """A tensor kept bit for bit: a read-only view of the mapped file in its shape; BF16 and F8 as unsigned bits."""

    name: str
    dtype: str
    data: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.data.shape

    def decode(self) -> NDArray[Any]:
        """Return the values: float32 for BF16, F16 and F32, the data itself for every other dtype."""
        if self.dtype not in FloatFormat.__members__:
            return self.data
        float_format = FloatFormat(self.dtype)
        return widen(self.data.view(float_format.raw_dtype), float_format)


class Artifact(Mapping[str, PackedTensor | KeptTensor]):
    """An open artifact: a mapping from tensor names to tensors. Close it, or use it as a context manager.

    Views stay valid after `close` for as long as somebody holds them. The files must not be changed or cut while
    they are mapped: that is the one thing a mapping cannot survive.
    """

    def __init__(self, path: Path, parsed: Manifest, headers: Mapping[str, Header]) -> None:
        self.path = path
        self.manifest = parsed
        self.located = {
            name: Located(shard, entry) for shard, read in headers.items() for name, entry in read.tensors.items()
        }
        self._maps: dict[str, NDArray[np.uint8]] = {}

    def __enter__(self) -> Artifact:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.tensors)

    def __len__(self) -> int:
        return len(self.manifest.tensors)

    def __getitem__(self, name: str) -> PackedTensor | KeptTensor:
        record = self.manifest.tensors[name]
        if isinstance(record, KeptRecord):
            return KeptTensor(name, record.dtype, self._view(name))
        parts = {part: self._view(name + part.value) for part in record.components}
        state = quant_state.parse(parts[Component.QUANT_STATE].tobytes(), path=self.path, tensor=name)
        return PackedTensor(
            name=name,
            layout=record.layout,
            state=state,
            packed=parts[Component.PACKED].reshape(-1),
            absmax=parts[Component.ABSMAX],
            nested_absmax=parts.get(Component.NESTED_ABSMAX),
            nested_quant_map=parts.get(Component.NESTED_QUANT_MAP),
        )

    def close(self) -> None:
        """Let go of the mapped files."""
        self._maps.clear()

    def _view(self, name: str) -> NDArray[Any]:
        located = self.located[name]
        entry = located.entry
        data = self._map(located.shard)[entry.start : entry.stop]
        return data.view(_NUMPY_DTYPES[entry.dtype]).reshape(entry.shape)

    def _map(self, shard: str) -> NDArray[np.uint8]:
        if shard not in self._maps:
            expected = self.manifest.files[shard].nbytes
            with open_regular(self.path, shard, error=ArtifactError) as descriptor:
                nbytes = os.fstat(descriptor).st_size
                if nbytes != expected:
                    raise size_error(self.path / shard, nbytes, expected)
                mapped = mmap.mmap(descriptor, expected, prot=mmap.PROT_READ)
            self._maps[shard] = np.frombuffer(mapped, np.uint8)
        return self._maps[shard]


def open_artifact(path: Path | str) -> Artifact:
    """Open an artifact after checking its whole structure. Reads headers and small maps, no weights.

    Raises: ArtifactError with the reason, the file, the tensor and the field.
    """
    path = Path(path)
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
        _check_tensors(path, parsed, headers)
        _check_index(path, headers)
        _check_config(path, parsed)
        artifact = Artifact(path, parsed, headers)
        for name, entry in parsed.tensors.items():
            if isinstance(entry, PackedRecord):
                _check_small_parts(path, name, entry, artifact.located, descriptors)
    return artifact


def read_manifest(path: Path) -> Manifest:
    """Read and parse the manifest of an artifact. Raises ArtifactError."""
    if not os.path.isdir(path):
        raise ArtifactError(Reason.MISSING_FILE, path, "there is no such folder")
    data = read_small(path, MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES, error=ArtifactError)
    return manifest.parse(data, path / MANIFEST_NAME)


def expected_tensors(parsed: Manifest) -> dict[str, tuple[str, Component, NewTensor]]:
    """Return what the shards must hold: by name in the shards, the tensor, the component, and its dtype and shape.

    No two tensors of a parsed manifest have a component of the same name.
    """
    expected: dict[str, tuple[str, Component, NewTensor]] = {}
    for name, record in parsed.tensors.items():
        if isinstance(record, KeptRecord):
            expected[name] = (name, Component.PACKED, NewTensor(name, record.dtype, record.shape))
        else:
            for part, new in record.layout.components(name).items():
                expected[new.name] = (name, part, new)
    return expected


def size_error(path: Path, found: int, expected: int) -> ArtifactError:
    """Return the error of a file that does not have the size that the manifest gives."""
    return ArtifactError(
        Reason.FILE_SIZE, path, f"{found} bytes, expected {expected}", next_step="Fetch the file again"
    )


def _check_tensors(path: Path, parsed: Manifest, headers: Mapping[str, Header]) -> None:
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


def _check_entry(path: Path, entry: TensorEntry, expected: NewTensor) -> None:
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


def _check_index(path: Path, headers: Mapping[str, Header]) -> None:
    data = read_small(path, INDEX_NAME, max_nbytes=MAX_INDEX_NBYTES, error=ArtifactError)
    index = strict_json.loads(data, path=path / INDEX_NAME, max_nbytes=MAX_INDEX_NBYTES, error=ArtifactError)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise ArtifactError(Reason.INDEX_MISMATCH, path / INDEX_NAME, "missing or not an object", field="weight_map")
    found = {name: shard for shard, read in headers.items() for name in read.tensors}
    for name in sorted(weight_map.keys() | found.keys()):
        if name not in found or weight_map.get(name) != found[name]:
            raise ArtifactError(
                Reason.INDEX_MISMATCH,
                path / INDEX_NAME,
                f"{weight_map.get(name, 'missing')!r}, but it is in {found.get(name, 'no shard')!r}",
                tensor=name,
                field="weight_map",
            )


def _check_config(path: Path, parsed: Manifest) -> None:
    """The fields that make a bitsandbytes reader read the artifact as what it is (spec section 10)."""
    where = path / CONFIG_NAME
    data = read_small(path, CONFIG_NAME, max_nbytes=MAX_CONFIG_NBYTES, error=ArtifactError)
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


def _check_small_parts(
    path: Path,
    name: str,
    record: PackedRecord,
    located: Mapping[str, Located],
    descriptors: Mapping[str, int],
) -> None:
    """Check quant_state, codebook and finiteness of the scales' maps of one packed tensor."""

    def read(part: Component) -> tuple[Path, bytes]:
        where = located[name + part.value]
        data = bytearray(where.entry.nbytes)
        shard = path / where.shard
        read_exactly(descriptors[where.shard], where.entry.start, memoryview(data), path=shard, error=ArtifactError)
        return shard, bytes(data)

    shard, data = read(Component.QUANT_STATE)
    state = quant_state.parse(data, path=shard, tensor=name)
    layout = record.layout
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
    if data != NF4_CODEBOOK.astype("<f4").tobytes():
        raise ArtifactError(Reason.CODEBOOK, shard, "is not the NF4 codebook", tensor=name, field="quant_map")
    scales = (Component.NESTED_ABSMAX, Component.NESTED_QUANT_MAP) if layout.double_quant else (Component.ABSMAX,)
    for part in scales:
        shard, data = read(part)
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


def _cpu() -> Any:
    """Import the numba kernels when something is decoded, not when an artifact is opened."""
    from qformat.codec import cpu

    return cpu
