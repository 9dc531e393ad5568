"""Changes that publishing makes to a repository."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from qformat.artifact.limits import MAX_MANIFEST_NBYTES
from qformat.artifact.reading.manifest_parser import parse
from qformat.errors import HubError, InvalidFileError, Option
from qformat.hub.publishing.publication import Publication
from qformat.hub.reading.remote import RemoteRepository
from qformat.names import MANIFEST_NAME, SIGNATURE_NAME

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
"""Suffixes of weight files, which some readers would load together with those of the artifact."""


@dataclass(frozen=True, slots=True)
class Changes:
    """Names of files, by what publishing does to them.

    Attributes:
        new: Files that are added.
        changed: Files that get another content.
        unchanged: Files that already have the same content.
        removed: Files of an older artifact that are removed.
        others: Files that do not belong to the artifact and stay, without hidden files.
    """

    new: tuple[str, ...]
    changed: tuple[str, ...]
    unchanged: tuple[str, ...]
    removed: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def sent(self) -> tuple[str, ...]:
        """Files to upload."""
        return (*self.new, *self.changed)

    @property
    def any(self) -> bool:
        """Whether the repository changes."""
        return bool(self.sent or self.removed)


def find_changes(publication: Publication, target: RemoteRepository | None, *, name: str) -> Changes:
    """Compare the files to publish with those of the repository.

    Args:
        publication: Files to publish.
        target: The repository, or None if it does not exist.
        name: Repository and branch, for messages.

    Raises:
        HubError: The repository has other weight files.
    """
    there = target.files if target is not None else {}
    same = {file for file, published in publication.files.items() if published.is_like(there.get(file))}
    removed = _left_over(target, publication) if target is not None else ()
    others = [file for file in there if file not in publication.files and file not in removed]
    weights = [file for file in others if "/" not in file and file.endswith(_WEIGHT_SUFFIXES)]
    if weights:
        raise HubError(
            name,
            f"has other weight files, which some readers would load as well: {', '.join(weights[:5])}",
            next_step=("Remove them, or publish to another repository or ", Option("revision")),
        )
    return Changes(
        new=tuple(file for file in publication.files if file not in there),
        changed=tuple(file for file in publication.files if file in there and file not in same),
        unchanged=tuple(file for file in publication.files if file in same),
        removed=removed,
        others=tuple(file for file in others if not os.path.basename(file).startswith(".")),
    )


def _left_over(target: RemoteRepository, publication: Publication) -> tuple[str, ...]:
    """Return the files of an older artifact, including its signature, that the new artifact does not have."""
    if MANIFEST_NAME not in target.files:
        return ()
    try:
        data = target.read_small(MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES)
        older = parse(data, Path(MANIFEST_NAME))
    except InvalidFileError:
        return ()  # the invalid manifest is replaced; other weight files are rejected
    listed = {*older.files, SIGNATURE_NAME}
    return tuple(name for name in target.files if name in listed and name not in publication.files)
