"""What the generators of damage share: the record of a damage, and edits of bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from random import Random


class Where(Enum):
    """Part of a copy that a damage is in. It decides which commands compare the part with a digest."""

    WEIGHTS = auto()
    """Bytes of tensors: whoever builds on them compares them; opening and loading promise not to."""
    SMALL = auto()
    """A small file or the header of a shard: every command compares it."""
    ACCOMPANYING = auto()
    """A file that may change (section 2.5 of the specification): nothing is refused."""
    UNLISTED = auto()
    """A file that the manifest does not list: only a verification looks for it."""


@dataclass(frozen=True, slots=True)
class Damage:
    """What a generator did to a copy.

    Attributes:
        files: Names of files that a refusal may name: the damaged one, and those that it contradicts.
        where: Part of the copy.
        must_refuse: Whether the copy is wrong whatever its digests say.
        what: The damage in words.
    """

    files: tuple[str, ...]
    what: str
    where: Where = Where.SMALL
    must_refuse: bool = False


Generator = Callable[[Random, Path], Damage]
"""Damages the copy in a folder. All choices come from the generator of random numbers."""


def flip_bit(random: Random, path: Path, start: int = 0, stop: int | None = None) -> str:
    """Flip one bit between two offsets of a file, and return what was done."""
    data = bytearray(path.read_bytes())
    at = random.randrange(start, len(data) if stop is None else stop)
    bit = random.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {at} flipped"


def zero_sector(random: Random, path: Path, start: int = 0, stop: int | None = None, *, nbytes: int = 512) -> str:
    """Fill a sector with zeros, as a failing disk does, and return what was done."""
    data = bytearray(path.read_bytes())
    last = (len(data) if stop is None else stop) - 1
    at = random.randrange(start, last + 1) // nbytes * nbytes
    begin, end = max(at, start), min(at + nbytes, last + 1)
    if not any(data[begin:end]):
        return flip_bit(random, path, begin, end)
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)
    return f"bytes {begin} to {end} zeroed"


def truncate(random: Random, path: Path) -> str:
    data = path.read_bytes()
    length = random.choice([0, 1, len(data) - 1, random.randrange(len(data))])
    path.write_bytes(data[:length])
    return f"truncated to {length} bytes"


def append(random: Random, path: Path) -> str:
    tail = random.choice([b"\0", b"}", b"\n\n{}", random.randbytes(40), bytes(5000)])
    path.write_bytes(path.read_bytes() + tail)
    return f"{len(tail)} bytes appended"


def insert(random: Random, path: Path) -> str:
    """Insert bytes that break text: half a character, control characters, quotes and brackets."""
    data = path.read_bytes()
    at = random.randrange(len(data) + 1)
    piece = random.choice([b"\xff", b"\xed\xa0\x80", b"\0", b"\x1b[2J", b'"', b"{", b"]", b",", b"\\u00", b"9" * 30])
    path.write_bytes(data[:at] + piece + data[at:])
    return f"{piece!r} inserted at byte {at}"


def replace_all(random: Random, path: Path) -> str:
    """Replace a whole file with another text."""
    texts = [b"", b"[]", b"{}", b"null", b"0", b'"text"', b"[" * 100_000, b"\xef\xbb\xbf{}", b"\0" * 300, b"{" * 40]
    chosen = random.choice(texts)
    path.write_bytes(chosen)
    return f"replaced with {len(chosen)} bytes {chosen[:12]!r}"


def any_edit(random: Random, path: Path) -> str:
    """Change the bytes of a file in one of all ways."""
    edit = random.choice([flip_bit, flip_bit, zero_sector, truncate, append, insert, replace_all])
    before = path.read_bytes()
    what = edit(random, path)
    return flip_bit(random, path) if path.read_bytes() == before and before else what
