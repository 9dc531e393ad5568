"""Runs that are stopped, killed or find a full disk: the next one resumes and fetches nothing that is encoded."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat.errors import HubError, SourceError, TargetError
from tests.converters.faulty_disk import FaultyDisk
from tests.converters.sources.hub.serving import (
    DATA,
    NAME,
    by_shard,
    convert,
    overlap,
    sealed_ranges,
    without_source,
)
from tests.hub_stand_in import Hub


@pytest.mark.parametrize("stop_after", range(1, 29, 3))
def test_a_run_stopped_anywhere_resumes_without_fetching_encoded_tensors(
    hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path, stop_after: int
) -> None:
    calls = 0

    def stop(nbytes: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(NAME, tmp_path / "out", on_progress=stop, workers=3)
    sealed, _ = sealed_ranges(tmp_path / "out.partial", source)
    hub.log.clear()

    convert(NAME, tmp_path / "out", workers=2)

    assert without_source(tmp_path / "out") == expected
    assert overlap(by_shard(hub, source), sealed) == 0
    assert len(sealed) > 0 or stop_after < 10


def test_a_full_disk_is_reported_and_the_same_command_resumes_without_fetching_encoded_tensors(
    hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match="not enough disk space"):
        convert(NAME, tmp_path / "out", disk=FaultyDisk(60, "full from here on"))
    sealed, _ = sealed_ranges(tmp_path / "out.partial", source)
    assert sealed
    hub.log.clear()

    convert(NAME, tmp_path / "out")

    assert without_source(tmp_path / "out") == expected
    assert overlap(by_shard(hub, source), sealed) == 0


def test_damaged_staged_bytes_are_fetched_again_and_compared_with_the_hashed_ones(
    hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path
) -> None:
    hub.faults.add("status", route="cdn/", after=30, status=404)
    hub.faults.add("status", route=DATA, after=60, status=404)
    with pytest.raises(HubError):
        convert(NAME, tmp_path / "out")
    hub.faults.clear()
    sealed, _ = sealed_ranges(tmp_path / "out.partial", source)
    staged = tmp_path / "out.partial" / "folder" / "model-00001-of-00001.safetensors"
    staged.write_bytes(staged.read_bytes()[:5000].ljust(staged.stat().st_size, b"\0"))
    hub.log.clear()

    convert(NAME, tmp_path / "out")

    assert without_source(tmp_path / "out") == expected
    assert overlap(by_shard(hub, source), sealed) > 0


def test_a_tensor_fetched_again_must_have_the_hashed_bytes(
    plain_hub: Hub, source: Path, expected: dict[str, object], tmp_path: Path
) -> None:
    plain_hub.faults.add("status", route=r"00003-of-00003\.safetensors$", after=3, status=404)
    with pytest.raises(HubError):
        convert(NAME, tmp_path / "out", workers=1)
    plain_hub.faults.clear()
    sealed, _ = sealed_ranges(tmp_path / "out.partial", source)
    assert [one for one in sealed if "00001" in one[0]]
    staged = tmp_path / "out.partial" / "folder" / "model-00001-of-00001.safetensors"
    staged.write_bytes(staged.read_bytes()[:5000].ljust(staged.stat().st_size, b"\0"))
    plain_hub.faults.add("flip", route=r"00001-of.*\.safetensors$", after=2, times=1, nbytes=3)

    with pytest.raises(SourceError, match=r"00001-of-00003.safetensors: tensor '.*': has the digest"):
        convert(NAME, tmp_path / "out")

    assert not (tmp_path / "out").exists()
    plain_hub.log.clear()
    convert(NAME, tmp_path / "out")
    assert without_source(tmp_path / "out") == expected
    assert overlap(by_shard(plain_hub, source), sealed) > 80_000  # the shard that one of the two came from, whole
