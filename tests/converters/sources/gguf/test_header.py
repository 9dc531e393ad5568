"""Headers with hostile counts, tensors and bytes are rejected with a reason before anything is allocated."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from qformat.converters.convert import plan
from qformat.converters.sources.open_source import open_source
from qformat.errors import QformatError, Reason, SourceError
from tests.converters.sources.decoded_kinds import read
from tests.converters.sources.gguf.gguf_models import write_gguf

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


def damaged(folder: Path, place: int, data: bytes) -> Path:
    path = folder / "model.gguf"
    whole = bytearray(path.read_bytes())
    whole[place : place + len(data)] = data
    path.write_bytes(whole)
    return path


@pytest.mark.parametrize(
    ("place", "data", "reason"),
    [
        (0, b"GGML", Reason.HEADER_SYNTAX),
        (4, struct.pack("<I", 1), Reason.UNSUPPORTED_VERSION),
        (4, struct.pack(">I", 3), Reason.UNSUPPORTED_VERSION),
        (8, struct.pack("<Q", 2**63), Reason.HEADER_LIMIT),
        (8, struct.pack("<Q", 50_000), Reason.HEADER_LIMIT),
        (16, struct.pack("<Q", 2**40), Reason.HEADER_LIMIT),
        (24, struct.pack("<Q", 2**62), Reason.HEADER_LIMIT),
        (24, struct.pack("<Q", 4_000_000), Reason.TRUNCATED),
    ],
)
def test_hostile_counts_are_rejected_before_anything_is_allocated(
    place: int, data: bytes, reason: Reason, tmp_path: Path
) -> None:
    path = damaged(write_gguf(tmp_path / "gguf"), place, data)
    with pytest.raises(SourceError) as refused:
        plan(path.parent)
    if place != 8 or data == struct.pack("<Q", 2**63):
        assert refused.value.reason is reason
    assert str(path) in str(refused.value)


def info_place(path: Path, name: str) -> int:
    """Return the offset behind the name in a tensor's entry."""
    return path.read_bytes().index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)


@pytest.mark.parametrize(
    ("skipped", "data", "reason"),
    [
        (0, struct.pack("<I", 0), Reason.HEADER_LIMIT),
        (0, struct.pack("<I", 5), Reason.HEADER_LIMIT),
        (4, struct.pack("<Q", 2**60), Reason.HEADER_LIMIT),
        (4, struct.pack("<Q", 0), Reason.HEADER_LIMIT),
        (4, struct.pack("<Q", 100), Reason.HEADER_FIELD),
        (12, struct.pack("<Q", 64), Reason.COMPONENT_SHAPE),
        (20, struct.pack("<I", 16), Reason.UNSUPPORTED_DTYPE),
        (24, struct.pack("<Q", 2**60), Reason.HEADER_OFFSETS),
        (24, struct.pack("<Q", 7), Reason.ALIGNMENT),
        (24, struct.pack("<Q", 2**30), Reason.TRUNCATED),
        (24, struct.pack("<Q", 0), Reason.HEADER_OFFSETS),
    ],
)
def test_hostile_tensors_are_rejected_with_their_name(
    skipped: int, data: bytes, reason: Reason, tmp_path: Path
) -> None:
    folder = write_gguf(tmp_path / "gguf")
    name = "blk.1.attn_v.weight"
    damaged(folder, info_place(folder / "model.gguf", name) + skipped, data)
    with pytest.raises(SourceError) as refused:
        plan(folder)
    assert refused.value.reason is reason
    assert "model.gguf" in str(refused.value)
    assert name in str(refused.value) or refused.value.tensor is not None


def test_two_tensors_with_the_same_name_are_rejected(tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "gguf")
    damaged(folder, info_place(folder / "model.gguf", "blk.1.attn_v.weight") - 8, b"k.weight"[:8])
    with pytest.raises(SourceError) as refused:
        plan(folder)
    assert refused.value.reason is Reason.DUPLICATE_TENSOR


def test_any_damage_to_the_header_raises_our_error_or_gives_a_model(tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "gguf")
    path, pick = folder / "model.gguf", random.Random(0)
    whole = path.read_bytes()
    header_nbytes = info_place(path, "blk.1.ffn_down.weight") + 60
    copies = [whole[: pick.randrange(len(whole))] for _ in range(30)]
    for _ in range(250):
        flipped = bytearray(whole)
        flipped[pick.randrange(header_nbytes)] ^= 1 << pick.randrange(8)
        copies.append(bytes(flipped))
    messages, n_opened = [], 0
    for data in copies:
        path.write_bytes(data)
        try:
            source = open_source(folder)
        except QformatError as error:
            messages.append(str(error))
        else:
            n_opened += 1
            for name in source.tensors:
                read(source, name, chunk_nbytes=1 << 22)
            source.close()
    assert len(messages) > 150
    assert n_opened > 10  # a flipped bit in a float or an unused key is not to be seen
    assert not [message for message in messages if "gguf" not in message]
