"""A stream of byte ranges fetches every byte once and stays within its window, for all divisions and readers."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qformat.errors import HubError
from qformat.hub.reading.repository import ReadBytes, RemoteFile
from qformat.hub.reading.stream import ByteStream, Span, Stopped
from qformat.hub.reading.transfer import Transfer


class Files:
    """Repository of files in memory. It records the ranges that were read, and can fail at one of them."""

    name, commit = "owner/model", "0" * 40
    files: Mapping[str, RemoteFile] = {}

    def __init__(self, data: Mapping[str, bytes], fail_at: int = -1) -> None:
        self.data = data
        self.ranges: list[tuple[str, int, int]] = []
        self._fail_at = fail_at

    def file(self, path: str) -> RemoteFile:
        raise NotImplementedError

    def read_small(self, path: str, *, max_nbytes: int) -> bytes:
        raise NotImplementedError

    def read_range(self, path: str, start: int, out: memoryview, *, on_bytes: ReadBytes = lambda nbytes: None) -> None:
        self.ranges.append((path, start, start + len(out)))
        if len(self.ranges) == self._fail_at:
            raise HubError(self.name, "refused", next_step="Try again")
        out[:] = self.data[path][start : start + len(out)]
        on_bytes(len(out))

    def close(self) -> None:
        pass


def cut(data: Mapping[str, bytes], lengths: list[int], pick: random.Random) -> list[Span]:
    """Divide files into spans: some are omitted, some are read in order."""
    spans = []
    for path, content in data.items():
        start = 0
        for length in lengths:
            stop = min(start + length, len(content))
            if pick.random() < 0.8:
                spans.append(Span(f"{path} {len(spans)}", path, start, stop, in_order=pick.random() < 0.7))
            start = stop
    return spans


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=12),
    piece_nbytes=st.integers(1, 200),
    n_pieces=st.integers(2, 5),
    workers=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_every_reader_gets_its_bytes_and_every_byte_is_read_once(
    lengths: list[int], piece_nbytes: int, n_pieces: int, workers: int, seed: int
) -> None:
    pick = random.Random(seed)
    data = {path: pick.randbytes(sum(lengths)) for path in ("a", "b")}
    spans = cut(data, lengths, pick)
    files = Files(data)
    stream = ByteStream(
        files, spans, Transfer(connections=3, piece_nbytes=piece_nbytes, window_nbytes=n_pieces * piece_nbytes)
    )
    in_order: dict[str, bytes] = {}

    def read_in_order() -> None:
        for span, part in stream.in_order():
            in_order[span.key] = in_order.get(span.key, b"") + bytes(part)

    def read(span: Span) -> bytes:
        out, chunk = bytearray(span.nbytes), random.Random(span.key).randint(1, 150)
        for offset in range(0, span.nbytes, chunk):
            stream.read_into(span.key, offset, memoryview(out)[offset : offset + chunk])
        return bytes(out)

    follower = threading.Thread(target=read_in_order, daemon=True)
    follower.start()
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(read, spans, timeout=300))
    follower.join(300)

    assert results == [data[span.file][span.start : span.stop] for span in spans]
    assert in_order == {span.key: data[span.file][span.start : span.stop] for span in spans if span.in_order}
    covered = sorted((path, byte) for path, start, stop in files.ranges for byte in range(start, stop))
    assert covered == sorted((span.file, byte) for span in spans for byte in range(span.start, span.stop))
    assert all(stop - start <= piece_nbytes for _, start, stop in files.ranges)


def test_no_more_is_fetched_ahead_than_the_window_holds() -> None:
    """At every request, the piece ends within one window of what the reader has received or requested."""
    asked_for = 0
    ahead: list[int] = []

    class Watched(Files):
        def read_range(self, path: str, start: int, out: memoryview, **options: Any) -> None:
            ahead.append(start + len(out) - asked_for)
            super().read_range(path, start, out, **options)

    files = Watched({"a": bytes(1000)})
    stream = ByteStream(files, [Span("a", "a", 0, 1000, in_order=False)], Transfer(piece_nbytes=10, window_nbytes=50))
    for start in range(0, 1000, 100):
        asked_for = start + 100
        stream.read_into("a", start, memoryview(bytearray(100)))
    assert len(ahead) == 100
    assert max(ahead) <= 50


def test_a_failure_reaches_every_reader() -> None:
    stream = ByteStream(
        Files({"a": bytes(1000)}, fail_at=3), [Span("a", "a", 0, 1000, in_order=True)], Transfer(piece_nbytes=10)
    )
    with pytest.raises(HubError, match="refused"):
        stream.read_into("a", 0, memoryview(bytearray(1000)))
    with pytest.raises(HubError, match="refused"):
        list(stream.in_order())


def test_closing_wakes_waiting_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = ByteStream(
        Files({"a": bytes(1000)}), [Span("a", "a", 0, 1000, in_order=True)], Transfer(piece_nbytes=10, window_nbytes=20)
    )
    reader, wait = threading.current_thread(), stream._changed.wait

    def wait_and_be_closed(timeout: float | None = None) -> bool:
        """Let another thread close the stream, which is possible when this wait has released the lock."""
        if threading.current_thread() is reader:
            threading.Thread(target=stream.close).start()
        return wait(timeout)

    monkeypatch.setattr(stream._changed, "wait", wait_and_be_closed)
    with pytest.raises(Stopped):
        stream.read_into("a", 0, memoryview(bytearray(1000)))  # no thread reads in order
