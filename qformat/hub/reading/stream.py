"""Ranges of files as one stream: fetched ahead by several connections into a bounded window, each byte once.

    fetchers ──► window of pieces ──► the one that hashes, in order
                                 └──► those that encode, each its own spans, at the same time

A stream is a list of spans (a tensor's bytes, say) in the order in which they are wanted. It is cut into pieces of a
few MiB; pieces are begun in order, whenever one of the window's buffers is free, and a buffer is free again when every
byte of its piece was taken by whoever needs it. The oldest piece therefore always has a buffer, and as long as spans
are begun in order, whoever holds it up is at work on a span that lies before everything that others wait for: no
order of tensors and no size of one can make it stand still.
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
    """Bytes [start, stop) of a file under a name. in_order: whether the reader in order wants them as well."""

    key: str
    file: str
    start: int
    stop: int
    in_order: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the span."""
        return self.stop - self.start


@dataclass(slots=True)
class _Piece:
    """A request. `begin` and `end` count in the stream; `left`: bytes that somebody has yet to take, of each reader."""

    file: str
    start: int
    begin: int
    end: int
    left: int
    buffer: bytearray | None = None
    ready: bool = False


class Stopped(QformatError):
    """The stream was closed while somebody waited for it."""


@contextmanager
def telling(fail: Callable[[BaseException], None]) -> Iterator[None]:
    """Hand the exception that ends a thread's work to `fail`: others wait for it. Errors of ours end there."""
    try:
        yield
    except QformatError as failure:
        fail(failure)
    except BaseException as failure:  # whoever waits must learn of it, whatever it is
        fail(failure)
        raise


class ByteStream:
    """A stream that is being fetched. Spans must be begun in their order, each read from its start to its end, once."""

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
        """Fill `out` with a span's bytes from `offset` on. Raises what ended the stream."""
        begin = self._begins[self._number[key]] + offset
        done = 0
        for piece, part in self._parts(begin, begin + len(out)):
            out[done : done + len(part)] = part
            done += len(part)
            self._taken(piece, len(part))

    def in_order(self) -> Iterator[tuple[Span, memoryview]]:
        """Yield the bytes of the spans that are wanted in order, and an empty view after each span's last byte.

        The views are valid until the next one is asked for.
        """
        for number, span in enumerate(self.spans):
            if span.in_order:
                for piece, part in self._parts(self._begins[number], self._begins[number + 1]):
                    yield span, part
                    self._taken(piece, len(part))
                yield span, memoryview(b"")

    def fail(self, failure: BaseException) -> None:
        """End the stream: whoever waits for bytes, now or later, gets this error. The first one counts."""
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()

    def close(self) -> None:
        """End the stream without waiting for requests in flight: their threads touch nothing but their buffers."""
        self.fail(Stopped("the stream was closed"))

    def _parts(self, begin: int, end: int) -> Iterator[tuple[_Piece, memoryview]]:
        """Yield (piece, bytes) that make up [begin, end) of the stream, waiting for each."""
        while begin < end:
            piece = self._pieces[bisect_right(self._piece_begins, begin) - 1]
            with self._changed:
                while not piece.ready:
                    if self._failure is not None:
                        raise self._failure
                    self._changed.wait()
                if self._failure is not None:
                    raise self._failure
                assert piece.buffer is not None, f"{piece.file}: bytes were asked for twice"
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
                self._repository.read_range(piece.file, piece.start, out, on_bytes=self._go_on)
                with self._changed:
                    piece.ready = True
                    self._changed.notify_all()

    def _go_on(self, nbytes: int) -> None:
        if self._failure is not None:
            raise Stopped("the stream was closed")

    def _begin_piece(self) -> _Piece | None:
        """Give the next piece a buffer, waiting for one; None when there is nothing left to fetch."""
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
    """Cut the stream into pieces: adjacent spans of a file share one, as long as it is not full."""
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
