"""A device whose copies happen as late as possible, or when a test allows them, and checks of streams to it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qformat.artifact.reading.structure import Structure
from qformat.errors import ArtifactError
from qformat.model.devices.shard_stream import data_starts, stream_shards
from tests.artifact.damaged import shards


class LateTicket:
    def __init__(self, device: LateDevice, number: int) -> None:
        self.device = device
        self.number = number

    def wait(self) -> None:
        assert self.device.gate.wait(300), "the test never opened the gate"
        self.device.complete(self.number)


class LateDevice:
    """Copies nothing until a caller waits, then does all copies up to that one in order.

    At that time, each host buffer must still have the contents that it had when its copy was started. No wait returns
    while `gate` is closed. `fail_*` is the number of the call that fails.
    """

    def __init__(self, *, fail_allocate: int = -1, fail_copy: int = -1, fail_wait: int = -1) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.lock = threading.Lock()
        self.allocated: list[weakref.ref[Tensor]] = []
        self.sizes: list[int] = []
        self.buffers: list[Tensor] = []
        self.started: list[tuple[Tensor, bytes, Tensor]] = []
        self.n_done = 0
        self.most_pending = 0
        self.waited: set[int] = set()
        self.on_copy: Callable[[Tensor], None] = lambda host: None
        self.fail_allocate, self.fail_copy, self.fail_wait = fail_allocate, fail_copy, fail_wait

    @property
    def pending(self) -> int:
        return len(self.started) - self.n_done

    def allocate(self, nbytes: int) -> Tensor:
        if len(self.allocated) == self.fail_allocate:
            raise torch.OutOfMemoryError("injected")
        found = torch.full((nbytes,), 0xA5, dtype=torch.uint8)
        self.allocated.append(weakref.ref(found))
        self.sizes.append(nbytes)
        return found

    def host_buffer(self, nbytes: int) -> Tensor:
        self.buffers.append(torch.zeros(nbytes, dtype=torch.uint8))
        return self.buffers[-1]

    def copy(self, host: Tensor, target: Tensor) -> LateTicket:
        assert host.shape == target.shape
        assert host.dtype == target.dtype == torch.uint8
        if len(self.started) == self.fail_copy:
            raise RuntimeError("injected copy")
        with self.lock:
            self.started.append((host, host.numpy().tobytes(), target))
            self.most_pending = max(self.most_pending, self.pending)
        self.on_copy(host)
        return LateTicket(self, len(self.started) - 1)

    def complete(self, number: int) -> None:
        with self.lock:
            self.waited.add(number)
            while self.n_done <= number:
                host, content, target = self.started[self.n_done]
                self.n_done += 1
                assert host.numpy().tobytes() == content, f"buffer of copy {self.n_done - 1} was overwritten"
                target.copy_(host)
        if number == self.fail_wait:
            raise RuntimeError("injected wait")


def check_at_rest(device: LateDevice) -> None:
    assert device.pending == 0
    assert device.waited == set(range(len(device.started)))


def refusal(structure: Structure, device: LateDevice | None = None, **options: Any) -> ArtifactError:
    """Return the error of a stream that must fail, and check that no copy is pending."""
    device = device or LateDevice()
    with pytest.raises(ArtifactError) as caught:
        stream_shards(structure, device, **{"verify": "full", "chunk_nbytes": 100, **options})
    check_at_rest(device)
    return caught.value


def check_bytes(structure: Structure, found: dict[str, Tensor]) -> None:
    starts = data_starts(structure)
    assert found.keys() == {path.name for path in shards(structure.path)}
    for path in shards(structure.path):
        assert found[path.name].numpy().tobytes() == path.read_bytes()[starts[path.name] :]
