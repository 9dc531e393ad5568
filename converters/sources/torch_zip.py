"""The zip file that `torch.save` writes: where its members are, and their CRC-32, which torch itself does not check."""

from __future__ import annotations

import os
import struct
import threading
import zipfile
import zlib
from pathlib import Path

from qformat.artifact.reading.regular_files import read_exactly
from qformat.errors import Reason, SourceError

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_MAGIC = b"PK\x03\x04"
_CHUNK_NBYTES = 4 * 2**20
_MAX_MEMBERS = 200_000
_MAX_DIRECTORY_NBYTES = 64 * 2**20
_END_NBYTES = 22
_LONGEST_COMMENT = 2**16


class TorchZip:
    """The members of an open .bin file: name, location and CRC-32. Rejects files that torch did not write."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self._path = path
        self.nbytes = os.fstat(descriptor).st_size
        self._starts = {self._start(member): member for member in self._list_members()}
        self._locks = {start: threading.Lock() for start in self._starts}
        self._checked: set[int] = set()

    def has_member(self, suffix: str) -> bool:
        """Return whether a member's name ends with `suffix`."""
        return any(member.filename.endswith(suffix) for member in self._starts.values())

    def read_member(self, suffix: str, *, max_nbytes: int) -> bytes:
        """Return the bytes of the only member whose name ends with `suffix`, after checking its CRC-32.

        Args:
            suffix: End of the member's name.
            max_nbytes: Largest size in bytes that is accepted.

        Raises:
            SourceError: There is not exactly one such member, or it is too large or damaged.
        """
        found = [start for start, member in self._starts.items() if member.filename.endswith(suffix)]
        if len(found) != 1:
            raise self._damaged(f"has {len(found)} members named {suffix.removeprefix('/')}, expected 1")
        nbytes = self._starts[found[0]].file_size
        if nbytes > max_nbytes:
            raise SourceError(
                Reason.JSON_LIMIT,
                self._path,
                f"{suffix.removeprefix('/')} has {nbytes} bytes, the limit is {max_nbytes}",
            )
        self.check(found[0])
        data = bytearray(nbytes)
        read_exactly(self._descriptor, found[0], memoryview(data), path=self._path, error=SourceError)
        return bytes(data)

    def refuse_wrong_place(self, start: int, nbytes: int, tensor: str) -> None:
        """Reject a storage that is not a member of the file.

        Args:
            start: Offset of the storage in bytes.
            nbytes: Size of the storage in bytes.
            tensor: Name of the tensor, for the message.

        Raises:
            SourceError: No member of this size is at this offset.
        """
        member = self._starts.get(start)
        if member is None or member.file_size != nbytes:
            raise SourceError(
                Reason.HEADER_OFFSETS,
                self._path,
                f"no member of {nbytes} bytes begins at byte {start}",
                tensor=tensor,
            )

    def check(self, start: int) -> None:
        """Compare the CRC-32 of the member at byte `start`. Only the first call for a member reads it."""
        with self._locks[start]:
            if start in self._checked:
                return
            member = self._starts[start]
            crc, buffer = 0, bytearray(min(_CHUNK_NBYTES, member.file_size))
            for offset in range(0, member.file_size, _CHUNK_NBYTES):
                chunk = memoryview(buffer)[: min(_CHUNK_NBYTES, member.file_size - offset)]
                read_exactly(self._descriptor, start + offset, chunk, path=self._path, error=SourceError)
                crc = zlib.crc32(chunk, crc)
            if crc != member.CRC:
                raise SourceError(
                    Reason.FILE_DIGEST,
                    self._path,
                    f"its member {member.filename!r} was changed: CRC-32 {crc:08x}, expected {member.CRC:08x}",
                    next_step="Fetch the file again",
                )
            self._checked.add(start)

    def _list_members(self) -> list[zipfile.ZipInfo]:
        self._refuse_large_directory()
        try:
            with os.fdopen(os.dup(self._descriptor), "rb") as file, zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OSError) as error:
            raise self._damaged(f"is not a complete zip file ({error})") from None
        if not 0 < len(members) <= _MAX_MEMBERS:
            raise self._damaged(f"has {len(members)} members, expected 1 to {_MAX_MEMBERS}")
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise self._damaged(f"its member {member.filename!r} is compressed or encrypted")
        return members

    def _refuse_large_directory(self) -> None:
        """Check the file's type and the amount of data that `zipfile` would read at once."""
        head = bytearray(min(len(_MAGIC), self.nbytes))
        read_exactly(self._descriptor, 0, memoryview(head), path=self._path, error=SourceError)
        if head != _MAGIC:
            raise SourceError(
                Reason.UNSUPPORTED_SOURCE,
                self._path,
                "is not in the zip format that PyTorch writes since version 1.6",
                next_step="Load the model and save it again with save_pretrained, which writes safetensors",
            )
        tail = bytearray(min(self.nbytes, _END_NBYTES + _LONGEST_COMMENT))
        read_exactly(self._descriptor, self.nbytes - len(tail), memoryview(tail), path=self._path, error=SourceError)
        end = tail.rfind(b"PK\x05\x06")
        if end < 0 or end + _END_NBYTES > len(tail):
            raise self._damaged("has no complete zip directory at its end: it is truncated")
        size = int.from_bytes(tail[end + 12 : end + 16], "little")
        if _MAX_DIRECTORY_NBYTES < size < 2**32 - 1:
            raise self._damaged(f"has a zip directory of {size} bytes, the limit is {_MAX_DIRECTORY_NBYTES}")

    def _start(self, member: zipfile.ZipInfo) -> int:
        """Return the offset at which a member's data begins, which depends on the length of its local header."""
        if member.header_offset < 0 or member.header_offset + _LOCAL_HEADER.size > self.nbytes:
            raise self._damaged(f"its member {member.filename!r} begins beyond the end of the file")
        data = bytearray(_LOCAL_HEADER.size)
        read_exactly(self._descriptor, member.header_offset, memoryview(data), path=self._path, error=SourceError)
        magic, *_, name_nbytes, extra_nbytes = _LOCAL_HEADER.unpack(data)
        start = member.header_offset + _LOCAL_HEADER.size + int(name_nbytes) + int(extra_nbytes)
        if magic != _MAGIC or start + member.file_size > self.nbytes:
            raise self._damaged(f"its member {member.filename!r} is not where the zip directory says")
        return start

    def _damaged(self, problem: str) -> SourceError:
        return SourceError(Reason.TRUNCATED, self._path, problem, next_step="Fetch the file again")
