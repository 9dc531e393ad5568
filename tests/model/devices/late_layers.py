"""A device whose copies are done as late as possible: code that does not wait for them computes with garbage."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

GARBAGE = 0xFF
"""Byte of which every 16-bit float is a NaN."""


@dataclass(eq=False)
class LateCopy:
    host: Tensor
    slot: Tensor
    done: bool = False


@dataclass
class LateLayers:
    """Copies in order when a caller waits. Until then, the target of a started copy has garbage."""

    allocated: list[Tensor] = field(default_factory=list)
    host: list[Tensor] = field(default_factory=list)
    started: list[LateCopy] = field(default_factory=list)
    pending_when_waited: list[int] = field(default_factory=list)

    def allocate(self, nbytes: int) -> Tensor:
        self.allocated.append(torch.full((nbytes,), GARBAGE, dtype=torch.uint8))
        return self.allocated[-1]

    def host_memory(self, nbytes: int) -> Tensor:
        self.host.append(torch.full((nbytes,), GARBAGE, dtype=torch.uint8))
        return self.host[-1]

    def copy(self, host: Tensor, slot: Tensor) -> LateCopy:
        assert host.shape == slot.shape
        slot.fill_(GARBAGE)
        self.started.append(LateCopy(host, slot))
        return self.started[-1]

    def wait(self, copy: object) -> None:
        assert isinstance(copy, LateCopy)
        assert not copy.done, "waited for twice"
        self.pending_when_waited.append(sum(not other.done for other in self.started))
        for other in self.started[: self.started.index(copy) + 1]:
            if not other.done:
                other.slot.copy_(other.host)
                other.done = True
