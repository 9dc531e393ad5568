"""The digests, and the thread that takes them behind the writers."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from qformat.artifact.digests import READ_NBYTES, Follower, WrittenFile, sha256_of_file, xxh3, xxh3_of_range
from qformat.errors import ArtifactError, Reason

NBYTES = 2 * READ_NBYTES + 12_345


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(NBYTES))
    return path


@pytest.fixture
def descriptor(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 0), (0, 1), (7, 4096), (0, NBYTES), (READ_NBYTES - 1, READ_NBYTES + 1), (5, 5)]
)
def test_a_range_has_the_digest_of_its_bytes(start: int, stop: int, path: Path, descriptor: int) -> None:
    expected = xxhash.xxh3_128_hexdigest(path.read_bytes()[start:stop])
    assert xxh3_of_range(descriptor, start, stop, path=path, error=ArtifactError) == expected
    assert xxh3(path.read_bytes()[start:stop]) == expected


def test_a_range_beyond_the_end_is_an_error(path: Path, descriptor: int) -> None:
    for digest in (
        lambda: xxh3_of_range(descriptor, 0, NBYTES + 1, path=path, error=ArtifactError),
        lambda: sha256_of_file(descriptor, NBYTES + 1, path=path, error=ArtifactError),
    ):
        with pytest.raises(ArtifactError) as refused:
            digest()
        assert refused.value.reason is Reason.TRUNCATED


@pytest.mark.parametrize("n_parts", [1, 2, 7, 100])
def test_parts_written_in_any_order_give_the_digest_of_the_whole(n_parts: int, path: Path, descriptor: int) -> None:
    data = path.read_bytes()
    assert sha256_of_file(descriptor, NBYTES, path=path, error=ArtifactError) == hashlib.sha256(data).hexdigest()
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
    assert follower.finish() == {"file": hashlib.sha256(data).hexdigest()}


def test_a_file_that_was_cut_behind_the_writer_is_an_error(path: Path, descriptor: int) -> None:
    follower = Follower({"file": WrittenFile(path, descriptor, NBYTES)})
    os.ftruncate(descriptor, 100)
    follower.mark_written("file", 0, NBYTES)
    with pytest.raises(ArtifactError) as refused:
        follower.finish()
    assert refused.value.reason is Reason.TRUNCATED


def test_closing_does_not_wait_for_what_could_still_be_hashed(path: Path, descriptor: int) -> None:
    """After an interruption nobody wants the digest: a resumed run may have tens of gigabytes to go."""
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


def test_closing_twice_is_fine(path: Path, descriptor: int) -> None:
    follower = Follower({"file": WrittenFile(path, descriptor, NBYTES)})
    follower.close()
    follower.close()
