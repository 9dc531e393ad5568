"""The plan of an export predicts every byte and reads no weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat.converters.export import TARGETS, export, plan_export
from tests.converters.decode.exports import damage
from tests.converters.faulty_disk import FaultyDisk, place
from tests.small_models import contents


@pytest.mark.parametrize("max_shard_nbytes", [1, 500, 20_000, 10**9])
@pytest.mark.parametrize("to", TARGETS)
def test_a_plan_covers_every_shard_without_holes_and_predicts_the_exact_size(
    to: str, max_shard_nbytes: int, artifact: Path, tmp_path: Path
) -> None:
    planned = plan_export(artifact, to, max_shard_nbytes=max_shard_nbytes)
    export(artifact, tmp_path / "out", to, max_shard_nbytes=max_shard_nbytes, disk=FaultyDisk())
    assert planned.nbytes == sum(len(data) for data in contents(tmp_path / "out").values())
    for shard in planned.shards:
        position = len(shard.header)
        places = sorted(
            (task.place for task in planned.tasks if task.place.shard == shard.name), key=lambda p: (p.start, p.nbytes)
        )
        assert len(places) == len(shard.tensors)
        for found in places:
            assert found.start == position
            position += found.nbytes
        assert position == shard.nbytes == (tmp_path / "out" / shard.name).stat().st_size
    assert len({task.name for task in planned.tasks}) == len(planned.tasks)


def test_a_plan_reads_no_weight(tiny: Path, tmp_path: Path) -> None:
    copy = place(tmp_path / "copy", contents(tiny))
    expected = plan_export(copy, "bf16")
    damage(copy, "packed")
    assert plan_export(copy, "bf16") == expected
