"""Headers that the safetensors library reads, although no shard of an artifact may have them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors

from qformat.artifact.reading.verify import verify_integrity
from qformat.converters.compare.compare import compare
from qformat.converters.convert import convert
from qformat.errors import Reason
from tests.converters.refused_source import refusal
from tests.small_models import (
    Tensor,
    header_bytes,
    llama_config,
    llama_tensors,
    safetensors_bytes,
    write_checkpoint,
)


def odd_header(
    tensors: Mapping[str, Tensor], *, change: Callable[[dict[str, Any]], None], before: bytes = b""
) -> bytes:
    """Return the bytes of a file with a changed header of odd length, so that its elements are not aligned."""
    whole = safetensors_bytes(tensors)
    stop = 8 + int.from_bytes(whole[:8], "little")
    record = json.loads(whole[8:stop])
    change(record)
    text = before + json.dumps(record).encode()
    text += b" " * (1 - len(text) % 2)
    return struct.pack("<Q", len(text)) + text + whole[stop:]


ODD_HEADERS: dict[str, tuple[Callable[[dict[str, Any]], None], bytes]] = {
    "elements at odd bytes": (lambda record: None, b""),
    "spaces before the text": (lambda record: None, b"  \n"),
    "metadata is null": (lambda record: record.update(__metadata__=None), b""),
    "unknown fields": (lambda record: record["lm_head.weight"].update(more=[1, {}]), b""),
}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("kind", ODD_HEADERS)
def test_a_header_that_no_artifact_may_have_gives_the_same_artifact(kind: str, dtype: str, tmp_path: Path) -> None:
    change, before = ODD_HEADERS[kind]
    tensors = llama_tensors(dtype=dtype)
    plain, odd = (write_checkpoint(tmp_path / name, tensors, config=llama_config()) for name in ("plain", "odd"))
    (odd / "model.safetensors").write_bytes(odd_header(tensors, change=change, before=before))
    for (name, theirs), (_, data) in zip(
        *(sorted(library_reads(folder).items()) for folder in (plain, odd)), strict=True
    ):
        assert theirs == data, name
    for folder in (plain, odd):
        convert(folder, folder.with_name(f"{folder.name}-nf4"))
    shard = "model-00001-of-00001.safetensors"
    assert (tmp_path / "odd-nf4" / shard).read_bytes() == (tmp_path / "plain-nf4" / shard).read_bytes()
    assert compare(tmp_path / "odd-nf4", odd).passed
    assert verify_integrity(tmp_path / "odd-nf4").passed


def library_reads(folder: Path) -> dict[str, bytes]:
    read = safetensors.deserialize((folder / "model.safetensors").read_bytes())
    return {name: bytes(tensor["data"]) for name, tensor in read}


def test_a_checkpoint_without_any_tensor_is_rejected(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", llama_tensors(), config=llama_config())
    for record in ({}, {"__metadata__": {"format": "pt"}}, {"__metadata__": None}):
        (source / "model.safetensors").write_bytes(header_bytes(record))
        error = refusal(source)
        assert error.reason is Reason.HEADER_SYNTAX
        assert "contains no tensor" in str(error)
