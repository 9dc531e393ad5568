"""An artificial device for optimizer pages, with a byte budget, queued copies, and allocations that fail on demand.

A copy takes place only when the caller waits for it, or for a later copy in the same direction. Code that forgets to
wait therefore computes with old bytes. New memory is filled with 0xAB, and released memory is overwritten with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qformat.training.optimizer.page_device import Copy

GARBAGE = 0xAB


@dataclass(eq=False)
class _QueuedCopy:
    queue: list[_QueuedCopy]
    run: Callable[[], None]
    done: bool = False


@dataclass
class ArtificialDevice:
    """A device with a budget.

    Args:
        budget_nbytes: Bytes that fit on the device.
        failing: Numbers of the allocations, counted from 0, that fail.
    """

    budget_nbytes: int = 2**40
    failing: set[int] = field(default_factory=set)
    spare: int | None = None
    used_nbytes: int = 0
    peak_nbytes: int = 0
    n_allocations: int = 0
    n_caches_emptied: int = 0

    def __post_init__(self) -> None:
        self._inward: list[_QueuedCopy] = []
        self._outward: list[_QueuedCopy] = []
        self._live: dict[int, tuple[Tensor, int]] = {}

    def host_page(self, nbytes: int) -> Tensor:
        return torch.zeros(2, nbytes // 2, dtype=torch.uint8)

    def allocate(self, nbytes: int) -> Tensor:
        number, self.n_allocations = self.n_allocations, self.n_allocations + 1
        if number in self.failing or self.used_nbytes + nbytes > self.budget_nbytes:
            raise torch.OutOfMemoryError(f"allocation {number} of {nbytes} bytes")
        memory = torch.full((nbytes,), GARBAGE, dtype=torch.uint8)
        self._live[memory.data_ptr()] = (memory, nbytes)
        self.used_nbytes += nbytes
        self.peak_nbytes = max(self.peak_nbytes, self.used_nbytes)
        return memory

    def release(self, memory: Tensor) -> None:
        assert all(copy.done for copy in self._inward + self._outward), "memory is given back under a running copy"
        whole, nbytes = self._live.pop(memory.data_ptr())
        whole.fill_(GARBAGE)
        self.used_nbytes -= nbytes

    def copy_in(self, host: Tensor, page: Tensor, after: Copy | None = None) -> Copy:
        def run() -> None:
            if after is not None:
                self.wait(after)
            page.copy_(host)

        return self._start(self._inward, run)

    def copy_out(self, page: Tensor, host: Tensor) -> Copy:
        # Take the content now: the page holds all results so far, and the copy must not see later ones.
        taken = page.clone()

        def run() -> None:
            host.copy_(taken)

        return self._start(self._outward, run)

    def wait(self, copy: Copy) -> bool:
        assert isinstance(copy, _QueuedCopy)
        under_way = not copy.done
        while not copy.done:
            first = copy.queue.pop(0)
            first.run()
            first.done = True
        return under_way

    def drain(self) -> None:
        for queue in (self._outward, self._inward):
            while queue:
                self.wait(queue[-1])

    def spare_nbytes(self) -> int | None:
        return self.spare

    def forget_peak(self) -> None:
        self.peak_nbytes = self.used_nbytes

    def empty_cache(self) -> None:
        self.n_caches_emptied += 1

    @staticmethod
    def _start(queue: list[_QueuedCopy], run: Callable[[], None]) -> _QueuedCopy:
        queue.append(copy := _QueuedCopy(queue, run))
        return copy
