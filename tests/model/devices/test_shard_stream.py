"""Streaming shards onto an artificial device whose copies happen as late as they may, or when a test lets them."""

from __future__ import annotations

import gc
import json
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import qformat
from qformat.artifact.reading.reader import PackedTensor
from qformat.artifact.reading.structure import Structure, check_structure
from qformat.artifact.reading.verify import finding_of, verify_integrity
from qformat.converters.convert import ConversionOptions, convert
from qformat.errors import ArtifactError, Reason, UsageError
from qformat.model.devices import shard_stream as stream
from qformat.model.devices.shard_stream import TorchDevice, component, data_starts, stream_shards
from tests.artifact.damaged import Region, make_tiny_artifact, regions, reseal, shards
from tests.small_models import Tensor as SourceTensor
from tests.small_models import tiny_tensors, write_checkpoint, write_llama


class LateTicket:
    def __init__(self, device: LateDevice, number: int) -> None:
        self.device = device
        self.number = number

    def wait(self) -> None:
        assert self.device.gate.wait(300), "the test never opened the gate"
        self.device.complete(self.number)


class LateDevice:
    """Copies nothing until somebody waits, then all copies up to that one, in order.

    At that moment each host buffer must still hold what it held when its copy was started. While `gate` is closed no
    wait returns. `fail_*`: the number of the call that fails.
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


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    source = write_llama(folder / "source", n_layers=3)
    convert(source, folder / "artifact", ConversionOptions(max_shard_nbytes=6000), workers=1)
    assert len(list(shards(folder / "artifact"))) >= 4
    return folder / "artifact"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny_artifact(tmp_path)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No thread and no open file outlives a stream."""
    before = os.listdir("/proc/self/fd")
    yield
    gc.collect()  # open artifacts that a test compares with
    assert not [thread for thread in threading.enumerate() if thread.name == stream.THREAD_NAME]
    assert len(os.listdir("/proc/self/fd")) <= len(before)


def check_bytes(structure: Structure, found: dict[str, Tensor]) -> None:
    starts = data_starts(structure)
    assert found.keys() == {path.name for path in shards(structure.path)}
    for path in shards(structure.path):
        assert found[path.name].numpy().tobytes() == path.read_bytes()[starts[path.name] :]


def check_at_rest(device: LateDevice) -> None:
    assert device.pending == 0
    assert device.waited == set(range(len(device.started)))


@pytest.mark.parametrize("verify", ["full", "structure", "none"])
@pytest.mark.parametrize(
    ("chunk_nbytes", "n_buffers", "readers"), [(64, 4, 3), (1000, 3, 1), (999, 1, 2), (4096, 2, 8), (1 << 24, 4, None)]
)
def test_every_byte_arrives(llama: Path, verify: Any, chunk_nbytes: int, n_buffers: int, readers: int | None) -> None:
    structure = check_structure(llama)
    device = LateDevice()
    reported: list[int] = []
    found = stream_shards(
        structure,
        device,
        verify=verify,
        chunk_nbytes=chunk_nbytes,
        n_buffers=n_buffers,
        readers=readers,
        progress=reported.append,
    )
    check_bytes(structure, found)
    check_at_rest(device)
    assert device.sizes == [len(found[path.name]) for path in shards(llama)]  # one allocation a shard
    assert sum(reported) == sum(device.sizes)
    assert len(device.buffers) <= n_buffers
    assert max(len(buffer) for buffer in device.buffers) == min(chunk_nbytes, max(device.sizes))
    assert 1 <= device.most_pending <= n_buffers


