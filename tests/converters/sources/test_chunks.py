"""The loop over the chunks of a source tensor: all bytes in order, hashed, counted, and stopped on request."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qformat.artifact.digests import Xxh3, xxh3
from qformat.converters.sources.chunks import read_chunks
from qformat.converters.sources.safetensors_shards import SafetensorsShards
from qformat.errors import Interrupted
from tests.small_models import weight, write_checkpoint

NAME = "model.layers.0.mlp.up_proj.weight"
NBYTES = 2 * 33 * 64


@pytest.fixture
def source(tmp_path: Path) -> Iterator[SafetensorsShards]:
    opened = SafetensorsShards(
        write_checkpoint(tmp_path / "source", {NAME: weight((33, 64))}, config={"architectures": ["LlamaForCausalLM"]})
    )
    yield opened
    opened.close()


@pytest.mark.parametrize("chunk_nbytes", [2, 1000, NBYTES - 2, NBYTES, NBYTES + 2])
def test_chunks_are_the_tensor_in_order_and_its_digest(source: SafetensorsShards, chunk_nbytes: int) -> None:
    tensor, whole = source.tensors[NAME], np.empty(NBYTES, np.uint8)
    source.read_into(tensor, 0, whole.data)
    digest, sizes = Xxh3(), list[int]()
    buffer = np.empty(chunk_nbytes, np.uint8)
    chunks = read_chunks(source, tensor, buffer, digest=digest, progress=sizes.append)
    found = [(offset, chunk.copy()) for offset, chunk in chunks]
    assert [offset for offset, _ in found] == list(range(0, NBYTES, chunk_nbytes))
    np.testing.assert_array_equal(np.concatenate([chunk for _, chunk in found]), whole)
    assert digest.hexdigest() == xxh3(whole)
    assert sum(sizes) == NBYTES


def test_progress_counts_bytes_after_they_were_used(source: SafetensorsShards) -> None:
    sizes: list[int] = []
    chunks = read_chunks(source, source.tensors[NAME], np.empty(1000, np.uint8), progress=sizes.append)
    next(chunks)
    assert sizes == []
    next(chunks)
    assert sizes == [1000]


def test_a_stop_ends_the_loop_at_the_next_chunk(source: SafetensorsShards) -> None:
    stopping = threading.Event()
    chunks = read_chunks(source, source.tensors[NAME], np.empty(1000, np.uint8), stopping=stopping)
    next(chunks)
    stopping.set()
    with pytest.raises(Interrupted):
        next(chunks)
