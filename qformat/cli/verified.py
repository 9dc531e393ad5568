"""A verification with its progress on stderr, as the commands that verify a folder show it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qformat.cli.display import say_compiling
from qformat.cli.progress import Bar

if TYPE_CHECKING:
    from qformat.converters.compare.verification import Stage, Verification

_STAGES: dict[Stage, str] = {"digests": "Checking digests", "comparison": "Comparing with the source"}


def verified(
    artifact: Path | str,
    source: str | None,
    *,
    workers: int | None,
    sha256: bool = False,
    public_key: Path | None = None,
) -> Verification:
    """Verify an artifact and compare it with its source. Raises what `verify_against_source` raises."""
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
            on_compile=say_compiling,
        )
