"""Tensors over mapped shards and over copies of them, compared with numpy's reading of the same bytes."""

from __future__ import annotations

import mmap
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from qformat.artifact.header import TensorEntry
from qformat.model.shard_tensors import CopiedShard, MappedShard, ShardBytes, tensor_over

DATA = bytes(range(256))
START = 16
"""Offset of the data in the file; a shard on a device holds no header."""

ENTRIES = [
    TensorEntry("aligned", "F32", (3, 2), 16, 40),
    TensorEntry("unaligned", "I16", (5,), 17, 27),
    TensorEntry("bytes", "U8", (7, 1), 19, 26),
    TensorEntry("last", "I64", (1,), 248, 256),
]
NUMPY = {"F32": "<f4", "I16": "<i2", "U8": "u1", "I64": "<i8"}


def mapped(tmp_path: Path) -> MappedShard:
    (tmp_path / "shard").write_bytes(DATA)
    with (tmp_path / "shard").open("rb") as file:
        return MappedShard(mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE))


def copied(_: Path) -> CopiedShard:
    # A device's memory may begin in the middle of an allocation.
    return CopiedShard(torch.tensor(list(bytes(8) + DATA[START:]), dtype=torch.uint8)[8:], START)


@pytest.fixture(params=[mapped, copied], ids=["mapped", "copied"])
def shard(request: pytest.FixtureRequest, tmp_path: Path) -> ShardBytes:
    made: ShardBytes = request.param(tmp_path)
    return made


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_tensor_has_its_bytes_and_a_storage_of_exactly_those(shard: ShardBytes, entry: TensorEntry) -> None:
    found = shard.tensor(entry)
    expected = np.frombuffer(DATA[entry.start : entry.stop], NUMPY[entry.dtype]).reshape(entry.shape)
    assert np.array_equal(found.numpy(), expected, equal_nan=True)
    assert found.storage_offset() == 0
    assert found.untyped_storage().nbytes() == found.nbytes
    assert len(pickle.dumps(found)) < 1000
    assert found.data_ptr() % found.element_size() == 0


@pytest.mark.parametrize("position", [17, 256], ids=["inside", "at the end"])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_a_tensor_without_elements_is_read(shard: ShardBytes, shape: tuple[int, ...], position: int) -> None:
    found = shard.tensor(TensorEntry("empty", "F32", shape, position, position))
    assert (found.shape, found.dtype) == (shape, torch.float32)


def test_a_scalar_is_read(shard: ShardBytes) -> None:
    found = shard.tensor(TensorEntry("scalar", "U8", (), 20, 21))
    assert (found.shape, found.item()) == ((), DATA[20])


def test_an_aligned_tensor_is_no_copy_and_keeps_the_memory_alive() -> None:
    memory = torch.zeros(64, dtype=torch.uint8)
    first = memory.data_ptr()
    found = tensor_over(memory[8:], 8, torch.int32, (4,))
    assert found.data_ptr() == first + 16
    memory[16] = 5
    del memory
    others = [torch.full((64,), 9, dtype=torch.uint8) for _ in range(50)]  # would get the memory if it were free
    assert all(other.data_ptr() != first for other in others)
    assert found.tolist() == [5, 0, 0, 0]


def test_tensors_of_a_mapped_shard_share_its_pages(tmp_path: Path) -> None:
    shard = mapped(tmp_path)
    shard.tensor(ENTRIES[0]).zero_()
    assert shard.tensor(TensorEntry("again", "U8", (4,), 16, 20)).tolist() == [0] * 4
    assert (tmp_path / "shard").read_bytes() == DATA  # the mapping is private
