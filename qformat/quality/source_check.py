"""Checks whether a 16-bit checkpoint is the source of an artifact, by the digests in the manifest, tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path

from qformat import strict_json
from qformat.artifact.digests import xxh3, xxh3_of_range
from qformat.artifact.manifest import KeptRecord, Manifest, PackedRecord
from qformat.artifact.reading.reader import Artifact
from qformat.artifact.reading.safetensors_folder import read_headers
from qformat.artifact.reading.structure import ShardLayout
from qformat.artifact.sources.source_files import open_shard
from qformat.cores import run_tasks, usable_cores
from qformat.errors import Option, Reason, SourceError, UsageError, Words


def check_source(manifests: Mapping[str, Manifest], source: Path) -> set[str]:
    """Compare the weights of a checkpoint with the digests in the manifests of artifacts. Each weight is read once.

    Args:
        manifests: Manifests of the artifacts, keyed by name.
        source: Directory of the checkpoint.

    Returns:
        The names of the artifacts whose manifests contain such digests.

    Raises:
        SourceError: A weight is missing or differs.
    """
    expected = {artifact: _digests_of_weights(manifest) for artifact, manifest in manifests.items()}
    layout = read_headers(source, error=SourceError)
    next_step = ("Give the artifact's source, or compare with this one anyway: ", Option("any_source", True))
    for artifact, digests in expected.items():
        _refuse_missing(artifact, digests, layout, next_step)
    found = _digests(layout, set().union(*expected.values()))
    for artifact, digests in expected.items():
        _refuse_others(artifact, digests, found, layout, next_step)
    return {artifact for artifact, digests in expected.items() if digests}


def check_whole_source(artifact: Artifact, source: Path, *, trust: bool) -> str:
    """Compare every tensor of a checkpoint with an artifact's manifest and return one digest of all tensors.

    Args:
        artifact: The open artifact.
        source: Directory of the checkpoint.
        trust: Whether to accept tensors whose digest the manifest does not contain. All others are compared.

    Raises:
        SourceError: A tensor is missing or differs.
        UsageError: The manifest lacks digests and `trust` is False.
    """
    expected = source_digests(artifact.manifest)
    unknown = [name for name, digest in expected.items() if digest is None]
    if unknown and not trust:
        raise UsageError(
            f"{artifact.path}: its manifest lacks the source digest of {unknown[0]} and "
            f"{len(unknown) - 1} other tensors, so it is unknown whether {source} is its source. "
            "Convert the source again, or trust it with ",
            Option("trust_source", True),
        )
    layout = read_headers(source, error=SourceError)
    next_step = ("Give the artifact's source checkpoint",)
    _refuse_missing(artifact.path.name, expected, layout, next_step)
    found = _digests(layout, expected)
    _refuse_others(artifact.path.name, expected, found, layout, next_step)
    return xxh3(strict_json.dumps(dict(sorted(found.items()))).encode())


def source_digests(manifest: Manifest) -> dict[str, str | None]:
    """Return the XXH3-128 of each tensor of the source, or None if the manifest does not contain it."""
    return {
        name: record.source_xxh3 or (record.xxh3 if isinstance(record, KeptRecord) else None)
        for name, record in manifest.tensors.items()
    }


def _digests_of_weights(manifest: Manifest) -> dict[str, str]:
    """Return the source digests of packed weights only, since a source may keep other tensors in another dtype."""
    packed = ((name, record) for name, record in manifest.tensors.items() if isinstance(record, PackedRecord))
    return {name: record.source_xxh3 for name, record in packed if record.source_xxh3 is not None}


def _digests(layout: ShardLayout, names: Collection[str]) -> dict[str, str]:
    """Return the XXH3-128 of tensors of a checkpoint, all of which must exist."""
    with ExitStack() as stack:
        files = {
            shard: stack.enter_context(open_shard(layout, shard, error=SourceError)) for shard in layout.shard_nbytes
        }

        def digest(name: str) -> str:
            where = layout.located[name]
            start, stop, path = where.entry.start, where.entry.stop, layout.path / where.shard
            return xxh3_of_range(files[where.shard], start, stop, path=path, error=SourceError)

        tasks = {name: name for name in names}
        return run_tasks(tasks, digest, workers=usable_cores(), thread_name="qformat-source")


def _refuse_missing(artifact: str, expected: Mapping[str, str | None], layout: ShardLayout, next_step: Words) -> None:
    for name in expected:
        if name not in layout.located:
            raise SourceError(
                Reason.SOURCE_MISMATCH,
                layout.path,
                f"is missing, but {artifact} was converted from it",
                tensor=name,
                next_step=next_step,
            )


def _refuse_others(
    artifact: str,
    expected: Mapping[str, str | None],
    found: Mapping[str, str],
    layout: ShardLayout,
    next_step: Words,
) -> None:
    wrong = [name for name, digest in expected.items() if digest is not None and found[name] != digest]
    if wrong:
        raise SourceError(
            Reason.SOURCE_MISMATCH,
            layout.path / layout.located[wrong[0]].shard,
            f"is not the tensor that {artifact} was converted from: XXH3-128 {found[wrong[0]]}, "
            f"expected {expected[wrong[0]]} ({len(wrong)} of {len(expected)} tensors differ)",
            tensor=wrong[0],
            next_step=next_step,
        )
