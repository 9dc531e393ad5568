"""A fetch that does not fit on the disk. tests/cli/faults has the faults while it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat.errors import TargetError
from tests.converters.faulty_disk import DiskWithRoom
from tests.hub.fetching import BODY, do_fetch
from tests.hub_stand_in import Hub
from tests.small_models import names_beside


def test_a_full_disk_is_rejected_before_a_byte_is_fetched(
    hub: Hub, published: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match="not enough disk space"):
        do_fetch(tmp_path / "out", disk=DiskWithRoom(1000))
    assert not hub.requests(BODY)
    assert names_beside(tmp_path / "out") == {"small-nf4"}
