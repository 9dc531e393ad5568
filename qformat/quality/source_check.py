"""Whether a 16-bit checkpoint is the one that an artifact was made from, by the digests in its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qformat.artifact.digests import xxh3
from qformat.artifact.manifest import Manifest, PackedRecord
from qformat.artifact.reader import MappedShards
from qformat.artifact.safetensors_folder import read_headers
from qformat.errors import Reason, SourceError


def check_source(manifests: Mapping[str, Manifest], source: Path) -> set[str]:
    """Compare the weights of `source` with the digests in the manifests of artifacts; each weight is read once.

    manifests: by the artifact's name. Returns the names of those that have such digests.
    Raises SourceError for the first weight that is missing or another.
    """
    shards = MappedShards(read_headers(source, error=SourceError))
    found: dict[str, str] = {}
    checked = set()
    for artifact, manifest in manifests.items():
        for name, record in manifest.tensors.items():
            if not isinstance(record, PackedRecord) or record.source_xxh3 is None:
                continue
            if name not in shards.layout.located:
                raise _mismatch(artifact, source, name, "is not there")
            if name not in found:
                found[name] = xxh3(shards.view(name).reshape(-1).view(np.uint8))
            if found[name] != record.source_xxh3:
                problem = f"has the digest {found[name]}, expected {record.source_xxh3}"
                raise _mismatch(artifact, source, name, problem)
            checked.add(artifact)
    return checked


def _mismatch(artifact: str, source: Path, name: str, problem: str) -> SourceError:
    return SourceError(
        Reason.SOURCE_MISMATCH,
        source,
        f"{problem}: {artifact} was made from other weights",
        tensor=name,
        next_step="Give its source, or --any-source to compare with this one all the same",
    )
