"""What publishing changes in a repository: its files now beside those that are to be there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from qformat.artifact.limits import MAX_MANIFEST_NBYTES
from qformat.artifact.manifest import parse
from qformat.errors import HubError, InvalidFileError
from qformat.hub.publishing.publication import Publication
from qformat.hub.reading.remote import RemoteRepository
from qformat.names import MANIFEST_NAME, SIGNATURE_NAME

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
"""Files of other weights: some readers would take them along with the artifact's."""


@dataclass(frozen=True, slots=True)
class Changes:
    """Names of files. removed: of an older artifact. others: that stay, and are no part of the artifact."""

    new: tuple[str, ...]
    changed: tuple[str, ...]
    unchanged: tuple[str, ...]
    removed: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def sent(self) -> tuple[str, ...]:
        """The files that the repository does not have yet."""
        return (*self.new, *self.changed)

    @property
    def any(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.sent or self.removed)


def find_changes(publication: Publication, target: RemoteRepository | None, *, name: str) -> Changes:
    """Compare what is to be in a repository with what it has; None has nothing yet.

    name: of the repository and branch, for messages. Raises HubError where other weights lie beside.
    """
    there = target.files if target is not None else {}
    same = {file for file, published in publication.files.items() if published.is_like(there.get(file))}
    removed = _left_over(target, publication) if target is not None else ()
    others = [file for file in there if file not in publication.files and file not in removed]
    weights = [file for file in others if "/" not in file and file.endswith(_WEIGHT_SUFFIXES)]
    if weights:
        raise HubError(
            name,
            f"holds other weights: {', '.join(weights[:5])}; readers would mix them with the artifact's",
            next_step="Remove them, or publish to another repository or --revision",
        )
    return Changes(
        new=tuple(file for file in publication.files if file not in there),
        changed=tuple(file for file in publication.files if file in there and file not in same),
        unchanged=tuple(file for file in publication.files if file in same),
        removed=removed,
        others=tuple(file for file in others if not os.path.basename(file).startswith(".")),
    )


def _left_over(target: RemoteRepository, publication: Publication) -> tuple[str, ...]:
    """Return the files of an older artifact in the repository that the new one has no more, its signature included."""
    if MANIFEST_NAME not in target.files:
        return ()
    try:
        data = target.read_small(MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES)
        older = parse(data, Path(MANIFEST_NAME))
    except InvalidFileError:
        return ()  # what stands there is replaced; other weights beside it are refused
    listed = {*older.files, SIGNATURE_NAME}
    return tuple(name for name in target.files if name in listed and name not in publication.files)
