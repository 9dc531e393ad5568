"""Background threads that hash and sync written files: their results, their end and their errors."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from pathlib import Path

import pytest

from qformat.artifact.writing.behind import Follower, WriteBehind, WrittenFile
from qformat.artifact.writing.disk import Disk
from qformat.errors import ArtifactError, Reason, TargetError
from tests.artifact.conftest import NBYTES


@pytest.mark.parametrize("n_parts", [1, 2, 7, 100])
def test_parts_written_in_any_order_give_the_digest_of_the_file(n_parts: int, path: Path, descriptor: int) -> None:
    data = path.read_bytes()
    follower = Follower({"file": WrittenFile(path, descriptor, NBYTES)})
    bounds = [NBYTES * i // n_parts for i in range(n_parts + 1)]
    ranges = list(itertools.pairwise(bounds))
    writers = [
        threading.Thread(
            target=lambda mine=ranges[i::3]: [follower.mark_written("file", *part) for part in reversed(mine)]
        )
        for i in range(3)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert follower.sha256() == {"file": hashlib.sha256(data).hexdigest()}


def test_a_file_that_was_truncated_after_writing_raises_an_error(path: Path, descriptor: int) -> None:
    follower = Follower({"file": WrittenFile(path, descriptor, NBYTES)})
    os.ftruncate(descriptor, 100)
    follower.mark_written("file", 0, NBYTES)
    with pytest.raises(ArtifactError) as refused:
        follower.sha256()
    assert refused.value.reason is Reason.TRUNCATED


def test_closing_does_not_wait_for_bytes_that_are_not_hashed_yet(path: Path, descriptor: int) -> None:
    """After an interruption the digest is not needed, and a resumed run may have tens of gigabytes left."""
    begun, go_on = threading.Event(), threading.Event()

    class Slow(WrittenFile):
        n_hashed = 0

        def hash_some(self, buffer: memoryview) -> None:
            begun.set()
            go_on.wait()
            Slow.n_hashed += 1
            super().hash_some(buffer)

    follower = Follower({"file": Slow(path, descriptor, NBYTES)})
    join = follower._thread.join
    follower._thread.join = lambda timeout=None: (go_on.set(), join(timeout))[1]  # type: ignore[method-assign]
    follower.mark_written("file", 0, NBYTES)
    begun.wait()
    follower.close()
    assert Slow.n_hashed == 1


def test_closing_twice_has_no_effect(path: Path, descriptor: int) -> None:
    follower = Follower({"file": WrittenFile(path, descriptor, NBYTES)})
    follower.close()
    follower.close()


class Noting(Disk):
    """Disk that records the synced files and can be made to fail."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.synced: list[int] = []
        self._fails = fails

    def raw_fsync(self, descriptor: int) -> None:
        self.synced.append(descriptor)
        if self._fails:
            raise OSError(5, "Input/output error")


@pytest.mark.parametrize(("nbytes", "n_syncs"), [(9, 0), (10, 1), (11, 1)])
def test_files_are_synced_after_every_batch(tmp_path: Path, nbytes: int, n_syncs: int) -> None:
    disk = Noting()
    behind = WriteBehind(disk, tmp_path, {"a": 1, "b": 2}, batch_nbytes=10)
    behind.mark_written("b", 100, 100 + nbytes)
    behind.finish()
    assert disk.synced == [2] * n_syncs


def test_a_failed_sync_is_raised_at_the_end(tmp_path: Path) -> None:
    behind = WriteBehind(Noting(fails=True), tmp_path, {"a": 1}, batch_nbytes=1)
    behind.mark_written("a", 0, 1)
    with pytest.raises(TargetError, match="Input/output error"):
        behind.finish()
    behind.close()
