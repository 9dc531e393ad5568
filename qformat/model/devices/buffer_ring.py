"""Ring of host buffers between the threads that read and the thread that copies."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

from torch import Tensor

from qformat.model.devices.stream_device import Ticket


class Buffer:
    """A host buffer and the last copy that was started from it.

    Attributes:
        host: The buffer, uint8 [number of bytes].
        data: The same bytes as a writable memoryview.
        ticket: The last copy from the buffer, or None if it is done.
    """

    def __init__(self, host: Tensor) -> None:
        self.host = host
        self.data: memoryview = host.numpy().data
        self.ticket: Ticket | None = None

    def wait(self) -> None:
        """Wait for the pending copy and forget it, even if it failed. Raises the error of the copy."""
        ticket, self.ticket = self.ticket, None
        if ticket is not None:
            ticket.wait()


class BufferRing:
    """Passes free buffers to the readers and full buffers, in order, to the thread that copies. Keeps the first error.

    A reader gets its buffer together with the number of its chunk. The lowest unread chunk therefore always has a
    buffer, and no thread waits forever.
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
        """Wait for a free buffer.

        Returns:
            The number of the chunk to read and the buffer, or None if no chunk is left or the ring was stopped.
        """
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
        """Pass a filled buffer to the thread that copies.

        Args:
            number: Number of the chunk, from `claim`.
            buffer: Buffer with the bytes of the chunk.
        """
        with self._changed:
            self._full[number] = buffer
            self._changed.notify_all()

    def take(self, number: int) -> Buffer | None:
        """Wait for a chunk and return its buffer, or None if a reader failed."""
        with self._changed:
            self._changed.wait_for(lambda: number in self._full or self._stopping)
            return None if self._stopping else self._full.pop(number)

    def release(self, buffer: Buffer) -> None:
        """Return a buffer to the readers. Its copy may be pending; buffers are reused in order, oldest copy first."""
        with self._changed:
            self._free.append(buffer)
            self._changed.notify_all()

    def stop(self, failure: BaseException | None = None) -> None:
        """Stop all threads that wait on the ring. Keep the failure if it is the first."""
        with self._changed:
            self._stopping = True
            if self._failure is None:
                self._failure = failure
            self._changed.notify_all()

    def raise_failure(self) -> None:
        """Raise the first failure, if any, and forget it."""
        failure, self._failure = self._failure, None
        try:
            if failure is not None:
                raise failure
        finally:
            # The exception refers to this frame. Breaking the cycle frees the device's memory once it is handled.
            del failure

    def _nothing_to_do(self) -> bool:
        return self._stopping or self._n_claimed == self._n_chunks
