"""The download step of a fetch: missing pieces of files arrive over several connections in a staging directory.

Every file is divided into pieces. One thread computes the SHA-256 of each file in order, behind the threads that write
pieces. The journal records the XXH3-128 of every piece that was written, so a later run fetches only missing pieces:

    {"file": FILE, "start": BYTE, "stop": BYTE, "xxh3": DIGEST}
    {"distrusted": FILE}                                         the SHA-256 of the file was wrong: fetch it again

Files that only accompany the model may differ from the manifest. Such a file is fetched as it is in the commit.

The staging directory is verified like any artifact before it is renamed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from qformat.artifact.digests import sha256_of_file, xxh3, xxh3_of_range
from qformat.artifact.manifest import FileRecord
from qformat.artifact.reading.file_roles import accompanies
from qformat.artifact.reading.verify import Finding, notice_of, range_checks, verify_integrity
from qformat.artifact.writing.behind import Follower, WrittenFile
from qformat.artifact.writing.staging import Staging
from qformat.cores import run_tasks, usable_cores
from qformat.errors import ArtifactError, Interrupted, Reason
from qformat.hub.reading.listing import PublishedArtifact
from qformat.hub.reading.repository import RemoteFile
from qformat.hub.reading.transfer import Transfer
from qformat.hub.signature import MAX_SIGNATURE_NBYTES
from qformat.names import MANIFEST_NAME, SIGNATURE_NAME

MAX_ACCOMPANYING_NBYTES = 64 * 2**20
"""Largest file that is fetched although it differs from the manifest. It is held in memory."""


@dataclass(frozen=True, slots=True)
class _Piece:
    file: str
    start: int
    stop: int

    @property
    def key(self) -> str:
        return f"{self.file} {self.start}"


class FetchRun:
    """One run of a fetch, and the state that its threads share."""

    def __init__(
        self, published: PublishedArtifact, staging: Staging, transfer: Transfer, on_progress: Callable[[int], None]
    ) -> None:
        self._published = published
        listed = published.repository.files
        self._files = {
            name: record
            for name, record in published.manifest.files.items()
            if not accompanies(name, record) or (name in listed and _agrees(record, listed[name]))
        }
        self.notices: tuple[Finding, ...] = ()
        self._staging = staging
        self._transfer = transfer
        self._on_progress = on_progress
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._buffers = threading.local()
        self._descriptors: dict[str, int] = {}
        self._n_fetched = 0

    def run(self) -> int:
        """Fetch missing pieces, check all files, finish the directory, and return the number of bytes fetched."""
        with ExitStack() as stack:
            for name, record in self._files.items():
                path = self._staging.folder / name
                self._descriptors[name] = self._staging.disk.open_for_writing(path)
                stack.callback(os.close, self._descriptors[name])
                self._staging.disk.set_size(self._descriptors[name], record.nbytes, path)
            digests = self._fetch(stack)
            for name, record in self._files.items():
                if digests[name] != record.sha256:
                    self._repair(name, record)
        for name in self._published.manifest.files.keys() - self._files.keys():
            self._fetch_changed(name)
        self._write_small()
        self._refuse_damaged()
        self._staging.seal()
        return self._n_fetched

    def _fetch(self, stack: ExitStack) -> dict[str, str]:
        """Fetch every missing piece and return the SHA-256 of each file."""
        written = {
            name: WrittenFile(self._staging.folder / name, self._descriptors[name], record.nbytes)
            for name, record in self._files.items()
        }
        follower = Follower(written)
        stack.callback(follower.close)
        there = self._resumed()
        missing = {}
        for piece in [piece for name, record in self._files.items() for piece in self._pieces(name, record)]:
            if piece in there:
                follower.mark_written(piece.file, piece.start, piece.stop)
                self._on_progress(piece.stop - piece.start)
            else:
                missing[piece.key] = piece

        def do(piece: _Piece) -> None:
            self._fetch_piece(piece)
            follower.mark_written(piece.file, piece.start, piece.stop)

        run_tasks(
            missing,
            do,
            workers=self._transfer.connections,
            stopping=self._stopping,
            thread_name="qformat-fetch",
            on_stop=self._published.repository.close,
        )
        return follower.sha256()

    def _resumed(self) -> set[_Piece]:
        """Return the pieces that an interrupted run wrote and that are intact on disk."""
        noted: dict[_Piece, str] = {}
        for entry in self._staging.entries:
            if "distrusted" in entry:
                noted = {piece: digest for piece, digest in noted.items() if piece.file != entry["distrusted"]}
                continue
            file, start, stop, digest = (entry.get(key) for key in ("file", "start", "stop", "xxh3"))
            if isinstance(file, str) and isinstance(start, int) and isinstance(stop, int) and isinstance(digest, str):
                noted[_Piece(file, start, stop)] = digest
        return {
            piece
            for piece, digest in noted.items()
            if piece.file in self._files
            and piece.stop <= self._files[piece.file].nbytes
            and self._xxh3_of(piece) == digest
        }

    def _fetch_piece(self, piece: _Piece) -> None:
        if not hasattr(self._buffers, "bytes"):
            self._buffers.bytes = bytearray(self._transfer.piece_nbytes)
        data = memoryview(self._buffers.bytes)[: piece.stop - piece.start]
        self._published.repository.read_range(piece.file, piece.start, data, on_bytes=self._arrived)
        path = self._staging.folder / piece.file
        self._staging.disk.write_at(self._descriptors[piece.file], data, piece.start, path)
        self._staging.record({"file": piece.file, "start": piece.start, "stop": piece.stop, "xxh3": xxh3(data)})

    def _arrived(self, nbytes: int) -> None:
        if self._stopping.is_set():
            raise Interrupted
        with self._lock:
            self._n_fetched += nbytes
        self._on_progress(nbytes)

    def _repair(self, name: str, record: FileRecord) -> None:
        """Fetch the damaged pieces of a file again. Raise ArtifactError if the file still has another SHA-256."""
        for piece in self._damaged(name, record):
            self._fetch_piece(piece)
        path = self._staging.folder / name
        found = sha256_of_file(self._descriptors[name], record.nbytes, path=path, error=ArtifactError)
        if found != record.sha256 and accompanies(name, record):
            self._fetch_changed(name)
        elif found != record.sha256:
            self._staging.record({"distrusted": name})
            raise ArtifactError(
                Reason.FILE_DIGEST,
                self._published.where / name,
                f"does not match the manifest after two downloads: found SHA-256 {found}, expected {record.sha256}",
                next_step="Run the same command again: it fetches this file from scratch and keeps the others",
            )

    def _fetch_changed(self, name: str) -> None:
        """Fetch a file that only accompanies the model as it is in the commit, unless it is missing or too large."""
        path, listed = self._staging.folder / name, self._published.repository.files.get(name)
        if listed is None or listed.nbytes > MAX_ACCOMPANYING_NBYTES:
            self._staging.disk.remove_file(path)
            return
        data = self._published.repository.read_small(name, max_nbytes=MAX_ACCOMPANYING_NBYTES)
        self._arrived(len(data))
        self._staging.disk.write_file(path, data)

    def _damaged(self, name: str, record: FileRecord) -> list[_Piece]:
        """Return the pieces with a mismatch against the manifest's XXH3-128, or all pieces if it does not show any."""
        pieces = self._pieces(name, record)
        if not record.is_shard:
            return pieces
        checks = range_checks(self._staging.folder, self._published.manifest, {name: self._descriptors[name]}, [])
        wrong = [check for check in checks if check.run() is not None]
        found = [
            piece for piece in pieces if any(check.start < piece.stop and piece.start < check.stop for check in wrong)
        ]
        return found or pieces

    def _write_small(self) -> None:
        """Write the manifest, which was checked when it was read, and the signature."""
        self._staging.disk.write_file(self._staging.folder / MANIFEST_NAME, self._published.manifest_bytes)
        if self._published.signed:
            data = self._published.repository.read_small(SIGNATURE_NAME, max_nbytes=MAX_SIGNATURE_NBYTES)
            self._staging.disk.write_file(self._staging.folder / SIGNATURE_NAME, data)

    def _refuse_damaged(self) -> None:
        """Verify the staging directory: SHA-256 digests alone do not show that the files fit together."""
        report = verify_integrity(self._staging.folder, workers=usable_cores())
        if not report.passed:
            raise report.findings[0].as_error(self._staging.folder)
        self.notices = tuple(notice_of(notice, self._published.where) for notice in report.notices)

    def _xxh3_of(self, piece: _Piece) -> str:
        path = self._staging.folder / piece.file
        return xxh3_of_range(self._descriptors[piece.file], piece.start, piece.stop, path=path, error=ArtifactError)

    def _pieces(self, name: str, record: FileRecord) -> list[_Piece]:
        step = self._transfer.piece_nbytes
        return [_Piece(name, start, min(start + step, record.nbytes)) for start in range(0, record.nbytes, step)]


def _agrees(record: FileRecord, listed: RemoteFile) -> bool:
    """Return whether a file of the repository can be the one in the manifest, as far as the listing shows."""
    return listed.nbytes == record.nbytes and listed.sha256 in {None, record.sha256}
