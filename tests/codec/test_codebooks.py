"""The two codebooks have fixed bytes and are the same as those that bitsandbytes writes."""

from __future__ import annotations

import hashlib

import bitsandbytes.functional as F
import numpy as np
import pytest

from qformat.codec.codebooks import DYNAMIC_MAP, DYNAMIC_THRESHOLDS, NF4_CODEBOOK, NF4_THRESHOLDS

PINNED = {
    "NF4_CODEBOOK": (NF4_CODEBOOK, 16, "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a"),
    "NF4_THRESHOLDS": (NF4_THRESHOLDS, 15, "7cbff57806c8b116153fa1c7d72b341d99bebec9b393b8d3bdcd5a4125500e9a"),
    "DYNAMIC_MAP": (DYNAMIC_MAP, 256, "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"),
    "DYNAMIC_THRESHOLDS": (DYNAMIC_THRESHOLDS, 255, "040404b2ecdb6437426e97713b5afb9b8c6cadc9863ba0b3d7a198975c413d2d"),
}


@pytest.mark.parametrize("name", PINNED)
def test_tables_have_their_pinned_bytes(name: str) -> None:
    table, size, digest = PINNED[name]
    assert table.dtype == np.dtype("<f4")
    assert table.shape == (size,)
    assert hashlib.sha256(table.tobytes()).hexdigest() == digest


def test_codebook_is_that_of_bitsandbytes() -> None:
    assert NF4_CODEBOOK.tobytes() == F.get_4bit_type("nf4", device="cpu").numpy().tobytes()


def test_dynamic_map_is_that_of_bitsandbytes() -> None:
    assert DYNAMIC_MAP.tobytes() == F.create_dynamic_map().numpy().tobytes()


@pytest.mark.parametrize("name", PINNED)
def test_tables_ascend_strictly_and_cannot_be_written(name: str) -> None:
    table = PINNED[name][0]
    assert (np.diff(table) > 0).all()
    with pytest.raises(ValueError, match="read-only"):
        table[0] = 0


def test_zero_has_its_own_code_in_both_tables() -> None:
    assert NF4_CODEBOOK[7].tobytes() == bytes(4)
    assert DYNAMIC_MAP[127].tobytes() == bytes(4)


@pytest.mark.parametrize(("values", "thresholds"), [(NF4_CODEBOOK, NF4_THRESHOLDS), (DYNAMIC_MAP, DYNAMIC_THRESHOLDS)])
def test_thresholds_lie_between_their_neighbours(values: np.ndarray, thresholds: np.ndarray) -> None:
    assert (values[:-1] < thresholds).all()
    assert (thresholds < values[1:]).all()
