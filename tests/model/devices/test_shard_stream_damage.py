"""Streams of damaged artifacts: what is rejected, and with which error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch import Tensor

from qformat.artifact.reading.structure import Structure, check_structure
from qformat.artifact.reading.verify import finding_of, verify_integrity
from qformat.errors import Reason
from qformat.model.devices.shard_stream import stream_shards
from tests.artifact.damaged import Region, regions, shards
from tests.model.devices.late_device import LateDevice, check_bytes, refusal

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (value,) = file.read(1)
        file.seek(position)
        file.write(bytes([value ^ 1]))


def test_a_flipped_byte_gives_the_same_finding_as_verify(tiny: Path) -> None:
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
        # Without digests, the bytes are copied unchecked.
        check_bytes(structure, stream_shards(structure, LateDevice(), verify="structure"))
    flip(path, position)
    check_bytes(structure, stream_shards(structure, LateDevice(), verify="full"))


def test_bytes_that_were_wrong_only_in_the_first_read_are_rejected(tiny: Path) -> None:
    device = LateDevice()

    def damage(host: Tensor) -> None:
        if len(device.started) == 1:
            host[0] ^= 1
            device.started[0] = (host, host.numpy().tobytes(), device.started[0][2])

    device.on_copy = damage
    error = refusal(check_structure(tiny), device)
    assert error.reason == Reason.COMPONENT_DIGEST
    assert "two reads of bytes" in str(error)


@pytest.mark.parametrize("verify", ["full", "structure"])
def test_a_file_that_was_truncated_before(tiny: Path, verify: str) -> None:
    structure = check_structure(tiny)
    path = list(shards(tiny))[1]
    os.truncate(path, path.stat().st_size - 1)
    device = LateDevice()
    error = refusal(structure, device, verify=verify)
    assert (error.reason, error.path) == (Reason.FILE_SIZE, str(path))
    assert not device.allocated


@pytest.mark.parametrize("verify", ["full", "structure"])
def test_a_file_that_is_truncated_while_it_is_read(tiny: Path, verify: str) -> None:
    structure = check_structure(tiny)
    path = list(shards(tiny))[1]
    device = LateDevice()
    device.on_copy = lambda host: os.truncate(path, path.stat().st_size - 150)
    error = refusal(structure, device, verify=verify, n_buffers=2)
    assert (error.reason, error.path) == (Reason.TRUNCATED, str(path))


def test_a_file_that_became_a_link_or_was_removed(tiny: Path) -> None:
    structure = check_structure(tiny)
    path = next(shards(tiny))
    path.rename(tiny.parent / "elsewhere")
    assert refusal(structure).reason == Reason.MISSING_FILE
    path.symlink_to(tiny.parent / "elsewhere")
    assert refusal(structure).reason == Reason.PATH_ESCAPES