def test_copies_start_in_the_order_of_the_bytes(llama: Path) -> None:
    device = LateDevice()
    found = stream_shards(check_structure(llama), device, verify="full", chunk_nbytes=500, readers=4)
    targets = [(target.data_ptr(), len(target)) for _, _, target in device.started]
    expected = [
        (found[path.name].data_ptr() + at, min(500, len(found[path.name]) - at))
        for path in shards(llama)
        for at in range(0, len(found[path.name]), 500)
    ]
    assert targets == expected


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_reads_and_copies_gives_the_same_bytes(
    llama: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    read_exactly = stream.read_exactly

    def slow(*args: Any, **kwargs: Any) -> None:
        time.sleep(chance.random() * 2e-3)  # stirs the order, which is one of many; the verdict holds for each of them
        read_exactly(*args, **kwargs)

    monkeypatch.setattr(stream, "read_exactly", slow)
    device = LateDevice()
    device.on_copy = lambda host: time.sleep(chance.random() * 1e-3)
    structure = check_structure(llama)
    found = stream_shards(structure, device, verify="full", chunk_nbytes=300, n_buffers=chance.randint(2, 6), readers=4)
    check_bytes(structure, found)
    check_at_rest(device)


def test_reads_happen_at_the_same_time(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)
    read_exactly = stream.read_exactly
    n_reads = iter(range(1 << 20))

    def meeting(*args: Any, **kwargs: Any) -> None:
        if next(n_reads) < 2:
            both.wait(300)
        read_exactly(*args, **kwargs)

    monkeypatch.setattr(stream, "read_exactly", meeting)
    stream_shards(check_structure(llama), LateDevice(), verify="full", chunk_nbytes=300, readers=2)


def test_digests_are_taken_while_copies_are_pending(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy can end before the digest of the fourth chunk: a loader that waits sooner would wait for ever."""
    device = LateDevice()
    device.gate.clear()

    class Spy(stream.Xxh3):
        def update(self, data: Any) -> None:
            super().update(data)
            if device.pending == 4:
                device.gate.set()

    monkeypatch.setattr(stream, "Xxh3", Spy)
    structure = check_structure(llama)
    check_bytes(structure, stream_shards(structure, device, verify="full", chunk_nbytes=300, n_buffers=4))
    assert device.most_pending == 4


def test_components_equal_those_of_the_open_artifact(llama: Path) -> None:
    structure = check_structure(llama)
    found = stream_shards(structure, TorchDevice("cpu"), verify="full")
    starts = data_starts(structure)

    def view(name: str) -> Tensor:
        located = structure.located[name]
        tensor = component(found[located.shard], starts[located.shard], located.entry)
        assert tensor.data_ptr() % min(4096, located.entry.start & -located.entry.start) == 0
        return tensor

    with qformat.open(llama) as artifact:
        for name, tensor in artifact.items():
            if isinstance(tensor, PackedTensor):
                assert np.array_equal(view(name).numpy().reshape(-1), tensor.packed)
                assert view(name).dtype == torch.uint8
                assert np.array_equal(view(name + ".absmax").numpy(), tensor.absmax)
                assert np.array_equal(view(name + ".nested_absmax").numpy(), tensor.nested_absmax)
                assert np.array_equal(view(name + ".nested_quant_map").numpy(), tensor.nested_quant_map)
            else:
                assert tensor.dtype == "BF16"
                assert view(name).dtype == torch.bfloat16
                assert np.array_equal(view(name).view(torch.uint16).numpy(), tensor.data)


def test_tensors_without_elements(tmp_path: Path) -> None:
    empty = SourceTensor("F32", (0, 4), b"")
    source = write_checkpoint(tmp_path / "source", {**tiny_tensors(), "model.empty": empty, "z.empty": empty})
    for number, limit in enumerate((1, 10**9)):
        out = tmp_path / str(number)
        convert(source, out, ConversionOptions(max_shard_nbytes=limit), workers=1)
        structure = check_structure(out)
        check_bytes(structure, stream_shards(structure, LateDevice(), verify="full", chunk_nbytes=100))
        record = json.loads((out / "qformat.json").read_bytes())
        record["tensors"]["z.empty"]["xxh3"] = "0" * 32
        reseal(out, record, update_files=False)
        assert refusal(check_structure(out)).tensor == "z.empty"  # no byte, but a digest


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (value,) = file.read(1)
        file.seek(position)
        file.write(bytes([value ^ 1]))


def refusal(structure: Structure, device: LateDevice | None = None, **options: Any) -> ArtifactError:
    """Return the error of a stream that must fail, and check that everything has come to rest."""
    device = device or LateDevice()
    with pytest.raises(ArtifactError) as caught:
        stream_shards(structure, device, **{"verify": "full", "chunk_nbytes": 100, **options})
    check_at_rest(device)
    return caught.value


def test_a_flipped_byte_is_found_as_verify_finds_it(tiny: Path) -> None:
    structure = check_structure(tiny)
    in_shards = [region for region in regions(tiny) if region.file.endswith(".safetensors")]
    assert {region.component for region in in_shards} >= {None, "packed", "absmax", "quant_state", "data"}
    for region in in_shards:
        for position in {region.start, (region.start + region.stop) // 2, region.stop - 1}:
            check_flip(structure, region, position)


def check_flip(structure: Structure, region: Region, position: int) -> None:
    path = structure.path / region.file
    flip(path, position)
    error = refusal(structure)
    assert finding_of(error) in verify_integrity(structure.path, workers=1).findings
    assert error.path == str(path)
    if region.tensor is not None:
        assert (error.reason, error.tensor, error.field) == (
            Reason.COMPONENT_DIGEST,
            region.tensor,
            region.component,
        )
        # Without digests the bytes come as they are.
        check_bytes(structure, stream_shards(structure, LateDevice(), verify="structure"))
    flip(path, position)
    check_bytes(structure, stream_shards(structure, LateDevice(), verify="full"))


def test_bytes_that_were_wrong_only_when_first_read_are_refused(tiny: Path) -> None:
    device = LateDevice()

    def damage(host: Tensor) -> None:
        if len(device.started) == 1:
            host[0] ^= 1
            device.started[0] = (host, host.numpy().tobytes(), device.started[0][2])

    device.on_copy = damage
    error = refusal(check_structure(tiny), device)
    assert error.reason == Reason.COMPONENT_DIGEST
    assert "once more" in str(error)


@pytest.mark.parametrize("verify", ["full", "structure"])
def test_a_file_that_was_cut_before(tiny: Path, verify: str) -> None:
    structure = check_structure(tiny)
    path = list(shards(tiny))[1]
    os.truncate(path, path.stat().st_size - 1)
    device = LateDevice()
    error = refusal(structure, device, verify=verify)
    assert (error.reason, error.path) == (Reason.FILE_SIZE, str(path))
    assert not device.allocated


@pytest.mark.parametrize("verify", ["full", "structure"])
def test_a_file_that_is_cut_while_it_is_read(tiny: Path, verify: str) -> None:
    structure = check_structure(tiny)
    path = list(shards(tiny))[1]
    device = LateDevice()
    device.on_copy = lambda host: os.truncate(path, path.stat().st_size - 150)
    error = refusal(structure, device, verify=verify, n_buffers=2)
    assert (error.reason, error.path) == (Reason.TRUNCATED, str(path))


def test_a_file_that_became_a_link_or_is_gone(tiny: Path) -> None:
    structure = check_structure(tiny)
    path = next(shards(tiny))
    path.rename(tiny.parent / "elsewhere")
    assert refusal(structure).reason == Reason.MISSING_FILE
    path.symlink_to(tiny.parent / "elsewhere")
    assert refusal(structure).reason == Reason.PATH_ESCAPES


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
    stop = stream._Ring.stop

    def stop_and_open(ring: Any, failure: BaseException | None = None) -> None:
        stop(ring, failure)
        device.gate.set()  # no wait returned, and so none failed, before the failed copy was noted

    monkeypatch.setattr(stream._Ring, "stop", stop_and_open)
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
def test_after_an_error_the_device_memory_is_free_at_once(tiny: Path, options: dict[str, int]) -> None:
    """Not only when the garbage collector comes by: the next thing that the caller does may be a smaller model."""
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
def test_arguments_that_make_no_sense(tiny: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        stream_shards(check_structure(tiny), LateDevice(), **{"verify": "full", **options})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("chunk_nbytes", [1000, 1 << 24])
def test_a_real_gpu(llama: Path, chunk_nbytes: int) -> None:
    structure = check_structure(llama)
    found = stream_shards(structure, TorchDevice("cuda"), verify="full", chunk_nbytes=chunk_nbytes)
    assert all(tensor.is_cuda and tensor.data_ptr() % 4096 == 0 for tensor in found.values())
    check_bytes(structure, {name: tensor.cpu() for name, tensor in found.items()})
