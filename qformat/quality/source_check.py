"""Whether a 16-bit checkpoint is the one that an artifact was made from, by the digests in its manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qformat.artifact.digests import xxh3
from qformat.artifact.manifest import Manifest, PackedRecord
from qformat.artifact.reader import MappedShards
from qformat.artifact.safetensors_folder import read_headers
from qformat.errors import Reason, SourceError


def check_source(manifest: Manifest, source: Path, *, artifact: str) -> bool:
    """Read the weights of `source` that an artifact packed and compare their digests; False: there are none to compare.

    artifact: its name, for messages.
    Raises SourceError for the first one that is missing or another.
    """
    digests = {
        name: record.source_xxh3
        for name, record in manifest.tensors.items()
        if isinstance(record, PackedRecord) and record.source_xxh3 is not None
    }
    shards = MappedShards(read_headers(source, error=SourceError))
    for name, digest in digests.items():
        if name not in shards.layout.located:
            raise _mismatch(artifact, source, name, "is not there")
        found = xxh3(shards.view(name).reshape(-1).view(np.uint8))
        if found != digest:
            raise _mismatch(artifact, source, name, f"has the digest {found}, expected {digest}")
    return bool(digests)


def _mismatch(artifact: str, source: Path, name: str, problem: str) -> SourceError:
    return SourceError(
        Reason.SOURCE_MISMATCH,
        source,
        f"{problem}: {artifact} was made from other weights",
        tensor=name,
        next_step="Give its source, or --any-source to compare with this one all the same",
    )
