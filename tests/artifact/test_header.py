"""The strict header reader accepts only files that the safetensors library accepts, and reads the same from them.

If the library accepts a file that this reader rejects, the reason must be in a closed list.
"""

from __future__ import annotations

import copy
import json
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qformat.artifact import header
from qformat.artifact.header import Header
from qformat.artifact.tensor_spec import TensorSpec
from qformat.errors import ArtifactError, Reason
from tests.small_models import ELEMENT_NBYTES, header_bytes

Json = dict[str, Any]

STRICTER = {
    Reason.JSON_DUPLICATE_KEY: "a name that occurs twice: the library takes the last one in silence",
    Reason.JSON_LIMIT: "numbers of many digits and nesting that no header needs",
    Reason.HEADER_SYNTAX: "no tensor at all, and spaces before the first brace",
    Reason.HEADER_FIELD: "unknown fields of an entry, metadata that is null, and sizes beyond 2^48",
    Reason.HEADER_LIMIT: "names that are empty, too long or unprintable, and more than eight dimensions",
    Reason.UNSUPPORTED_DTYPE: "the sub-byte dtypes F4 and F6",
    Reason.ALIGNMENT: "elements at an offset that is not a multiple of their size",
    Reason.HEADER_LENGTH: "headers of more than 32 MiB",
}
"""Why a file that safetensors accepts is rejected. The list is closed: no other reason may appear."""

STRICTER_WITH_SOURCES = STRICTER.keys() - {Reason.ALIGNMENT, Reason.HEADER_SYNTAX}
"""Reasons that remain for files that are not shards of an artifact. HEADER_FIELD is only for sizes beyond 2^48."""


