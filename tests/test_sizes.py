"""Sizes: every option uses the same grammar, and the parser reads the formatter's output."""

from __future__ import annotations

from fractions import Fraction
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qformat.errors import UsageError
from qformat.sizes import Rounding, format_nbytes, parse_nbytes

LARGEST = 2**63 - 1


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0), ("7", 7), ("7B", 7), ("7 b", 7), (str(LARGEST), LARGEST),
        ("5GB", 5 * 10**9), ("5 GB", 5 * 10**9), ("5gb", 5 * 10**9), ("5G", 5 * 10**9), ("5g", 5 * 10**9),
        ("1.5kb", 1500), ("800 MB", 8 * 10**8), ("2T", 2 * 10**12), ("1PB", 10**15), ("1EB", 10**18),
        ("5GiB", 5 * 2**30), ("5gib", 5 * 2**30), ("512MiB", 2**29), ("1 KiB", 1024), ("1TiB", 2**40),
        ("4.35GB", 4_350_000_000), ("0.9999999999999999999GB", 10**9 - 1), (" 3MB ", 3_000_000), ("1.9", 1),
    ],
)  # fmt: skip
def test_a_size_is_a_number_and_a_unit_in_any_case(text: str, nbytes: int) -> None:
    assert parse_nbytes("--size", text) == nbytes


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "GB", "-1", "-1GB", "+1GB", "1e3", "1e400", "inf", "nan", "1.GB", ".5GB", "1,000", "5 apples", "5Gi",
        "5iB", "5GBs", "5  GB", "5\nGB", "٥GB", "0x10", str(2**63), "9.3EB", "1" * 10_000,
    ],
)  # fmt: skip
def test_anything_else_is_rejected_with_the_name_of_its_option(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--size '.*': expected auto, or a size such as 0, 512MiB or 5GB$"):
        parse_nbytes("--size", text, or_else="auto, or ")


@pytest.mark.parametrize(
    ("nbytes", "decimal", "binary"),
    [
        (0, "0 B", "0 B"),
        (999, "999 B", "999 B"),
        (1000, "1 kB", "0.977 KiB"),
        (1024, "1.02 kB", "1 KiB"),
        (999_499, "999 kB", "976 KiB"),
        (999_500, "1 MB", "976 KiB"),
        (55_000_000, "55 MB", "52.5 MiB"),
        (2**30, "1.07 GB", "1 GiB"),
        (5 * 10**15, "5 PB", "4.44 PiB"),
        (12.4, "12 B", "12 B"),
    ],
)
def test_a_size_is_shown_in_three_digits(nbytes: float, decimal: str, binary: str) -> None:
    assert format_nbytes(nbytes) == decimal
    assert format_nbytes(nbytes, binary=True) == binary


def test_a_needed_size_is_rounded_up_and_an_available_size_down() -> None:
    assert format_nbytes(10_000_001, rounding="up") == "10.1 MB"
    assert format_nbytes(10_099_999, rounding="down") == "10 MB"
    assert format_nbytes(999_001, rounding="up") == "1 MB"
    assert format_nbytes(1_100_000, rounding="up") == "1.1 MB"


@given(st.integers(0, 9 * 10**18), st.booleans(), st.sampled_from(get_args(Rounding)))
def test_a_formatted_size_can_be_parsed_within_its_three_digits(nbytes: int, binary: bool, rounding: Rounding) -> None:
    shown = format_nbytes(nbytes, binary=binary, rounding=rounding)
    again = parse_nbytes("--size", shown)
    # One unit of the third digit is at most a hundredth of the value; rounding to nearest halves the error. Parsing
    # drops a fraction of a byte.
    bound = Fraction(nbytes, 200 if rounding == "nearest" else 100) + 1
    assert abs(again - nbytes) <= bound
    assert rounding != "down" or again <= nbytes
    assert rounding != "up" or again + 1 > nbytes
