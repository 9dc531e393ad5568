"""An order of the reads and copies of a stream that depends on a seed and not on the scheduler of threads."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.standstill import GUARD_S


class ChosenOrder:
    """Holds every read and every copy until nothing else can happen, then lets one of them continue.

    Nothing else can happen if the copying thread is held before a copy or waits for an unread chunk, no thread reads,
    and no reader can begin: each one is held, no buffer is free, or no chunk is left. Reads can thus end in any order
    that buffers and readers allow, and a seed always gives the same order.
    """

    def __init__(self, seed: int, *, n_chunks: int, n_buffers: int, n_readers: int) -> None:
        self._chance = random.Random(seed)
        self._n_chunks, self._n_buffers, self._n_readers = n_chunks, n_buffers, n_readers
        self._changed = threading.Condition()
        self._reads_held: set[int] = set()
        self._copy_held = False
        self._reading: int | None = None
        self._n_begun = self.n_copied = 0
        self.read: list[int] = []
        """Numbers of the chunks in the order in which they were read."""

    @contextmanager
    def reading(self, number: int) -> Iterator[None]:
        """Hold the read of a chunk in this context until it is chosen."""
        with self._changed:
            self._reads_held.add(number)
            self._n_begun += 1
            self._choose()
            assert self._changed.wait_for(lambda: number not in self._reads_held, GUARD_S)
        yield
        with self._changed:
            self._reading = None
            self.read.append(number)
            self._choose()

    def before_copy(self) -> None:
        """Hold the next copy until it is chosen."""
        with self._changed:
            self._copy_held = True
            self._choose()
            assert self._changed.wait_for(lambda: not self._copy_held, GUARD_S)

    def _choose(self) -> None:
        """If nothing else can happen, choose a read or a copy and let it continue. Repeat after a copy."""
        while self._nothing_else_can_happen():
            held: list[int | None] = [*sorted(self._reads_held), *([None] if self._copy_held else [])]
            if not held:
                return
            self._reading = self._chance.choice(held)
            if self._reading is None:
                self._copy_held = False
                self.n_copied += 1
            else:
                self._reads_held.remove(self._reading)
            self._changed.notify_all()

    def _nothing_else_can_happen(self) -> bool:
        if self._reading is not None or (self.n_copied in self.read and not self._copy_held):
            return False
        n_free = self._n_buffers - (len(self.read) - self.n_copied)
        return len(self._reads_held) in (self._n_readers, n_free) or self._n_begun == self._n_chunks
