"""Streams whose device or caller fails: all threads and copies end, and the first error is raised."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from qformat.artifact.reading.structure import check_structure
from qformat.errors import UsageError
from qformat.model.devices.buffer_ring import BufferRing
from qformat.model.devices.shard_stream import stream_shards
from tests.model.devices.late_device import LateDevice, check_at_rest

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@pytest.mark.parametrize("number", [0, 1])
def test_no_memory_on_the_device(tiny: Path, number: int) -> None:
    device = LateDevice(fail_allocate=number)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        stream_shards(check_structure(tiny), device, verify="full", chunk_nbytes=100)
    assert not device.started


@pytest.mark.parametrize("number", [0, 1, 5, 9])
@pytest.mark.parametrize("call", ["copy", "wait"])
@pytest.mark.parametrize("n_buffers", [1, 4])
def test_a_copy_that_fails(tiny: Path, call: str, number: int, n_buffers: int) -> None:
    device = LateDevice(**{f"fail_{call}": number})
    with pytest.raises(RuntimeError, match=f"injected {call}"):
        stream_shards(check_structure(tiny), device, verify="full", chunk_nbytes=100, n_buffers=n_buffers)
    check_at_rest(device)


def test_the_last_copy_of_all_fails(tiny: Path) -> None:
    structure = check_structure(tiny)
    device = LateDevice()
    stream_shards(structure, device, verify="none", chunk_nbytes=100)
    failing = LateDevice(fail_wait=len(device.started) - 1)
    with pytest.raises(RuntimeError, match="injected wait"):
        stream_shards(structure, failing, verify="none", chunk_nbytes=100)
    check_at_rest(failing)


def test_the_first_error_is_the_one_that_is_raised(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = LateDevice(fail_copy=2, fail_wait=1)
    device.gate.clear()
    stop = BufferRing.stop

    def stop_and_open(ring: Any, failure: BaseException | None = None) -> None:
        stop(ring, failure)
        device.gate.set()  # no wait could return, and so none could fail, before the failed copy was recorded

    monkeypatch.setattr(BufferRing, "stop", stop_and_open)
    with pytest.raises(RuntimeError, match="injected copy"):
        stream_shards(check_structure(tiny), device, verify="none", chunk_nbytes=100, n_buffers=4)
    check_at_rest(device)


def test_an_interruption_stops_everything(tiny: Path) -> None:
    device = LateDevice()

    def interrupt(nbytes: int) -> None:
        if len(device.started) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream_shards(check_structure(tiny), device, verify="full", chunk_nbytes=100, progress=interrupt)
    check_at_rest(device)


@pytest.mark.parametrize("options", [{"fail_copy": 3}, {"fail_wait": 3}])
def test_after_an_error_the_device_memory_is_freed_immediately(tiny: Path, options: dict[str, int]) -> None:
    """It must not wait for the garbage collector: the caller may load a smaller model next."""
    structure = check_structure(tiny)
    device = LateDevice(**options)
    gc.collect()
    gc.disable()
    try:
        try:
            stream_shards(structure, device, verify="full", chunk_nbytes=100)
        except RuntimeError:
            device.started.clear()
        assert [reference() for reference in device.allocated] == [None] * len(device.allocated)
    finally:
        gc.enable()


@pytest.mark.parametrize("options", [{"chunk_nbytes": 0}, {"n_buffers": 0}, {"readers": 0}, {"verify": "ful"}])
def test_invalid_arguments_are_rejected(tiny: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        stream_shards(check_structure(tiny), LateDevice(), **{"verify": "full", **options})
