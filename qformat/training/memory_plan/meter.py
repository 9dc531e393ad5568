"""Measures the bytes of all live tensors over time, in segments.

A storage counts from its creation until its last reference is gone. This also works for tensors without memory, those
of torch's FakeTensorMode.
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
"""Part of a micro-batch. "after" is the time between the forward pass of a layer and that of the next layer, or the
loss."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Memory use during one phase.

    Attributes:
        phase: Part of the micro-batch.
        delta: Bytes at the end minus bytes at the start. Negative if the phase frees more than it allocates.
        peak: Largest number of bytes during the phase, minus those at the start.
    """

    phase: Phase
    delta: int
    peak: int


class Meter(TorchDispatchMode):
    """Counts the bytes of all live storages that were created while the meter was active, by weak references."""

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
        nbytes = -(-storage.nbytes() // 512) * 512  # torch's CUDA allocator rounds up to 512 bytes
        self._known.add(storage)
        self._live += nbytes
        self._peak = max(self._peak, self._live)
        weakref.finalize(storage, self._freed, nbytes)

    def _freed(self, nbytes: int) -> None:
        self._live -= nbytes

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Exclude tensors that existed before."""
        self._known.update(tensor.untyped_storage() for tensor in tensors)

    def mark(self, phase: str, number: int | None) -> None:
        """End the current segment and begin a new one.

        Args:
            phase: Part of the micro-batch (`Phase`).
            number: Number of the decoder layer, or None outside of layers.
        """
        if self._current is not None:
            old, old_number = self._current
            segment = Segment(cast(Any, old), self._live - self._start, self._peak - self._start)
            self.segments.append((old, old_number, segment))
        self._current = (phase, number)
        self._start = self._peak = self._live
