"""Chunk sizes that bound memory use, and the loop that reads a source tensor in chunks."""

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
    """Amounts of data that a thread holds at a time.

    Attributes:
        nbytes: Bytes to read, encode, decode or copy at a time. The buffers are reused and fit the L2 and L3 caches. A
            multiple of every block size.
        cast_elements: Elements of a kept tensor to cast at a time. numpy creates several temporary arrays of this size.
        sync_nbytes: Bytes that an export writes between two syncs.
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
    """Yield the byte offset and the bytes of each chunk of a source tensor, in order.

    Args:
        source: The source.
        tensor: The tensor to read.
        buffer: Buffer that holds each chunk in turn, uint8.
        digest: Updated with every chunk.
        stopping: Ends the loop at the next chunk once it is set.
        progress: Called with the number of bytes after each chunk was used.

    Raises:
        SourceError: The source cannot be read.
        Interrupted: `stopping` was set.
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
