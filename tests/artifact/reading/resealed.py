"""Invalid artifacts with correct digests, and the errors that reject them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qformat.artifact.reading.reader import open_artifact
from qformat.errors import ArtifactError
from tests.artifact.damaged import reseal, shard_of, verify

W = "model.layers.0.self_attn.o_proj.weight"

Json = dict[str, Any]

H32, H64 = "0" * 32, "0" * 64


def refusal(artifact: Path) -> ArtifactError:
    """Return the error of opening the artifact. Verification must report a finding as well."""
    with pytest.raises(ArtifactError) as refused:
        open_artifact(artifact)
    assert not verify(artifact).passed
    assert len(str(refused.value)) < 4000
    return refused.value


def patch(artifact: Path, component: str, data: bytes | Callable[[bytes], bytes], *, offset: int = 0) -> None:
    """Overwrite bytes of a component in place and seal again."""
    path = shard_of(artifact, component)
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    start, stop = (8 + length + at for at in json.loads(whole[8 : 8 + length])[component]["data_offsets"])
    part = whole[start:stop]
    new = data(part) if callable(data) else part[:offset] + data + part[offset + len(data) :]
    assert len(new) == len(part)
    path.write_bytes(whole[:start] + new + whole[stop:])
    reseal(artifact)


def change_manifest(artifact: Path, change: Callable[[Json], object]) -> None:
    record = json.loads((artifact / "qformat.json").read_bytes())
    change(record)
    reseal(artifact, record, update_files=False)
