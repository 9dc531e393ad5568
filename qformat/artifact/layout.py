"""Which tensor lies in which shard and at which offset: a pure function of names and sizes (spec section 3.3)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qformat.artifact import header
from qformat.artifact.tensor_spec import TensorSpec

LARGEST_ALIGNMENT = 4096
"""Components are aligned to the largest power of two that divides their size, up to a page."""

MAX_TENSORS_PER_SHARD = 40_000
"""Keeps a shard's header far below its limit, whatever the names."""

_DIGITS = re.compile(r"([0-9]+)")


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor in its place; `start` and `stop` are byte offsets in the shard's file."""

    tensor: TensorSpec
    start: int

    @property
    def stop(self) -> int:
        """Byte offset behind the tensor's data."""
        return self.start + self.tensor.nbytes


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the artifact: header bytes (length prefix included) and tensors in the order of their data."""

    name: str
    header: bytes
    tensors: tuple[PlacedTensor, ...]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self.tensors[-1].stop


def natural_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts `layers.2` before `layers.10`."""
    parts = _DIGITS.split(name)
    return tuple((1, int(part), part) if _DIGITS.fullmatch(part) else (0, 0, part) for part in parts)


def alignment(nbytes: int) -> int:
    """Return the largest power of two that divides a size, at most a page; an empty tensor aligns to anything."""
    return min(nbytes & -nbytes, LARGEST_ALIGNMENT) if nbytes else LARGEST_ALIGNMENT


def place(groups: Sequence[Sequence[TensorSpec]], *, max_shard_nbytes: int) -> tuple[Shard, ...]:
    """Lay groups of tensors out in shards, in the given order; a group (one weight) never crosses shards.

    Inside a shard tensors are sorted by descending alignment, so that each lies aligned and there are no holes.
    A group that is larger than `max_shard_nbytes` gets a shard of its own.
    """
    bins: list[list[TensorSpec]] = []
    room = 0
    for group in groups:
        nbytes = sum(tensor.nbytes for tensor in group)
        if not bins or nbytes > room or len(bins[-1]) + len(group) > MAX_TENSORS_PER_SHARD:
            bins.append([])
            room = max_shard_nbytes
        bins[-1].extend(group)
        room -= nbytes
    return tuple(
        _shard(f"model-{number:05d}-of-{len(bins):05d}.safetensors", tensors)
        for number, tensors in enumerate(bins, start=1)
    )


def _shard(name: str, tensors: list[TensorSpec]) -> Shard:
    ordered = sorted(tensors, key=lambda tensor: -alignment(tensor.nbytes))
    header_bytes = header.build(ordered)
    placed = []
    position = len(header_bytes)
    for tensor in ordered:
        placed.append(PlacedTensor(tensor, position))
        position += tensor.nbytes
    return Shard(name, header_bytes, tuple(placed))
