"""Byte ranges of files as one stream, which several connections fetch ahead into a bounded window.

    fetching threads ──► window of pieces ──► one hashing thread, in order
                                         └──► encoding threads, each reads its own spans

A stream is a list of spans, such as the bytes of a tensor, in the order in which they are needed. It is divided into
pieces of a few MiB. Every byte is fetched once. Pieces are requested in order as soon as the window has a free buffer,
and a buffer becomes free when all readers have taken every byte of its piece.

The stream cannot deadlock if spans are started in order: the oldest piece always has a buffer, and a thread that has
not yet taken its bytes is reading a span that precedes everything that other threads wait for. This holds for any
order and any size of tensors.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

from qformat.errors import QformatError
from qformat.hub.reading.repository import Repository
from qformat.hub.reading.transfer import DEFAULT_TRANSFER, Transfer


@dataclass(frozen=True, slots=True)
class Span:
    """Range of bytes of a file.

    Attributes:
        key: Name of the span.
        file: Path of the file.
        start: First byte.
        stop: End of the range; this byte is not included.
        in_order: `ByteStream.in_order` yields the span, in addition to its own reader.
    """

    key: str
    file: str
    start: int
    stop: int
    in_order: bool

    @property
    def nbytes(self) -> int:
        """Length of the span in bytes."""
        return self.stop - self.start


@dataclass(slots=True)
class _Piece:
    """One request. `begin` and `end` are positions in the stream; `left` counts bytes that readers have yet to take."""

    file: str
    start: int
    begin: int
    end: int
    left: int
    buffer: bytearray | None = None
    ready: bool = False


class Stopped(QformatError):
    """The stream was closed while a thread waited for it."""


@contextmanager
def telling(fail: Callable[[BaseException], None]) -> Iterator[None]:
    """Pass an exception that ends a thread to `fail`, so that waiting threads learn of it. Reraise unexpected ones."""
    try:
        yield
    except QformatError as failure:
        fail(failure)
    except BaseException as failure:  # waiting threads must learn of every exception
        fail(failure)
        raise


class ByteStream:
    """Stream of spans that threads fetch in the background.

    Spans must be started in order, and each must be read once from start to end.

    Args:
        repository: Repository to read from.
        spans: Spans in the order in which they are needed.
        transfer: Sizes and retries of requests.
    """

    def __init__(self, repository: Repository, spans: Sequence[Span], transfer: Transfer = DEFAULT_TRANSFER) -> None:
        self._repository = repository
        self.spans = spans
        self._begins = [0, *accumulate(span.nbytes for span in spans)]
        self._number = {span.key: number for number, span in enumerate(spans)}
        self._pieces = _cut(spans, self._begins, transfer.piece_nbytes)
        self._piece_begins = [piece.begin for piece in self._pieces]
        self._changed = threading.Condition()
        self._next = 0
        self._free: list[bytearray] = []
        self._unmade = max(2, transfer.window_nbytes // transfer.piece_nbytes)
        self._piece_nbytes = transfer.piece_nbytes
        self._failure: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._fetch, name=f"qformat-fetch-{number}", daemon=True)
            for number in range(min(transfer.connections, len(self._pieces)))
        ]
        for thread in self._threads:
            thread.start()

    def read_into(self, key: str, offset: int, out: memoryview) -> None:
        """Read bytes of a span, waiting for them.

        Args:
            key: Name of the span.
            offset: First byte to read, relative to the start of the span.
            out: Buffer to fill.

        Raises:
            QformatError: The error that ended the stream.
        """
        begin = self._begins[self._number[key]] + offset
        done = 0
        for piece, part in self._parts(begin, begin + len(out)):
            out[done : done + len(part)] = part
            done += len(part)
            self._taken(piece, len(part))

    def in_order(self) -> Iterator[tuple[Span, memoryview]]:
        """Yield the bytes of all spans with `in_order`, and an empty view after the last byte of each.

        A view is valid until the next one is requested.
        """
        for number, span in enumerate(self.spans):
            if span.in_order:
                for piece, part in self._parts(self._begins[number], self._begins[number + 1]):
                    yield span, part
                    self._taken(piece, len(part))
                yield span, memoryview(b"")

    def fail(self, failure: BaseException) -> None:
        """End the stream: readers that wait for bytes, now or later, get this error. Only the first error counts."""
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()

    def close(self) -> None:
        """End the stream without waiting for requests in progress, whose threads use only their own buffers."""
        self.fail(Stopped("the stream was closed"))

    def _parts(self, begin: int, end: int) -> Iterator[tuple[_Piece, memoryview]]:
        """Yield the pieces and bytes that make up [begin, end) of the stream, waiting for each."""
        while begin < end:
            piece = self._pieces[bisect_right(self._piece_begins, begin) - 1]
            with self._changed:
                while not piece.ready:
                    if self._failure is not None:
                        raise self._failure
                    self._changed.wait()
                if self._failure is not None:
                    raise self._failure
                assert piece.buffer is not None, f"{piece.file}: bytes were read twice"
                buffer = piece.buffer
            part = memoryview(buffer)[begin - piece.begin : min(end, piece.end) - piece.begin]
            yield piece, part
            begin += len(part)

    def _taken(self, piece: _Piece, nbytes: int) -> None:
        with self._changed:
            piece.left -= nbytes
            if piece.left == 0:
                assert piece.buffer is not None
                self._free.append(piece.buffer)
                piece.buffer = None
                self._changed.notify_all()

    def _fetch(self) -> None:
        with telling(self.fail):
            while (piece := self._begin_piece()) is not None:
                assert piece.buffer is not None
                out = memoryview(piece.buffer)[: piece.end - piece.begin]
                self._repository.read_range(piece.file, piece.start, out, on_bytes=self._check_open)
                with self._changed:
                    piece.ready = True
                    self._changed.notify_all()

    def _check_open(self, nbytes: int) -> None:
        if self._failure is not None:
            raise Stopped("the stream was closed")

    def _begin_piece(self) -> _Piece | None:
        """Assign a buffer to the next piece, waiting for one. Return None if nothing is left to fetch."""
        with self._changed:
            while self._failure is None and self._next < len(self._pieces):
                if self._free or self._unmade:
                    piece = self._pieces[self._next]
                    self._next += 1
                    if self._free:
                        piece.buffer = self._free.pop()
                    else:
                        self._unmade -= 1
                        piece.buffer = bytearray(self._piece_nbytes)
                    return piece
                self._changed.wait()
            return None


def _cut(spans: Sequence[Span], begins: Sequence[int], piece_nbytes: int) -> list[_Piece]:
    """Divide the stream into pieces. Adjacent spans of a file share a piece until it is full."""
    pieces: list[_Piece] = []
    for span, begin in zip(spans, begins, strict=False):
        done = 0
        while done < span.nbytes:
            last = pieces[-1] if pieces else None
            joins = (
                last is not None
                and last.file == span.file
                and last.start + (last.end - last.begin) == span.start + done
                and last.end - last.begin < piece_nbytes
            )
            if last is None or not joins:
                last = _Piece(span.file, span.start + done, begin + done, begin + done, 0)
                pieces.append(last)
            count = min(span.nbytes - done, piece_nbytes - (last.end - last.begin))
            last.end += count
            last.left += count * (2 if span.in_order else 1)
            done += count
    return pieces
