"""The resumable SHA-256 equals that of hashlib."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qformat.errors import UsageError
from qformat.hub.reading.resumable_sha256 import Compress, ResumableSha256, compress_plain, find_openssl

DATA = np.random.default_rng(0).bytes(100_000)

needs_openssl = pytest.mark.skipif(find_openssl() is None, reason="no OpenSSL here that can be called")


@pytest.mark.parametrize("compress", [compress_plain, pytest.param(find_openssl(), marks=needs_openssl)])
def test_every_short_length_and_a_long_one_has_hashlibs_digest(compress: Compress) -> None:
    for nbytes in [*range(200), 4096, 99_999, 100_000]:
        state = ResumableSha256(compress)
        state.update(DATA[:nbytes])
        assert state.hexdigest() == hashlib.sha256(DATA[:nbytes]).hexdigest(), nbytes


@needs_openssl
def test_each_implementation_resumes_the_state_of_the_other() -> None:
    first = ResumableSha256(compress_plain)
    first.update(DATA[:777])
    second = ResumableSha256.from_text(first.to_text())
    second.update(DATA[777:])
    assert second.hexdigest() == hashlib.sha256(DATA).hexdigest()


@pytest.mark.parametrize("broken", [OSError, None, lambda context, data, nbytes: 1])
def test_a_library_that_cannot_be_called_or_gives_other_digests_is_not_used(
    monkeypatch: pytest.MonkeyPatch, broken: object
) -> None:
    class Library:
        def __init__(self, name: str) -> None:
            if broken is OSError:
                raise OSError(name)
            if broken is not None:
                self.SHA256_Update = broken

    monkeypatch.setattr("ctypes.CDLL", Library)
    assert find_openssl.__wrapped__() is None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3000), max_size=8))
def test_a_state_that_is_saved_at_any_byte_resumes_with_the_same_digest(lengths: list[int]) -> None:
    state, position = ResumableSha256(), 0
    for nbytes in lengths:
        state.update(memoryview(DATA)[position : position + nbytes])
        position += nbytes
        state = ResumableSha256.from_text(state.to_text())
    assert state.nbytes == position
    assert state.hexdigest() == hashlib.sha256(DATA[:position]).hexdigest()


def test_more_than_2_to_the_32_bits_are_padded_with_their_length() -> None:
    state = ResumableSha256()
    state.update(DATA[:64])
    expected = hashlib.sha256(DATA[:64])
    piece = bytes(2**24)
    for _ in range(33):  # 553 MB, more than 2^32 bits
        state.update(piece)
        expected.update(piece)
    assert state.hexdigest() == expected.hexdigest()


@pytest.mark.parametrize("text", ["", "1:2", "0::", "64:" + "0" * 64 + ":00", "-1:" + "0" * 64 + ":", "0:zz:"])
def test_invalid_states_are_rejected(text: str) -> None:
    with pytest.raises(UsageError, match="invalid state of a SHA-256"):
        ResumableSha256.from_text(text)
