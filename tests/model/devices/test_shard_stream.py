"""Streaming shards to an artificial device whose copies happen as late as possible or when a test allows them."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import qformat
from qformat.artifact.reading.reader import PackedTensor
from qformat.artifact.reading.structure import check_structure
from qformat.converters.convert import ConversionOptions, convert
from qformat.model.devices import shard_stream as stream
from qformat.model.devices.shard_stream import data_starts, stream_shards
from qformat.model.devices.stream_device import TorchDevice
from qformat.model.shard_tensors import CopiedShard
from tests.artifact.damaged import reseal, shards
from tests.model.devices.chosen_order import ChosenOrder
from tests.model.devices.late_device import LateDevice, check_at_rest, check_bytes, refusal
from tests.small_models import Tensor as SourceTensor
from tests.small_models import tiny_tensors, write_checkpoint

pytestmark = pytest.mark.usefixtures("nothing_is_left")


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
    assert device.sizes == [len(found[path.name]) for path in shards(llama)]  # one allocation per shard
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


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_reads_and_copies_gives_the_same_bytes(
    llama: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    structure = check_structure(llama)
    starts = data_starts(structure)
    chunks = [(path, at) for path in shards(llama) for at in range(starts[path.name], path.stat().st_size, 300)]
    n_buffers = 2 + seed % 5
    order = ChosenOrder(seed, n_chunks=len(chunks), n_buffers=n_buffers, n_readers=min(4, n_buffers))
    read_exactly = stream.read_exactly

    def read_when_chosen(descriptor: int, start: int, out: memoryview, *, path: Path, error: Any) -> None:
        with order.reading(chunks.index((path, start))):
            read_exactly(descriptor, start, out, path=path, error=error)

    monkeypatch.setattr(stream, "read_exactly", read_when_chosen)
    device = LateDevice()
    device.on_copy = lambda host: order.before_copy()
    found = stream_shards(structure, device, verify="full", chunk_nbytes=300, n_buffers=n_buffers, readers=4)
    check_bytes(structure, found)
    check_at_rest(device)
    assert order.read != sorted(order.read) == list(range(len(chunks)))
    assert order.n_copied == len(chunks)


def test_several_threads_read_at_the_same_time(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)
    read_exactly = stream.read_exactly
    n_reads = iter(range(1 << 20))

    def meeting(*args: Any, **kwargs: Any) -> None:
        if next(n_reads) < 2:
            both.wait(300)
        read_exactly(*args, **kwargs)

    monkeypatch.setattr(stream, "read_exactly", meeting)
    stream_shards(check_structure(llama), LateDevice(), verify="full", chunk_nbytes=300, readers=2)


def test_digests_are_computed_while_copies_are_pending(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy can end before the fourth chunk is hashed, so a loader that waits earlier would wait forever."""
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
        tensor = CopiedShard(found[located.shard], starts[located.shard]).tensor(located.entry)
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
        assert refusal(check_structure(out)).tensor == "z.empty"  # it has no bytes but a digest


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("chunk_nbytes", [1000, 1 << 24])
def test_a_real_gpu(llama: Path, chunk_nbytes: int) -> None:
    structure = check_structure(llama)
    found = stream_shards(structure, TorchDevice("cuda"), verify="full", chunk_nbytes=chunk_nbytes)
    assert all(tensor.is_cuda and tensor.data_ptr() % 4096 == 0 for tensor in found.values())
    check_bytes(structure, {name: tensor.cpu() for name, tensor in found.items()})
