"""Verification of a folder with its progress on stderr."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qformat.cli.progress import Bar

if TYPE_CHECKING:
    from qformat.converters.compare.verification import Stage, Verification

_STAGES: dict[Stage, str] = {"digests": "Checking digests", "comparison": "Comparing with source"}


def verified(
    artifact: Path | str,
    source: str | None,
    *,
    workers: int | None,
    sha256: bool = False,
    public_key: Path | None = None,
) -> Verification:
    """Verify an artifact and compare it with its source. Raises what `verify_against_source` raises.

    Args:
        artifact: Directory of the artifact.
        source: Source checkpoint, a folder or a repository of the Hub. Not compared if None.
        workers: Number of threads, one per core if None.
        sha256: Also compute the SHA-256 of every shard.
        public_key: Key to check the signature with. Not checked if None.

    Returns:
        The result of the verification.
    """
    from qformat.converters.compare.verification import verify_against_source

    with Bar() as bar:
        return verify_against_source(
            artifact,
            source,
            sha256=sha256,
            public_key=public_key,
            workers=workers,
            on_stage=lambda stage, nbytes: bar.start(nbytes, _STAGES[stage]),
            on_progress=bar.advance,
            on_compile=bar.compiling,
        )
