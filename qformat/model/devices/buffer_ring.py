"""The ring of host buffers between the threads that read and the thread that copies."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

from torch import Tensor

from qformat.model.devices.stream_device import Ticket


class Buffer:
    """A host buffer, and the copy out of it that was started last."""

    def __init__(self, host: Tensor) -> None:
        self.host = host
        self.data: memoryview = host.numpy().data
        self.ticket: Ticket | None = None

    def wait(self) -> None:
        """Wait for the copy, once; whatever comes of it."""
        ticket, self.ticket = self.ticket, None
        if ticket is not None:
            ticket.wait()


class BufferRing:
    """Hands free buffers to the readers, and full ones in order to the thread that copies. Keeps the first failure.

    A reader gets its buffer together with the number of its chunk: the lowest chunk that is not read yet always has a
    buffer, and so nobody waits for ever.
    """

    def __init__(self, buffers: Iterable[Buffer], n_chunks: int) -> None:
        self.buffers = tuple(buffers)
        self._free = deque(self.buffers)
        self._full: dict[int, Buffer] = {}
        self._n_chunks = n_chunks
        self._n_claimed = 0
        self._stopping = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()

    def claim(self) -> tuple[int, Buffer] | None:
        """Wait for a buffer; return it with the number of the chunk to read, or None when there is nothing to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._nothing_to_do())
            if self._nothing_to_do():
                return None
            number = self._n_claimed
            self._n_claimed += 1
            if self._n_claimed == self._n_chunks:
                self._changed.notify_all()
            return number, self._free.popleft()

    def deliver(self, number: int, buffer: Buffer) -> None:
        """Pass on a buffer that was filled."""
        with self._changed:
            self._full[number] = buffer
            self._changed.notify_all()

    def take(self, number: int) -> Buffer | None:
        """Wait for a chunk; return None if a reader failed instead."""
        with self._changed:
            self._changed.wait_for(lambda: number in self._full or self._stopping)
            return None if self._stopping else self._full.pop(number)

    def release(self, buffer: Buffer) -> None:
        """Give a buffer back, its copy possibly pending: the oldest copy is the next to be waited for."""
        with self._changed:
            self._free.append(buffer)
            self._changed.notify_all()

    def stop(self, failure: BaseException | None = None) -> None:
        """Send everybody home; keep the failure if it is the first."""
        with self._changed:
            self._stopping = True
            if self._failure is None:
                self._failure = failure
            self._changed.notify_all()

    def raise_failure(self) -> None:
        """Raise the first failure, if there is one, and forget it."""
        failure, self._failure = self._failure, None
        try:
            if failure is not None:
                raise failure
        finally:
            # A failure holds this frame: without the cycle the device's memory is free as soon as it is handled.
            del failure

    def _nothing_to_do(self) -> bool:
        return self._stopping or self._n_claimed == self._n_chunks
