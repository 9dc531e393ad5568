"""Reading of directories that bitsandbytes and transformers wrote: the same components, but no manifest or digests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from qformat.artifact.components import Component, PackedShape
from qformat.artifact.header import TensorEntry
from qformat.artifact.reading.regular_files import read_exactly
from qformat.artifact.reading.safetensors_folder import read_headers
from qformat.artifact.reading.structure import Located, ShardLayout, check_small_parts
from qformat.artifact.sources.source_files import open_source_file
from qformat.codec import quant_state
from qformat.errors import ArtifactError, Reason

_FP4_STATE = ".quant_state.bitsandbytes__fp4"

_STORAGE_ITEMSIZES = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4}
"""Size of an element in bytes, by dtype of the packed codes (`bnb_4bit_quant_storage`). FSDP needs the codes in the
model's dtype; the bytes are the same."""


def read_bitsandbytes_folder(path: Path) -> ShardLayout:
    """Read and check the headers and small components of a directory with NF4 weights and no manifest.

    Raises:
        ArtifactError: A file is damaged, or the directory has no NF4 weights.
    """
    shards = read_headers(path, error=ArtifactError)
    located = shards.located
    packed = [name.removesuffix(Component.QUANT_STATE) for name in located if name.endswith(Component.QUANT_STATE)]
    if not packed:
        raise _nothing_packed(path, located)
    with ExitStack() as stack:
        descriptors = {
            shard: stack.enter_context(open_source_file(path, shard, error=ArtifactError))
            for shard in shards.shard_nbytes
        }
        states = {}
        paths = {shard: path / shard for shard in descriptors}
        for name in packed:
            layout = _packed_shape(path, name, located, descriptors)
            _check_components(path, name, layout, located)
            states[name] = check_small_parts(name, layout, located, descriptors, paths)
    return dataclasses.replace(shards, states=states)


def _nothing_packed(path: Path, located: Mapping[str, Located]) -> ArtifactError:
    fp4 = next((name for name in located if name.endswith(_FP4_STATE)), None)
    if fp4 is not None:
        return ArtifactError(
            Reason.QUANT_STATE,
            path,
            "contains FP4 codes, but only NF4 is supported",
            tensor=fp4.removesuffix(_FP4_STATE),
            next_step="Convert the 16-bit model with qformat convert",
        )
    return ArtifactError(
        Reason.MISSING_COMPONENT,
        path,
        "contains no 4-bit weights and no manifest",
        next_step="Convert the model with qformat convert",
    )


def _packed_shape(path: Path, name: str, located: Mapping[str, Located], descriptors: Mapping[str, int]) -> PackedShape:
    where = located[name + Component.QUANT_STATE]
    shard = path / where.shard
    if where.entry.nbytes > quant_state.MAX_NBYTES:
        raise ArtifactError(
            Reason.QUANT_STATE,
            shard,
            f"the quant_state has {where.entry.nbytes} bytes (the limit is {quant_state.MAX_NBYTES})",
            tensor=name,
        )
    data = bytearray(where.entry.nbytes)
    read_exactly(descriptors[where.shard], where.entry.start, memoryview(data), path=shard, error=ArtifactError)
    state = quant_state.parse(bytes(data), path=shard, tensor=name)
    return PackedShape.of_state(state)


def _check_components(path: Path, name: str, layout: PackedShape, located: Mapping[str, Located]) -> None:
    for part, new in layout.components(name).items():
        where = located.get(new.name)
        if where is None:
            raise ArtifactError(
                Reason.MISSING_COMPONENT, path, f"no shard contains its {part.label}", tensor=name, field=part.label
            )
        if part is Component.QUANT_STATE:
            continue
        shard, entry = path / where.shard, where.entry
        if part is Component.PACKED:
            _check_packed(shard, name, entry, new.shape[0])
        elif entry.dtype != new.dtype:
            raise ArtifactError(
                Reason.COMPONENT_DTYPE,
                shard,
                f"the dtype is {entry.dtype}, expected {new.dtype}",
                tensor=name,
                field=part.label,
            )
        elif entry.shape != new.shape:
            raise ArtifactError(
                Reason.COMPONENT_SHAPE, shard, f"the shape is {list(entry.shape)}, expected {list(new.shape)}",
                tensor=name, field=part.label,
            )  # fmt: skip


def _check_packed(shard: Path, name: str, entry: TensorEntry, nbytes: int) -> None:
    """Check the packed codes, which may be stored under another dtype and as a vector."""
    if entry.dtype not in _STORAGE_ITEMSIZES:
        raise ArtifactError(
            Reason.COMPONENT_DTYPE, shard, f"the dtype is {entry.dtype}, expected {' or '.join(_STORAGE_ITEMSIZES)}",
            tensor=name, field=Component.PACKED.label,
        )  # fmt: skip
    # The last element of a wider dtype is padded.
    spare = entry.nbytes - nbytes
    is_column = len(entry.shape) == 1 or (len(entry.shape) == 2 and entry.shape[1] == 1)
    if not is_column or not 0 <= spare < _STORAGE_ITEMSIZES[entry.dtype]:
        raise ArtifactError(
            Reason.COMPONENT_SHAPE, shard,
            f"the shape is {list(entry.shape)} of {entry.dtype}, expected {nbytes} bytes in one column",
            tensor=name, field=Component.PACKED.label,
        )  # fmt: skip
