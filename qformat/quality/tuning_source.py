"""Is a 16-bit checkpoint the one that an artifact was made from? By the digests in the manifest, tensor by tensor."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from qformat import strict_json
from qformat.artifact.digests import xxh3, xxh3_of_range
from qformat.artifact.manifest import KeptRecord, Manifest
from qformat.artifact.reader import Artifact
from qformat.artifact.regular_files import open_regular
from qformat.artifact.safetensors_folder import read_headers
from qformat.cores import usable_cores
from qformat.errors import Reason, SourceError, UsageError


def source_digests(manifest: Manifest) -> dict[str, str | None]:
    """Return the XXH3-128 that each tensor of the source must have, None where the manifest does not know it."""
    return {
        name: record.source_xxh3 or (record.xxh3 if isinstance(record, KeptRecord) else None)
        for name, record in manifest.tensors.items()
    }


def check_whole_source(artifact: Artifact, source: Path, *, trust: bool) -> str:
    """Compare every tensor of a checkpoint with the artifact's manifest; return one digest of them all.

    trust: take a source on trust whose digests the manifest does not know; those that it knows are compared.
    Raises SourceError naming the first tensor that is another one, UsageError for a manifest without digests.
    """
    expected = source_digests(artifact.manifest)
    unknown = [name for name, digest in expected.items() if digest is None]
    if unknown and not trust:
        raise UsageError(
            f"{artifact.path}: its manifest does not name the digest of the source of {unknown[0]} and "
            f"{len(unknown) - 1} others, so nothing shows that {source} is what it was made from. "
            "Convert the source anew, or take it on trust with --trust-source"
        )
    layout = read_headers(source, error=SourceError)
    for name in expected:
        if name not in layout.located:
            raise SourceError(
                Reason.SOURCE_MISMATCH,
                source,
                f"has no such tensor, but {artifact.path.name} was made from one",
                tensor=name,
                next_step="Give the checkpoint that the artifact was made from",
            )
    with ExitStack() as stack:
        files = {
            shard: stack.enter_context(open_regular(source, shard, error=SourceError)) for shard in layout.shard_nbytes
        }

        def digest(name: str) -> str:
            where = layout.located[name]
            start, stop, path = where.entry.start, where.entry.stop, source / where.shard
            return xxh3_of_range(files[where.shard], start, stop, path=path, error=SourceError)

        with ThreadPoolExecutor(usable_cores()) as pool:
            found = dict(zip(expected, pool.map(digest, expected), strict=True))
    wrong = [name for name, value in expected.items() if value is not None and found[name] != value]
    if wrong:
        raise SourceError(
            Reason.SOURCE_MISMATCH,
            source / layout.located[wrong[0]].shard,
            f"is not the tensor that {artifact.path.name} was made from: XXH3-128 {found[wrong[0]]}, "
            f"expected {expected[wrong[0]]}; so are {len(wrong)} of {len(expected)} tensors",
            tensor=wrong[0],
            next_step="Give the checkpoint that the artifact was made from",
        )
    return xxh3(strict_json.dumps(dict(sorted(found.items()))).encode())
