"""Is a 16-bit checkpoint the one that an artifact was made from? By the digests in the manifest, tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path

from qformat import strict_json
from qformat.artifact.digests import xxh3, xxh3_of_range
from qformat.artifact.manifest import KeptRecord, Manifest, PackedRecord
from qformat.artifact.reading.reader import Artifact
from qformat.artifact.reading.regular_files import open_regular
from qformat.artifact.reading.safetensors_folder import read_headers
from qformat.artifact.reading.structure import ShardLayout
from qformat.cores import run_tasks, usable_cores
from qformat.errors import Option, Reason, SourceError, UsageError, Words


def check_source(manifests: Mapping[str, Manifest], source: Path) -> set[str]:
    """Compare the weights of `source` with the digests in the manifests of artifacts; each weight is read once.

    manifests: by the artifact's name. Returns the names of those that have such digests.
    Raises SourceError for the first weight that is missing or another.
    """
    expected = {artifact: _digests_of_weights(manifest) for artifact, manifest in manifests.items()}
    layout = read_headers(source, error=SourceError)
    next_step = ("Give its source, or ", Option("any_source", True), " to compare with this one all the same")
    for artifact, digests in expected.items():
        _refuse_missing(artifact, digests, layout, next_step)
    found = _digests(layout, set().union(*expected.values()))
    for artifact, digests in expected.items():
        _refuse_others(artifact, digests, found, layout, next_step)
    return {artifact for artifact, digests in expected.items() if digests}


def check_whole_source(artifact: Artifact, source: Path, *, trust: bool) -> str:
    """Compare every tensor of a checkpoint with the artifact's manifest; return one digest of them all.

    trust: take a source on trust whose digests the manifest does not know; those that it knows are compared.
    Raises SourceError for the first tensor that is missing or another, UsageError for a manifest without digests.
    """
    expected = source_digests(artifact.manifest)
    unknown = [name for name, digest in expected.items() if digest is None]
    if unknown and not trust:
        raise UsageError(
            f"{artifact.path}: its manifest does not name the digest of the source of {unknown[0]} and "
            f"{len(unknown) - 1} others, so nothing shows that {source} is what it was made from. "
            "Convert the source anew, or take it on trust with ",
            Option("trust_source", True),
        )
    layout = read_headers(source, error=SourceError)
    next_step = ("Give the checkpoint that the artifact was made from",)
    _refuse_missing(artifact.path.name, expected, layout, next_step)
    found = _digests(layout, expected)
    _refuse_others(artifact.path.name, expected, found, layout, next_step)
    return xxh3(strict_json.dumps(dict(sorted(found.items()))).encode())


def source_digests(manifest: Manifest) -> dict[str, str | None]:
    """Return the XXH3-128 that each tensor of the source must have, None where the manifest does not know it."""
    return {
        name: record.source_xxh3 or (record.xxh3 if isinstance(record, KeptRecord) else None)
        for name, record in manifest.tensors.items()
    }


def _digests_of_weights(manifest: Manifest) -> dict[str, str]:
    """Of packed weights only: other sources of the same weights may keep the rest in another dtype."""
    packed = ((name, record) for name, record in manifest.tensors.items() if isinstance(record, PackedRecord))
    return {name: record.source_xxh3 for name, record in packed if record.source_xxh3 is not None}


def _digests(layout: ShardLayout, names: Collection[str]) -> dict[str, str]:
    """Return the XXH3-128 of tensors of a checkpoint, all of which are there."""
    with ExitStack() as stack:
        files = {
            shard: stack.enter_context(open_regular(layout.path, shard, error=SourceError))
            for shard in layout.shard_nbytes
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
                f"has no such tensor, but {artifact} was made from one",
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
            f"is not the tensor that {artifact} was made from: XXH3-128 {found[wrong[0]]}, "
            f"expected {expected[wrong[0]]}; so are {len(wrong)} of {len(expected)} tensors",
            tensor=wrong[0],
            next_step=next_step,
        )
