"""Records which weights an adapter was trained on, in `qformat_base.json`. Loading compares the record."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from qformat import strict_json
from qformat.artifact.digests import xxh3, xxh3_of_range
from qformat.artifact.manifest import KeptRecord, TensorRecord
from qformat.artifact.reading.structure import ShardLayout, Structure
from qformat.artifact.sources.source_files import read_source_file
from qformat.errors import AdapterError, ArtifactError
from qformat.named_files import open_named
from qformat.names import BASE_RECORD_NAME, CONFIG_NAME

_MAX_NBYTES = 2**16
_DIGEST = re.compile(r"(?:tensors|files)-xxh3:[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """Identity of the base model of an adapter.

    Attributes:
        digest: Digest that changes with any byte of the weights.
        name: Name of the model's directory, for people.
    """

    digest: str
    name: str

    @classmethod
    def of(cls, layout: ShardLayout) -> BaseRecord:
        """Return the identity of a model.

        An artifact is identified by the digests of its tensors, and a folder without a manifest by hashing its files.
        The digest of the manifest itself would not do, because it changes when a model card is published.
        """
        name = layout.path.resolve().name
        if isinstance(layout, Structure):
            tensors = [(tensor, _digests_of(record)) for tensor, record in layout.manifest.tensors.items()]
            digests = [*tensors, (CONFIG_NAME, [_digest_of(layout.path / CONFIG_NAME)])]
            return cls(f"tensors-xxh3:{xxh3(strict_json.dumps(digests).encode())}", name)
        files = [(file, _digest_of(layout.path / file)) for file in sorted([*layout.shard_nbytes, CONFIG_NAME])]
        return cls(f"files-xxh3:{xxh3(strict_json.dumps(files).encode())}", name)

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        return (strict_json.dumps(asdict(self), indent=2) + "\n").encode()


def read_base_record(adapter: Path) -> BaseRecord | None:
    """Return the record beside an adapter, or None if there is none.

    Raises:
        AdapterError: The record is damaged.
    """
    path = adapter / BASE_RECORD_NAME
    if not os.path.lexists(path):
        return None
    try:
        data = read_source_file(adapter, BASE_RECORD_NAME, max_nbytes=_MAX_NBYTES, error=ArtifactError)
        record = strict_json.loads(data, path=path, max_nbytes=_MAX_NBYTES, error=ArtifactError)
    except ArtifactError as problem:
        raise _damaged(path, problem.problem) from None
    if isinstance(record, dict):
        digest, name = record.get("digest"), record.get("name")
        if isinstance(digest, str) and _DIGEST.fullmatch(digest) and isinstance(name, str):
            return BaseRecord(digest, name)
    raise _damaged(path, "digest or name is missing or not valid")


def _damaged(path: Path, problem: str) -> AdapterError:
    return AdapterError(f"{path}: is damaged: {problem}. Remove the file to use the adapter without this check")


def _digests_of(record: TensorRecord) -> list[str]:
    return [record.xxh3] if isinstance(record, KeptRecord) else list(record.components.values())


def _digest_of(path: Path) -> str:
    with open_named(path) as file:
        return xxh3_of_range(file.fileno(), 0, os.fstat(file.fileno()).st_size, path=path, error=ArtifactError)
