"""The resumable SHA-256 against hashlib's."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qformat.codec.cpu.lanes import cpu_features
from qformat.errors import UsageError
from qformat.hub.reading import resumable_sha256
from qformat.hub.reading.resumable_sha256 import COMPRESS_PLAIN, COMPRESS_X86, ResumableSha256

DATA = np.random.default_rng(0).bytes(100_000)

BOTH = [
    COMPRESS_PLAIN,
    pytest.param(
        COMPRESS_X86, marks=pytest.mark.skipif("sha" not in cpu_features(), reason="no SHA instructions here")
    ),
]


@pytest.mark.parametrize("compress", BOTH)
def test_every_short_length_and_a_long_one_has_hashlibs_digest(
    compress: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumable_sha256, "_compressor", lambda: compress)
    for nbytes in [*range(200), 4096, 99_999, 100_000]:
        state = ResumableSha256()
        state.update(DATA[:nbytes])
        assert state.hexdigest() == hashlib.sha256(DATA[:nbytes]).hexdigest(), nbytes


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3000), max_size=8))
def test_written_down_after_any_bytes_it_goes_on_as_if_it_had_not_stopped(lengths: list[int]) -> None:
    state, position = ResumableSha256(), 0
    for nbytes in lengths:
        state.update(memoryview(DATA)[position : position + nbytes])
        position += nbytes
        state = ResumableSha256.from_text(state.to_text())
    assert state.nbytes == position
    assert state.hexdigest() == hashlib.sha256(DATA[:position]).hexdigest()


def test_more_bytes_than_32_bits_count_are_padded_with_their_number() -> None:
    state = ResumableSha256()
    state.update(DATA[:64])
    expected = hashlib.sha256(DATA[:64])
    piece = bytes(2**24)
    for _ in range(33):  # 553 MB, more than 2^32 bits
        state.update(piece)
        expected.update(piece)
    assert state.hexdigest() == expected.hexdigest()


@pytest.mark.parametrize("text", ["", "1:2", "0::", "64:" + "0" * 64 + ":00", "-1:" + "0" * 64 + ":", "0:zz:"])
def test_what_is_no_state_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no state"):
        ResumableSha256.from_text(text)
