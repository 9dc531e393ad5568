"""The first stage of an export: computes every byte offset of a plain checkpoint from the manifest and headers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qformat import strict_json
from qformat.artifact.layout import Shard, natural_order, place
from qformat.artifact.limits import MAX_CONFIG_NBYTES, max_nbytes_of
from qformat.artifact.manifest import JsonObject, PackedRecord, TensorRecord
from qformat.artifact.reading.file_roles import accompanies
from qformat.artifact.reading.listed_files import next_step_for
from qformat.artifact.reading.reader import Artifact
from qformat.artifact.reading.regular_files import read_small
from qformat.artifact.tensor_spec import TensorSpec
from qformat.codec.floats import FloatFormat
from qformat.converters.encode.small_files import index_bytes, small_json
from qformat.converters.encode.tasks import Place
from qformat.errors import ArtifactError, Reason
from qformat.names import CARD_NAME, CONFIG_NAME, INDEX_NAME
from qformat.version import __version__

Action = Literal["decode", "cast", "copy"]

_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True, slots=True)
class ExportTask:
    """A tensor to write.

    Attributes:
        name: Name of the tensor.
        record: The tensor in the manifest: packed or kept.
        dtype: The new dtype, as safetensors headers spell it.
        place: Where it is written.
    """

    name: str
    record: TensorRecord
    dtype: str
    place: Place

    @property
    def action(self) -> Action:
        """What happens to the tensor: its codes are decoded, its values cast, or its bytes copied."""
        if isinstance(self.record, PackedRecord):
            return "decode"
        return "copy" if self.record.dtype == self.dtype else "cast"


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """Plan of a complete checkpoint, made before any weight is read.

    Attributes:
        target: Float format of the checkpoint.
        tasks: One task per tensor, in the natural order of their names.
        shards: The shards with their headers and the offset of every tensor.
        small_files: Contents of the small files that the export writes, keyed by name.
        side_files: Sizes in bytes of the files to copy from the artifact, keyed by name.
        artifact_nbytes: Size of the artifact in bytes.
        fingerprint: Digest of everything that determines the output bytes.
    """

    target: FloatFormat
    tasks: tuple[ExportTask, ...]
    shards: tuple[Shard, ...]
    small_files: Mapping[str, bytes]
    side_files: Mapping[str, int]
    artifact_nbytes: int
    fingerprint: str

    @property
    def tensor_nbytes(self) -> int:
        """Size in bytes of all tensors of the checkpoint."""
        return sum(task.place.nbytes for task in self.tasks)

    @property
    def nbytes(self) -> int:
        """Size in bytes of the finished checkpoint: every file."""
        small = sum(len(data) for data in self.small_files.values()) + sum(self.side_files.values())
        return sum(shard.nbytes for shard in self.shards) + small


def make_export_plan(artifact: Artifact, target: FloatFormat, *, max_shard_nbytes: int) -> ExportPlan:
    """Plan the export of an open artifact to a float format. Reads no weights.

    Packed weights, and kept tensors in BF16, F16 and F32, get the target's dtype. Every other tensor keeps its bytes.

    Args:
        artifact: The open artifact.
        target: Float format of the checkpoint.
        max_shard_nbytes: Largest size of a shard in bytes.

    Raises:
        ArtifactError: A small file of the artifact is damaged.
    """
    records = sorted(artifact.manifest.tensors.items(), key=lambda item: natural_order(item[0]))
    new = [_new_tensor(name, record, target) for name, record in records]
    shards = place([[tensor] for tensor in new], max_shard_nbytes=max_shard_nbytes)
    places = {
        placed.tensor.name: Place(shard.name, placed.start, placed.tensor.nbytes)
        for shard in shards
        for placed in shard.tensors
    }
    tasks = tuple(
        ExportTask(name, record, tensor.dtype, places[name])
        for (name, record), tensor in zip(records, new, strict=True)
    )
    small_files = {CONFIG_NAME: _config_bytes(artifact, target), INDEX_NAME: index_bytes(shards)}
    return ExportPlan(
        target=target,
        tasks=tasks,
        shards=shards,
        small_files=small_files,
        side_files=_side_files(artifact),
        artifact_nbytes=sum(record.nbytes for record in artifact.manifest.files.values()),
        fingerprint=_fingerprint(artifact, shards, small_files),
    )


def _new_tensor(name: str, record: TensorRecord, target: FloatFormat) -> TensorSpec:
    if isinstance(record, PackedRecord):
        return TensorSpec(name, target.value, record.layout.shape)
    dtype = target.value if record.dtype in FloatFormat.__members__ else record.dtype
    return TensorSpec(name, dtype, record.shape)


def _side_files(artifact: Artifact) -> dict[str, int]:
    """Return the files to copy: the model card, and all files in the manifest except weights, config and index.

    Files that only accompany the model are copied as they are, if they exist.
    """
    found = {
        name: record.nbytes
        for name, record in artifact.manifest.files.items()
        if not record.is_shard and name not in {CONFIG_NAME, INDEX_NAME} and not accompanies(name, record)
    }
    accompanying = {name for name, record in artifact.manifest.files.items() if accompanies(name, record)}
    for name in {*accompanying, CARD_NAME}:
        if os.path.isfile(artifact.path / name):
            found[name] = len(read_small_file(artifact, name))
    return dict(sorted(found.items()))


def read_small_file(artifact: Artifact, name: str) -> bytes:
    """Return the bytes of a file that is not a shard, after checking its digest.

    Args:
        artifact: The open artifact.
        name: Name of the file.

    Raises:
        ArtifactError: The file cannot be read, or it belongs to the model and its digest does not match (file_digest).
    """
    data = read_small(artifact.path, name, max_nbytes=max_nbytes_of(name), error=ArtifactError)
    record = artifact.manifest.files.get(name)
    if record is None or accompanies(name, record):
        return data
    if (found := hashlib.sha256(data).hexdigest()) != record.sha256:
        raise ArtifactError(
            Reason.FILE_DIGEST, artifact.path / name, f"was changed: SHA-256 {found}, expected {record.sha256}",
            next_step=next_step_for(artifact.path / name),
        )  # fmt: skip
    return data


def _config_bytes(artifact: Artifact, target: FloatFormat) -> bytes:
    """Return config.json without quantization_config and with the target as the dtype of the model and sub-models."""
    path = artifact.path / CONFIG_NAME
    data = read_small_file(artifact, CONFIG_NAME)
    config = strict_json.loads(data, path=path, max_nbytes=MAX_CONFIG_NBYTES, error=ArtifactError, python_numbers=True)
    assert isinstance(config, dict), "checked with the structure"
    config.pop("quantization_config", None)
    if not any(key in config for key in _DTYPE_KEYS):
        config["dtype"] = target.torch_name
    _set_dtypes(config, target)
    return small_json(config, python_numbers=True)


def _set_dtypes(config: JsonObject, target: FloatFormat) -> None:
    for key, value in config.items():
        if key in _DTYPE_KEYS:
            config[key] = target.torch_name
        elif key.endswith("_config") and isinstance(value, dict):
            _set_dtypes(value, target)


def _fingerprint(artifact: Artifact, shards: tuple[Shard, ...], small_files: Mapping[str, bytes]) -> str:
    """Return a digest of everything that determines the output bytes. The manifest holds the digests of the weights."""
    digest = hashlib.sha256(f"export {__version__}\n".encode())
    digest.update(artifact.manifest.to_bytes())
    for shard in shards:
        digest.update(shard.name.encode("utf-8") + shard.header)
    for name, data in sorted(small_files.items()):
        digest.update(name.encode("utf-8") + data)
    if os.path.isfile(artifact.path / CARD_NAME):
        digest.update(read_small_file(artifact, CARD_NAME))
    return digest.hexdigest()
