"""The files of a checkpoint in a Hub repository or its snapshot in the local cache, at one commit and with all digests.

Weights are read in one of two ways: through a stream that fetches each byte once and in order while a conversion runs
(`qformat.converters.sources.hub.reading`), or by a separate request for each read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qformat.artifact import header
from qformat.artifact.header import Header
from qformat.artifact.manifest import JsonObject
from qformat.artifact.reading.regular_files import check_plain_name
from qformat.artifact.reading.side_files import is_side_file
from qformat.artifact.sources.stand_ins import HEAD_NBYTES, refuse_stand_in
from qformat.converters.sources.checkpoint_folder import CheckpointFiles
from qformat.cores import run_tasks
from qformat.errors import SourceError
from qformat.hub.reading.repository import RemoteFile, Repository
from qformat.hub.reading.stream import ByteStream
from qformat.hub.reading.transfer import Transfer

_MAX_NOT_LFS_NBYTES = 16 * 2**20
"""Size limit in bytes for files outside of large-file storage, where the Hub accepts at most 10 MB."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of weights.

    Attributes:
        file: The file in the repository.
        head: The bytes before its data.
        whole: All bytes of a small file, already checked. None for a large one.
    """

    file: RemoteFile
    head: bytes
    whole: bytes | None


class HubFiles(CheckpointFiles):
    """The files in a repository's top directory. Closing it closes the repository.

    Args:
        repository: The open repository.
        revision: Branch, tag or commit that the user asked for.
        transfer: Connections, timeouts and retries.
    """

    def __init__(self, repository: Repository, *, revision: str, transfer: Transfer) -> None:
        self.repository = repository
        self.transfer = transfer
        self.path = Path(f"{repository.name}@{repository.commit[:12]}")
        self.state_when_opened: JsonObject = {"commit": repository.commit}
        self.pin: JsonObject = {"repository": repository.name, "revision": revision, "commit": repository.commit}
        self.shards: dict[str, Shard] = {}
        self.stream: ByteStream | None = None
        self._small: dict[str, bytes] = {}

    def close(self) -> None:
        """Close the repository."""
        self.repository.close()

    def names(self) -> list[str]:
        """Return the names of the files in the repository's top directory."""
        return sorted(path for path in self.repository.files if "/" not in path)

    def folders(self) -> list[str]:
        """Return the names of the repository's directories, sorted."""
        return sorted({path.partition("/")[0] for path in self.repository.files if "/" in path})

    def read_small(self, name: str, *, max_nbytes: int) -> bytes:
        """Return the bytes of a small file, fetched once and checked against the commit's digest.

        Args:
            name: Name of the file.
            max_nbytes: Largest size in bytes that is accepted.
        """
        if name not in self._small:
            data = self.repository.read_small(self._listed(name).path, max_nbytes=max_nbytes)
            refuse_stand_in(name, data[:HEAD_NBYTES], path=self.path / name, error=SourceError)
            self._small[name] = data
        return self._small[name]

    def read_headers(self, names: Sequence[str]) -> dict[str, Header]:
        """Fetch the headers of safetensors files, several at a time, with two requests per file."""
        for name in names:
            self._listed(name)
        # Closing wakes threads that wait for their next attempt.
        return run_tasks(
            {name: name for name in names},
            self._read_header,
            workers=self.transfer.connections,
            thread_name="qformat-headers",
            on_stop=self.close,
        )

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` with bytes of a shard by a separate request.

        Args:
            name: Name of the shard.
            offset: Offset of the first byte in the file.
            out: Buffer to fill.
        """
        whole = self.shards[name].whole
        if whole is not None:
            out[:] = whole[offset : offset + len(out)]
        else:
            self.repository.read_range(name, offset, out)

    def list_side_files(self) -> dict[str, int]:
        """Return the files to carry over into the artifact, with their sizes in bytes."""
        return {name: self.repository.files[name].nbytes for name in self.names() if is_side_file(name)}

    def state(self) -> JsonObject:
        """Return the commit. Its contents cannot change, and everything fetched is compared with its digests."""
        return self.state_when_opened

    def digest(self, name: str) -> str:
        """Return the digest of a file's content according to the commit."""
        file = self._listed(name)
        return file.sha256 or file.oid

    def described_shards(self) -> Mapping[str, JsonObject]:
        """Return the size and SHA-256 of each shard, as the manifest records them."""
        described: dict[str, JsonObject] = {}
        for name, shard in sorted(self.shards.items()):
            described[name] = {"nbytes": shard.file.nbytes}
            if shard.file.sha256 is not None:
                described[name]["sha256"] = shard.file.sha256
        return described

    def _listed(self, name: str) -> RemoteFile:
        check_plain_name(name, path=self.path, error=SourceError)
        return self.repository.file(name)

    def _read_header(self, name: str) -> Header:
        file, path = self._listed(name), self.path / name
        whole = self.read_small(name, max_nbytes=_MAX_NOT_LFS_NBYTES) if file.sha256 is None else None

        def read_into(offset: int, out: memoryview) -> None:
            if whole is None:
                self.repository.read_range(name, offset, out)
            else:
                out[:] = whole[offset : offset + len(out)]

        text = header.read_text(read_into, file_nbytes=file.nbytes, path=path, error=SourceError)
        self.shards[name] = Shard(file, header.framed(text), whole)
        return header.parse(text, file_nbytes=file.nbytes, path=path, error=SourceError, of_artifact=False)
