"""How much of a tensor is in memory at a time, and the one loop over the bytes of a source tensor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.digests import Xxh3
from qformat.converters.sources.source import Source, SourceTensor
from qformat.errors import Interrupted


@dataclass(frozen=True, slots=True)
class ChunkSizes:
    """What a thread holds at a time.

    nbytes: bytes that are read, encoded, decoded or copied, in buffers that are used again: they stay in the L2 and L3
    cache. A multiple of every block's size. cast_elements: elements of a kept tensor that are cast; numpy makes several
    arrays of them. sync_nbytes: bytes that an export writes between two syncs.
    """

    nbytes: int = 4 * 2**20
    cast_elements: int = 2**18
    sync_nbytes: int = 256 * 2**20


CHUNK_SIZES = ChunkSizes()


def read_chunks(
    source: Source,
    tensor: SourceTensor,
    buffer: NDArray[np.uint8],
    *,
    digest: Xxh3 | None = None,
    stopping: threading.Event | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield (byte offset, bytes) of a source tensor in order, in `buffer`, which is filled again and again.

    digest: takes in the bytes as they pass. stopping: once set, ends the loop at the next chunk. progress: told of the
    bytes that were used.
    Raises: SourceError; Interrupted.
    """
    for offset in range(0, tensor.nbytes, buffer.size):
        if stopping is not None and stopping.is_set():
            raise Interrupted
        chunk = buffer[: min(buffer.size, tensor.nbytes - offset)]
        source.read_into(tensor, offset, chunk.data)
        if digest is not None:
            digest.update(chunk)
        yield offset, chunk
        progress(chunk.size)
