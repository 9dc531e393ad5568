"""A checkpoint of the Hub in files that are not streamed (PyTorch's .bin): read from the local cache, at its commit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qformat.artifact.manifest import JsonObject
from qformat.converters.sources.encoded.decoding_source import DecodingSource
from qformat.converters.sources.hub.files import HubFiles
from qformat.converters.sources.source import Source
from qformat.errors import Option, Reason, SourceError
from qformat.hub.reading.cache import CachedRepository


class HubSnapshot(DecodingSource):
    """What a source finds in a snapshot's folder, with the repository and commit that it is.

    Every file is compared with its digest when it is opened.
    """

    def __init__(self, files: HubFiles, open_folder: Callable[[Path], Source]) -> None:
        repository = files.repository
        if not isinstance(repository, CachedRepository):
            raise SourceError(
                Reason.UNSUPPORTED_SOURCE, files.path, "has no safetensors, and its other files cannot be streamed",
                next_step=(
                    "Download PyTorch's .bin files first with ", Option("keep_source", True),
                    "; give a GGUF file by its path",
                ),
            )  # fmt: skip
        repository.check(repository.files)
        stored = open_folder(repository.folder)
        super().__init__(stored)
        self.kind, self.config, self.packed = stored.kind, stored.config, stored.packed
        self._files = files

    @property
    def pin(self) -> JsonObject:
        """What a later run needs to go on with this commit."""
        return self._files.pin

    def describe(self) -> JsonObject:
        """Return what the folder's source records, with repository and commit."""
        repository = self._files.repository
        return {**self.stored.describe(), "repository": repository.name, "commit": repository.commit}

    def fingerprint(self) -> str:
        """Return the commit and the folder's fingerprint."""
        return f"{self._files.repository.commit} {self.stored.fingerprint()}"

    def close(self) -> None:
        """Close the folder and the snapshot."""
        super().close()
        self._files.close()