@pytest.fixture(scope="module")
def file() -> Iterator[Path]:
    """Return a file in memory, if the system has one, because it is written thousands of times."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".safetensors") as temporary:
        yield Path(temporary.name)


def read(path: Path, *, of_artifact: bool = True) -> Header | Reason:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return header.read(descriptor, path, error=ArtifactError, of_artifact=of_artifact)
    except ArtifactError as caught:
        error = caught
    finally:
        os.close(descriptor)
    assert error.path == str(path)
    assert len(str(error).encode("utf-8")) < 20_000
    return error.reason


def library_reads(data: bytes) -> dict[str, Json] | None:
    try:
        return dict(safetensors.deserialize(data))
    except safetensors.SafetensorError:
        return None


def check(path: Path, data: bytes, *, of_artifact: bool = True) -> Header | Reason:
    """Read the file with both readers and compare the results."""
    path.write_bytes(data)
    mine, theirs = read(path, of_artifact=of_artifact), library_reads(data)
    if isinstance(mine, Reason):
        allowed = STRICTER if of_artifact else STRICTER_WITH_SOURCES
        assert theirs is None or mine in allowed, f"safetensors reads it, and {mine} is not in the list of exceptions"
        return mine
    assert theirs is not None, "accepted here, refused by safetensors"
    assert mine.tensors.keys() == theirs.keys()
    for name, entry in mine.tensors.items():
        assert list(entry.shape) == theirs[name]["shape"]
        assert entry.dtype == theirs[name]["dtype"]
        assert data[entry.start : entry.stop] == bytes(theirs[name]["data"])
    assert mine.file_nbytes == len(data)
    return mine


NAMES = st.one_of(
    st.sampled_from(
        ["a", "b", "model.layers.0.mlp.down_proj.weight", "__metadata__", "", "🦙", "a\n", "\ud800", "x" * 513]
    ),
    st.text(max_size=6),
)
SIZES = st.one_of(st.integers(0, 5), st.sampled_from([2**31, 2**32, 2**48, 2**48 + 1, 2**63, 2**64 - 1, 2**64, -1]))
ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    SIZES,
    st.floats(-4, 40),
    st.text(max_size=3),
    st.lists(SIZES, max_size=3),
    st.builds(dict),
    st.builds(lambda: {"a": [1]}),
)


@st.composite
def valid_records(draw: st.DrawFn) -> tuple[Json, int]:
    """Draw a header as an object with its number of data bytes. Tensors have no gaps and may be aligned by chance."""
    names = draw(
        st.lists(
            st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=8),
            min_size=1,
            max_size=5,
            unique=True,
        )
    )
    record: Json = {}
    if draw(st.booleans()):
        record["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
    offset = 0
    for name in names:
        dtype = draw(st.sampled_from(sorted(ELEMENT_NBYTES)))
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        nbytes = ELEMENT_NBYTES[dtype]
        for size in shape:
            nbytes *= size
        record[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    if draw(st.booleans()):
        record = dict(draw(st.permutations(list(record.items()))))
    return record, offset


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    """Draw a valid file and change the object of its header, the text or the length field."""
    record, nbytes = draw(valid_records())
    record = copy.deepcopy(record)
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(list(record)))
        entry = record[name]
        match draw(st.integers(0, 9)):
            case 0:
                record[draw(NAMES)] = record.pop(name)
            case 1:
                record[draw(NAMES)] = copy.deepcopy(entry)
            case 2:
                record[name] = draw(ODD_VALUES)
            case 3 if len(record) > 1:
                del record[name]
            case 4 if isinstance(entry, dict):
                entry[draw(st.sampled_from(["dtype", "shape", "data_offsets", "more", ""]))] = draw(ODD_VALUES)
            case 5 if isinstance(entry, dict) and entry:
                del entry[draw(st.sampled_from(sorted(entry)))]
            case 6 if isinstance(entry, dict):
                entry["dtype"] = draw(
                    st.sampled_from(["F32", "BF16", "I8", "F4", "F6_E2M3", "F8_E8M0", "C64", "f32", "U64", "F99"])
                )
            case 7 if isinstance(entry, dict) and isinstance(entry.get("shape"), list):
                entry["shape"] = [*entry["shape"], draw(SIZES)]
            case 8 if isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list) and entry["data_offsets"]:
                offsets = entry["data_offsets"]
                offsets[draw(st.integers(0, len(offsets) - 1))] = draw(SIZES)
            case 9 if isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list):
                entry["data_offsets"] = [
                    offset + draw(st.integers(-2, 2)) if isinstance(offset, int) else offset
                    for offset in entry["data_offsets"]
                ]
    data = bytearray(header_bytes(record) + bytes(max(0, nbytes + draw(st.sampled_from([0, 0, 0, 0, -1, 1, 64])))))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        position = draw(st.integers(0, min(len(data), 300) - 1))
        match draw(st.integers(0, 4)):
            case 0:
                data[position] = draw(st.integers(0, 255))
            case 1:
                data[position : position + 1] = draw(
                    st.sampled_from([b"", b" ", b"0", b"-", b'"', b"[", b"}", b"\\u0061", b"1e", b".0", b"\xff"])
                )
            case 2:
                data[:8] = struct.pack(
                    "<Q", draw(st.sampled_from([0, 1, 2, 7, 8, 100, 2**25, 2**25 + 1, 2**63, 2**64 - 1]))
                )
            case 3:
                del data[position:]
                data = data or bytearray(b"\0")
            case 4:
                data += data[: draw(st.integers(0, 40))]
    return bytes(data)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(valid_records())
def test_a_valid_header_is_read_as_safetensors_reads_it(file: Path, drawn: tuple[Json, int]) -> None:
    record, nbytes = drawn
    found = check(file, header_bytes(record) + bytes(range(256))[: nbytes % 256] + bytes(nbytes - nbytes % 256))
    assert isinstance(found, Header) or found in {Reason.ALIGNMENT}
    assert isinstance(check(file, file.read_bytes(), of_artifact=False), Header)


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(mutated_files())
def test_safetensors_accepts_every_accepted_file_and_reads_the_same(file: Path, data: bytes) -> None:
    check(file, data)
    check(file, data, of_artifact=False)


@pytest.mark.slow
@settings(max_examples=30_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutated_files())
def test_safetensors_accepts_every_accepted_file_in_a_long_run(file: Path, data: bytes) -> None:
    check(file, data)
    check(file, data, of_artifact=False)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=100), st.booleans())
def test_any_bytes_are_rejected_or_read_without_a_crash(file: Path, data: bytes, framed: bool) -> None:
    check(file, struct.pack("<Q", len(data)) + data if framed else data)


def test_a_truncation_to_every_length_is_rejected(file: Path) -> None:
    whole = header_bytes({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}) + bytes(16)
    for nbytes in range(len(whole)):
        assert check(file, whole[:nbytes]) is Reason.TRUNCATED


A = '"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{" + A + "," + A + "}", Reason.JSON_DUPLICATE_KEY),
        ('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},' + A + "}", Reason.JSON_DUPLICATE_KEY),
        (" {" + A + "}", Reason.HEADER_SYNTAX),
        ("{" + A + ',"__metadata__":null}', Reason.HEADER_FIELD),
        ("{" + A[:-1] + ',"more":[]}}', Reason.HEADER_FIELD),
        ("{" + A.replace('"a"', '""') + "}", Reason.HEADER_LIMIT),
        ("{" + A.replace('"a"', '"' + "n" * 2**20 + '"') + "}", Reason.HEADER_LIMIT),
        ("{" + A.replace('"a"', '"a\\u0000b"') + "}", Reason.HEADER_LIMIT),
        ("{" + A.replace("[4]", "[4" + ",1" * 1000 + "]") + "}", Reason.HEADER_LIMIT),
        ('{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"F32","shape":[3],"data_offsets":[1,13]},'
         '"y":{"dtype":"U8","shape":[3],"data_offsets":[13,16]}}', Reason.ALIGNMENT),
        ("{" + A.replace("F32", "F4").replace("[4]", "[32]") + "}", Reason.UNSUPPORTED_DTYPE),
    ],
)  # fmt: skip
def test_dubious_files_that_the_library_accepts_are_rejected(text: str, reason: Reason, file: Path) -> None:
    data = text.encode()
    data = data.ljust(-(-len(data) // 8) * 8)
    whole = struct.pack("<Q", len(data)) + data + bytes(16)
    assert library_reads(whole) is not None
    assert check(file, whole) is reason


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (" \t\n{" + A + "}", 16),
        ("{" + A + ',"__metadata__":null}', 16),
        ("{" + A[:-1] + ',"more":[]}}', 16),
        (
            '{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"F64","shape":[1],"data_offsets":[1,9]}}',
            9,
        ),
        ("{" + A + "}" + " " * 5, 16),
        ("{}", 0),
    ],
)
def test_what_the_library_reads_is_read_from_a_file_that_is_not_of_an_artifact(
    text: str, nbytes: int, file: Path
) -> None:
    whole = struct.pack("<Q", len(text)) + text.encode() + bytes(range(nbytes))
    assert isinstance(check(file, whole, of_artifact=False), Header)


def test_an_empty_header_is_rejected(file: Path) -> None:
    assert check(file, struct.pack("<Q", 2) + b"{}") is Reason.HEADER_SYNTAX


def test_ninety_megabytes_of_spaces_are_rejected_without_reading_them(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 90 * 2**20) + b"{" + A.encode() + b"}")
    os.truncate(file, 8 + 90 * 2**20 + 16)
    assert read(file) is Reason.HEADER_LENGTH
    file.write_bytes(b"")


def test_a_built_header_can_be_read_and_its_data_begins_at_a_page() -> None:
    tensors = [
        TensorSpec("empty", "BF16", (0, 4)),
        TensorSpec("b", "F32", (3, 5)),
        TensorSpec("a", "U8", (7,)),
        TensorSpec("🦙", "BOOL", ()),
    ]
    text = header.build(tensors)
    assert len(text) % 4096 == 0
    assert struct.unpack("<Q", text[:8])[0] == len(text) - 8
    nbytes = sum(tensor.nbytes for tensor in tensors)
    parsed = header.parse(text[8:], file_nbytes=len(text) + nbytes, path=Path("x"), error=ArtifactError)
    assert [(entry.name, entry.dtype, entry.shape) for entry in parsed.tensors.values()] == [
        (tensor.name, tensor.dtype, tensor.shape) for tensor in tensors
    ]
    assert parsed.data_start == len(text)
    assert parsed.metadata == {"format": "pt"}
    assert json.loads(text[8:]).keys() == {"__metadata__", "empty", "b", "a", "🦙"}
