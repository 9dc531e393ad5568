"""Artifacts and sources changed without a change of any digest, and what a comparison finds."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import qformat
from qformat.artifact.digests import xxh3
from qformat.artifact.manifest import KeptRecord, PackedRecord
from qformat.artifact.reading.manifest_parser import parse as parse_manifest
from qformat.artifact.reading.reader import open_artifact
from qformat.converters.compare.comparison import Comparison
from qformat.names import MANIFEST_NAME
from tests.small_models import Tensor, llama_config, llama_tensors, write_checkpoint

UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.norm.weight"


def reseal(artifact: Path) -> None:
    """Update every digest of an artifact, so that only changes that digests do not detect remain."""
    path = artifact / MANIFEST_NAME
    manifest = parse_manifest(path.read_bytes(), path)
    with open_artifact(artifact) as opened:
        located = opened.located

    def digest(name: str) -> str:
        data = (artifact / located[name].shard).read_bytes()
        return xxh3(data[located[name].entry.start : located[name].entry.stop])

    tensors = {
        name: dataclasses.replace(record, xxh3=digest(name))
        if isinstance(record, KeptRecord)
        else dataclasses.replace(record, components={part: digest(name + part.value) for part in record.components})
        for name, record in manifest.tensors.items()
    }
    files = {
        name: dataclasses.replace(record, sha256=hashlib.sha256((artifact / name).read_bytes()).hexdigest())
        for name, record in manifest.files.items()
    }
    path.write_bytes(dataclasses.replace(manifest, tensors=tensors, files=files).to_bytes())
    assert qformat.verify(artifact, sha256=True).passed


def change_byte(artifact: Path, component: str, at: int, change: Callable[[int], int]) -> None:
    with open_artifact(artifact) as opened:
        where = opened.located[component]
    data = bytearray((artifact / where.shard).read_bytes())
    position = where.entry.start + at
    data[position] = change(data[position])
    (artifact / where.shard).write_bytes(data)


def without_source_digests(artifact: Path) -> None:
    path = artifact / MANIFEST_NAME
    manifest = parse_manifest(path.read_bytes(), path)
    tensors = {
        name: dataclasses.replace(record, source_xxh3=None) if isinstance(record, PackedRecord) else record
        for name, record in manifest.tensors.items()
    }
    path.write_bytes(dataclasses.replace(manifest, tensors=tensors).to_bytes())


def rewrite(source: Path, changed: Mapping[str, Tensor | None], *, into: Path) -> Path:
    """Write the small Llama with some tensors replaced, added, or left out."""
    tensors = {name: tensor for name, tensor in ({**llama_tensors(), **changed}).items() if tensor is not None}
    return write_checkpoint(into, tensors, config=llama_config())


def reasons(comparison: Comparison) -> list[tuple[str, str | None]]:
    return [(finding.reason.value, finding.tensor) for finding in comparison.findings]
