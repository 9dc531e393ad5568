"""Bytes of all tensors that are made, over time, in segments: who is alive, and how much at most.

Storages are counted when they are made and when the last reference to them is gone, so that it works for tensors
without memory (torch's FakeTensorMode) as it does for others.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Phase = Literal["embedding", "forward", "after", "loss", "backward"]
"""after: between the forward of a layer and that of the next one, or the loss."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of time: bytes that live longer than it (negative: freed), and the most beyond its start."""

    phase: Phase
    delta: int
    peak: int


class Meter(TorchDispatchMode):
    """Bytes of all storages that were made since, by the weak references to them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.segments: list[tuple[str, int | None, Segment]] = []
        self._live = self._start = self._peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._current: tuple[str, int | None] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage not in self._known:
                    self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        nbytes = -(-storage.nbytes() // 512) * 512  # as CUDA's allocator rounds
        self._known.add(storage)
        self._live += nbytes
        self._peak = max(self._peak, self._live)
        weakref.finalize(storage, self._freed, nbytes)

    def _freed(self, nbytes: int) -> None:
        self._live -= nbytes

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these, which were there before."""
        self._known.update(tensor.untyped_storage() for tensor in tensors)

    def mark(self, phase: str, number: int | None) -> None:
        """End the segment before, and begin one of a phase and, in forward and backward, a layer."""
        if self._current is not None:
            old, old_number = self._current
            segment = Segment(cast(Any, old), self._live - self._start, self._peak - self._start)
            self.segments.append((old, old_number, segment))
        self._current = (phase, number)
        self._start = self._peak = self._live
