"""The strict JSON parser: what is valid, what is rejected and why, and how much memory a hostile file can cost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qformat import strict_json
from qformat.errors import ArtifactError, Reason, SourceError
from tests.repository import ROOT


def loads(data: bytes, *, max_nbytes: int = 2**20) -> strict_json.Json:
    return strict_json.loads(data, path="file.json", max_nbytes=max_nbytes, error=ArtifactError)


def refusal(data: bytes, *, max_nbytes: int = 2**20) -> ArtifactError:
    with pytest.raises(ArtifactError) as refused:
        loads(data, max_nbytes=max_nbytes)
    assert refused.value.path == "file.json"
    assert len(str(refused.value)) < 1000
    str(refused.value).encode("utf-8")
    return refused.value


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"{}", {}),
        (b" [1, 2.5, -3, null, true, false] \n", [1, 2.5, -3, None, True, False]),
        (b'"text"', "text"),
        (b"0", 0),
        (b"1e3", 1000.0),
        (b"99999999999999999999", 99999999999999999999),
        (b"-9999999999999999999", -9999999999999999999),
        (b"5e-324", 5e-324),
        (b"1e-999", 0.0),
        ('{"ö🦙": "\\ud83e\\udd99"}'.encode(), {"ö🦙": "🦙"}),
        (b'"\\\\ud800"', "\\ud800"),
        (b'"\\u0000\\u007f"', "\0\x7f"),
        (b'{"a": {"a": {"a": 1}}}', {"a": {"a": {"a": 1}}}),
        (b"[" * 32 + b"]" * 32, None),
    ],
)
def test_valid_json_is_read(data: bytes, value: object) -> None:
    found = loads(data)
    if value is not None:
        assert found == value
        assert type(found) is type(value)


SYNTAX = [
    b"", b" ", b"\0", b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", b"{", b"}", b"{} {}", b"{}x", b"{}\0", b"[1,]",
    b'{"a":1,}', b"{a:1}", b"{'a':1}", b"// comment\n{}", b"/* */{}", b"NaN", b"Infinity", b"-Infinity",
    b"[NaN]", b"nan", b"True", b"None", b"01", b"+1", b".5", b"1.", b"0x10", b"1_000", b"--1", b"-", b'"',
    b'"a', b"'a'", b'"\n"', b'"\t"', b'"\\x41"', b'"\\u12"', b'"\x1f"', b'"\xc3"', b'"\xc0\x80"',
    b'"\xed\xa0\x80"', b'"\xf4\x90\x80\x80"', b"\xa0{}", b"\xe2\x80\xa8{}", b"\x0b{}", "１".encode(),
]  # fmt: skip


@pytest.mark.parametrize("data", SYNTAX)
def test_invalid_json_is_rejected(data: bytes) -> None:
    assert refusal(data).reason is Reason.JSON_SYNTAX


@pytest.mark.parametrize(
    "data",
    [
        b'"\\ud800"',
        b'"\\uDFFF"',
        b'"\\udc00\\ud800"',
        b'"\\ud800\\u0041"',
        b'"\\ud83e \\udd99"',
        b'{"\\ud800": 1}',
        b'[["a", {"b": "\\udbff"}]]',
        b'{"fine": "\\ud83e\\udd99", "not": "\\ud83e"}',
    ],
)
def test_half_a_surrogate_pair_is_rejected_because_it_cannot_be_written_or_printed(data: bytes) -> None:
    error = refusal(data)
    assert error.reason is Reason.JSON_SYNTAX
    assert "surrogate" in str(error)


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": 1, "a": 1}',
        b'{"a": 1, "b": 2, "\\u0061": 3}',
        b'[{"x": {"": 0, "": 0}}]',
        b'{"\\ud83e\\udd99": 0, "\xf0\x9f\xa6\x99": 1}',
    ],
)
def test_a_duplicate_key_is_rejected_at_every_level(data: bytes) -> None:
    assert refusal(data).reason is Reason.JSON_DUPLICATE_KEY


@pytest.mark.parametrize(
    "data",
    [
        b"100000000000000000000",
        b"-10000000000000000000",
        b"1" * 5000,
        b"1e999",
        b"-1e400",
        b"[1.7976931348623159e308]",
        b"0." + b"1" * 63,
        b"1e" + b"0" * 100 + b"1",
        b"[" * 33 + b"]" * 33,
        b'{"a":' * 33 + b"1" + b"}" * 33,
        b"[" * 100_000,
        b'["]"' + b",[" * 40 + b"]" * 41,
        b'["\\"", ' + b"[" * 40 + b"]" * 41,
    ],
)
def test_numbers_and_depths_beyond_the_limits_are_rejected(data: bytes) -> None:
    assert refusal(data).reason is Reason.JSON_LIMIT


def test_brackets_and_quotes_inside_strings_do_not_count_as_depth() -> None:
    text = '["' + "[{" * 100 + '", "\\"[[[[", "\\\\", [["]]"]]]'
    assert loads(text.encode()) == ["[{" * 100, '"[[[[', "\\", [["]]"]]]


def test_a_text_is_accepted_at_the_size_limit_and_rejected_one_byte_past_it() -> None:
    data = b'"' + b"x" * 98 + b'"'
    assert loads(data, max_nbytes=100) == "x" * 98
    assert refusal(data + b" ", max_nbytes=100).reason is Reason.JSON_LIMIT


def test_one_value_per_sixteen_bytes_of_the_limit_is_accepted() -> None:
    at_limit = b"[" + b",".join([b"1"] * 62) + b"]"
    assert loads(at_limit, max_nbytes=1024) == [1] * 62
    one_more = b"[" + b",".join([b"1"] * 64) + b"]"
    assert refusal(one_more, max_nbytes=1024).reason is Reason.JSON_LIMIT


def test_minus_zero_is_a_float_as_in_other_parsers() -> None:
    assert type(loads(b"-0")) is float


def test_the_error_has_the_tensor_if_there_is_one() -> None:
    with pytest.raises(SourceError, match=r"x.json: tensor 'w': .*not valid JSON") as refused:
        strict_json.loads(b"{", path=Path("x.json"), max_nbytes=100, error=SourceError, tensor="w")
    assert refused.value.tensor == "w"


def test_written_json_can_be_parsed_and_has_no_nan() -> None:
    value = {"b": [1, -2.5, None, True], "a": {"ö🦙": "\x7f\u2028"}}
    assert strict_json.dumps(value) == '{"b":[1,-2.5,null,true],"a":{"ö🦙":"\x7f\u2028"}}'
    assert loads(strict_json.dumps(value, indent=2).encode()) == value
    with pytest.raises(ValueError, match="JSON"):
        strict_json.dumps(float("nan"))


def reference(data: bytes) -> object:
    """Return the result of the standard parser without its extensions."""

    def refuse(text: str) -> object:
        raise ValueError(text)

    return json.loads(data.decode("utf-8"), parse_constant=refuse)


JSON_TEXT = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
).map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


@settings(max_examples=600, deadline=None, derandomize=True)
@given(JSON_TEXT, st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=3))
def test_damaged_json_is_parsed_as_by_the_standard_parser_or_rejected(
    data: bytes, edits: list[tuple[int, int]]
) -> None:
    changed = bytearray(data)
    for position, byte in edits:
        if changed:
            changed[position % len(changed)] = byte
    try:
        found = loads(bytes(changed))
    except ArtifactError as caught:
        reason = caught.reason
    else:
        assert found == reference(bytes(changed))
        return
    assert edits or reason is Reason.JSON_LIMIT  # the number has more than 64 characters


@settings(max_examples=600, deadline=None, derandomize=True)
@given(st.binary(max_size=64) | st.text('[]{}",:\\u0123d8 -.eEntrfals\n', max_size=64).map(str.encode))
def test_any_bytes_are_parsed_or_rejected_without_a_crash(data: bytes) -> None:
    try:
        found = loads(data)
    except ArtifactError as caught:
        reason = caught.reason
    else:
        assert found == reference(data)
        return
    assert reason in {Reason.JSON_SYNTAX, Reason.JSON_LIMIT, Reason.JSON_DUPLICATE_KEY}


BOMBS = {
    "one long string": "b'{\"' + b\"a\" * n + b'\":1}'",
    "a string that does not end": 'b\'["\' + b"a" * n',
    "a string of escapes": "b'{\"' + b\"\\\\n\" * (n // 2) + b'\":1}'",
    "backslashes": 'b\'["\' + b"\\\\" * n',
    "quotes": 'b"[" + b\'"\' * n',
    "empty lists": 'b"[" + b"[]," * (n // 3) + b"1]"',
    "empty objects": 'b"[" + b"{}," * (n // 3) + b"1]"',
    "brackets": 'b"[]" * (n // 2)',
    "integers": 'b"[" + b"1," * (n // 2) + b"1]"',
    "commas": 'b"[" + b"," * n',
    "many keys": 'b"{" + b",".join(b\'"%d":1\' % i for i in range(n // 12)) + b"}"',
    "spaces": 'b" " * n',
    "digits": 'b"1" * n',
}

MEASURE = """
import resource, sys
from qformat import strict_json
from qformat.errors import ArtifactError
n = 30 * 2**20
data = {expression}
assert n // 2 < len(data) <= 2**25
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    strict_json.loads(data, path="x", max_nbytes=2**25, error=ArtifactError)
except ArtifactError:
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("bomb", BOMBS)
def test_thirty_megabytes_of_hostile_json_cost_at_most_a_few_hundred_megabytes(bomb: str) -> None:
    """Runs in a separate process to measure its peak memory. The time limit is far above the actual time."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE.format(expression=BOMBS[bomb])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert int(result.stdout) < 300 * 1024  # KiB


# The numbers of Python's json module, and everything else that it reads


PYTHON_TEXTS: dict[bytes, list[str]] = {
    b'{"a": [0.0, Infinity]}': ["contains Infinity"],
    b"[-Infinity, NaN, -Infinity]": ["contains -Infinity", "contains NaN"],
    b'{"model_max_length": 1000000000000000019884624838656}': ["contains an integer of 31 digits"],
    b"-" + b"9" * 4299: ["contains an integer of 4300 digits"],
    b'{"a": 1, "b": 2, "a": 3}': ["contains the key 'a' 2 times; the last value counts"],
    b'{"x": {"": 0, "": 0, "": 5}, "x": {"": 1}}': ["contains the key '' 3 times", "contains the key 'x' 2 times"],
    b'{"a": 1}': [],
}


@pytest.mark.parametrize("data", PYTHON_TEXTS)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_text_of_a_source_is_read_as_python_reads_it_and_remarked_on(data: bytes, mark: bytes) -> None:
    remarks: list[str] = []
    found = strict_json.loads(mark + data, path="f", max_nbytes=2**20, error=SourceError, remarks=remarks)
    assert repr(found) == repr(json.loads(data))
    expected = ["begins with a byte order mark"] * bool(mark) + PYTHON_TEXTS[data]
    assert len(remarks) == len(expected)
    assert all(remark.startswith(begin) for remark, begin in zip(remarks, expected, strict=True))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a": 1, "a": 1}', Reason.JSON_DUPLICATE_KEY),
        (b"\xef\xbb\xbf{}", Reason.JSON_SYNTAX),
        (b"[nan]", Reason.JSON_SYNTAX),
        (b"[1e999]", Reason.JSON_LIMIT),
        (b"1" * 4301, Reason.JSON_LIMIT),
        (b'"\\ud800"', Reason.JSON_SYNTAX),
        (b"[" * 33 + b"]" * 33, Reason.JSON_LIMIT),
    ],
)
def test_python_numbers_are_the_only_exception_in_a_config(data: bytes, reason: Reason) -> None:
    with pytest.raises(ArtifactError) as refused:
        strict_json.loads(data, path="f", max_nbytes=2**20, error=ArtifactError, python_numbers=True)
    assert refused.value.reason is reason
    assert loads(b"[1]") == [1]


def test_python_numbers_survive_writing_and_reading() -> None:
    value = {"a": [float("inf"), -float("inf"), 10**30], "b": 10**4299}
    text = strict_json.dumps(value, python_numbers=True).encode()
    assert strict_json.loads(text, path="f", max_nbytes=2**20, error=ArtifactError, python_numbers=True) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        strict_json.dumps(value)


def test_no_text_of_any_size_has_more_than_the_largest_number_of_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "MAX_VALUES", 100)
    largest = b"[" + b"0," * 98 + b"0]"
    assert loads(largest, max_nbytes=2**40) == [0] * 99
    monkeypatch.setattr(strict_json, "_DECODER", None)  # counted before anything is parsed
    error = refusal(b"[" + b"0," * 99 + b"0,0]", max_nbytes=2**40)
    assert error.reason is Reason.JSON_LIMIT
    assert "102 values (the limit is 100)" in str(error)
