"""A Hub checkpoint in files that cannot be streamed (PyTorch's .bin): read from the local cache at its commit."""

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
    """A source in a snapshot's directory, with its repository and commit.

    Every file is compared with its digest when the source is opened.
    """

    def __init__(self, files: HubFiles, open_folder: Callable[[Path], Source]) -> None:
        repository = files.repository
        if not isinstance(repository, CachedRepository):
            raise SourceError(
                Reason.UNSUPPORTED_SOURCE, files.path, "has no safetensors files, and others cannot be streamed",
                next_step=(
                    "Download PyTorch's .bin files first with ", Option("keep_source", True),
                    ", or download a GGUF file and give its path",
                ),
            )  # fmt: skip
        repository.check(repository.files)
        stored = open_folder(repository.folder)
        super().__init__(stored)
        self.kind, self.config, self.packed = stored.kind, stored.config, stored.packed
        self._files = files

    @property
    def pin(self) -> JsonObject:
        """What a later run needs to resume with this commit."""
        return self._files.pin

    def describe(self) -> JsonObject:
        """Return the record of the directory's source, with repository and commit."""
        repository = self._files.repository
        return {**self.stored.describe(), "repository": repository.name, "commit": repository.commit}

    def fingerprint(self) -> str:
        """Return the commit and the fingerprint of the directory's source."""
        return f"{self._files.repository.commit} {self.stored.fingerprint()}"

    def close(self) -> None:
        """Close the directory and the snapshot."""
        super().close()
        self._files.close()
