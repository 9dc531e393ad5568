"""spec/README.md agrees with the vectors and the code: rules, reason codes, limits, numbers and sections."""

from __future__ import annotations

import re
from itertools import chain

import pytest

from qformat import strict_json
from qformat.artifact import layout, limits, manifest
from qformat.codec import nf4, quant_state
from qformat.codec.codebooks import DYNAMIC_MAP, NF4_CODEBOOK, NF4_THRESHOLDS
from qformat.errors import Reason
from tests.spec import corpus

TEXT = corpus.SPEC.read_text("utf-8")
RULE = re.compile(r"`\[([A-Z]\d+)\]`")


def vectors() -> list[corpus.Vector]:
    return [*corpus.tensors(), *corpus.artifacts(), *corpus.edited()]


def section(number: str) -> str:
    """Return the text of one section, including its subsections."""
    start = TEXT.index(f"\n## {number}. ")
    end = TEXT.find("\n## ", start + 1)
    return TEXT[start : end if end >= 0 else len(TEXT)]


def test_every_rule_is_stated_once() -> None:
    rules = RULE.findall(TEXT)
    assert len(rules) >= 60
    assert sorted(rules) == sorted(set(rules))


def test_every_rule_has_a_vector_and_vectors_have_no_other_rules() -> None:
    assert {rule for vector in vectors() for rule in vector["rules"]} == set(RULE.findall(TEXT))


def test_every_vector_has_a_rule() -> None:
    unnamed = [vector["name"] for vector in vectors() if not vector["rules"]]
    assert set(unnamed) <= {"unchanged", "resealed"}


def reasons_in_the_text() -> tuple[list[str], list[str]]:
    """Return the codes of the table, and those that do not describe artifacts."""
    table, rest = section("9").split(
        "These codes belong to the same list, but do not describe the contents of an artifact:"
    )
    return re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE), re.findall(r"`(\w+)`", rest)


def test_the_reason_codes_are_those_of_the_code() -> None:
    about_artifacts, others = reasons_in_the_text()
    listed = about_artifacts + others
    assert sorted(listed) == sorted(set(listed))
    assert set(listed) == {reason.value for reason in Reason}


def test_every_reason_about_artifacts_has_a_vector() -> None:
    shown = {vector["reason"] for vector in corpus.edited() if vector["refused_by"] is not None}
    assert shown == set(reasons_in_the_text()[0])


@pytest.mark.parametrize(
    "number",
    [
        limits.MAX_HEADER_NBYTES,
        limits.MAX_MANIFEST_NBYTES,
        limits.MAX_INDEX_NBYTES,
        limits.MAX_CONFIG_NBYTES,
        limits.MAX_TEMPLATE_NBYTES,
        limits.MAX_SMALL_FILE_NBYTES,
        limits.MAX_NAME_NBYTES,
        limits.MAX_DIMENSIONS,
    ],
)
def test_section_9_has_the_limits_of_the_code(number: int) -> None:
    assert re.search(rf"(?<![\d,]){number:,}(?![\d,])", section("9"))


def test_other_numbers_are_those_of_the_code() -> None:
    assert limits.MAX_SIZE == 2**48
    assert f"At most {strict_json.MAX_DEPTH} objects" in section("8")
    assert f"at most {strict_json.MAX_INTEGER_DIGITS} characters" in section("8")
    assert f"at most {strict_json.MAX_FLOAT_LITERAL} characters" in section("8")
    assert f"n / {strict_json.MIN_NBYTES_PER_VALUE} values" in section("8")
    assert f"more\n  than {strict_json.MAX_VALUES:,}." in section("8")
    assert f"a quant_state {quant_state.MAX_NBYTES:,}" in section("8")
    assert f"{layout.MAX_TENSORS_PER_SHARD:,} tensors" in section("3")
    assert f"at most {layout.LARGEST_ALIGNMENT}" in section("3")
    assert f"multiple of {quant_state.ALIGNMENT} bytes" in section("5")
    assert f"an offset of {quant_state.LARGEST_OFFSET_LITERAL} characters" in section("5")
    assert ", ".join(map(str, nf4.BLOCK_SIZES[:-1])) + f" or {nf4.BLOCK_SIZES[-1]}" in section("4")
    assert f'`"{manifest.FORMAT_VERSION}"`' in section("7")
    assert f"version {manifest.FORMAT_VERSION}\n" in TEXT


def test_the_tables_of_numbers_are_those_of_the_code() -> None:
    import hashlib

    bits = re.findall(r"\b[0-9A-F]{8}\b", "\n".join(line for line in TEXT.splitlines() if line.startswith("    ")))
    expected = chain(NF4_CODEBOOK.view("<u4"), NF4_THRESHOLDS.view("<u4"))
    assert bits == [f"{value:08X}" for value in expected]
    assert f"{nf4.SMALLEST_DIVISOR.view('<u4'):08X}" in section("4")
    assert hashlib.sha256(NF4_CODEBOOK.tobytes()).hexdigest() in section("4")
    assert hashlib.sha256(DYNAMIC_MAP.tobytes()).hexdigest() in section("5")


def test_every_section_that_the_code_cites_exists() -> None:
    headings = set(re.findall(r"^##+ (\d+(?:\.\d+)?)", TEXT, re.MULTILINE))
    cited: set[str] = set()
    for folder in ("qformat", "converters", "tools"):
        for path in (corpus.ROOT / folder).rglob("*.py"):
            for numbers in re.findall(r"spec sections? ([\d., and]+)", path.read_text("utf-8")):
                cited |= set(re.findall(r"\d+(?:\.\d+)?", numbers))
    assert len(cited) >= 10
    assert cited <= headings
