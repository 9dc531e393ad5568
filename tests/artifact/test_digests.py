"""Digests of byte ranges and files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import xxhash

from qformat.artifact.digests import READ_NBYTES, sha256_of_file, xxh3, xxh3_of_range
from qformat.errors import ArtifactError, Reason
from tests.artifact.conftest import NBYTES


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 0), (0, 1), (7, 4096), (0, NBYTES), (READ_NBYTES - 1, READ_NBYTES + 1), (5, 5)]
)
def test_a_range_has_the_digest_of_its_bytes(start: int, stop: int, path: Path, descriptor: int) -> None:
    expected = xxhash.xxh3_128_hexdigest(path.read_bytes()[start:stop])
    assert xxh3_of_range(descriptor, start, stop, path=path, error=ArtifactError) == expected
    assert xxh3(path.read_bytes()[start:stop]) == expected


def test_a_range_beyond_the_end_raises_an_error(path: Path, descriptor: int) -> None:
    for digest in (
        lambda: xxh3_of_range(descriptor, 0, NBYTES + 1, path=path, error=ArtifactError),
        lambda: sha256_of_file(descriptor, NBYTES + 1, path=path, error=ArtifactError),
    ):
        with pytest.raises(ArtifactError) as refused:
            digest()
        assert refused.value.reason is Reason.TRUNCATED


def test_a_file_has_the_digest_of_its_bytes(path: Path, descriptor: int) -> None:
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert sha256_of_file(descriptor, NBYTES, path=path, error=ArtifactError) == expected
