"""The error tree and the stable reason codes."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from qformat import errors
from qformat.errors import (
    AdapterError,
    ArtifactError,
    BackendError,
    DataError,
    DeviceMemoryError,
    DivergenceError,
    HubError,
    Interrupted,
    InvalidFileError,
    Option,
    QformatError,
    Reason,
    SourceError,
    TargetError,
    UsageError,
    VerificationError,
    on_lines,
    spelled,
)


def test_the_tree_is_the_one_that_the_docstring_draws() -> None:
    bases = {
        UsageError: QformatError,
        BackendError: UsageError,
        InvalidFileError: QformatError,
        SourceError: InvalidFileError,
        ArtifactError: InvalidFileError,
        DataError: QformatError,
        HubError: QformatError,
        TargetError: QformatError,
        VerificationError: QformatError,
        DeviceMemoryError: QformatError,
        AdapterError: QformatError,
        DivergenceError: QformatError,
        Interrupted: QformatError,
    }
    for child, parent in bases.items():
        assert child.__bases__ == (parent,)
        assert child.__name__ in str(errors.__doc__)
    classes = {name for name, member in inspect.getmembers(errors, inspect.isclass) if issubclass(member, QformatError)}
    assert classes == {child.__name__ for child in bases} | {"QformatError"}


def test_reason_codes_are_the_lower_case_names() -> None:
    for reason in Reason:
        assert reason.value == reason.name.lower()


def test_every_reason_code_is_used() -> None:
    root = Path(errors.__file__).parent
    text = "".join(
        path.read_text()
        for folder in (root, root.parent / "converters")
        for path in folder.rglob("*.py")
        if path.name != "errors.py"
    )
    assert [reason for reason in Reason if f"Reason.{reason.name}" not in text] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "f.json: broken"),
        ({"tensor": "a.b"}, "f.json: tensor 'a.b': broken"),
        ({"field": "x"}, "f.json: field 'x': broken"),
        ({"tensor": "a", "field": "x", "next_step": "Fix it"}, "f.json: tensor 'a': field 'x': broken. Fix it"),
        ({"tensor": "a\nb\u202e"}, "f.json: tensor 'a\\nb\\u202e': broken"),
    ],
)
def test_a_message_has_the_file_tensor_field_problem_and_next_step(arguments: dict[str, str], message: str) -> None:
    error = SourceError(Reason.JSON_SYNTAX, Path("f.json"), "broken", **arguments)
    assert str(error) == message
    assert error.reason is Reason.JSON_SYNTAX
    assert (error.path, error.tensor, error.field) == ("f.json", arguments.get("tensor"), arguments.get("field"))


def test_a_message_shows_options_as_python_arguments_and_keeps_them_as_values() -> None:
    error = UsageError(
        "out: holds something. Use ", Option("force_it", True), ", ", Option("rank"), " or ", Option("to", "x")
    )
    assert str(error) == "out: holds something. Use force_it=True, rank or to='x'"
    assert spelled(error.words, lambda option: option.name.upper()) == "out: holds something. Use FORCE_IT, RANK or TO"


@pytest.mark.parametrize("error", [
    SourceError(Reason.TRUNCATED, "f.bin", "broken", next_step=("Try ", Option("keep_source", True))),
    HubError("f.bin", "broken", next_step=("Try ", Option("keep_source", True))),
    DataError("empty", "f.bin", "broken", place=None, next_step=("Try ", Option("keep_source", True))),
])  # fmt: skip
def test_a_next_step_may_contain_options(error: SourceError | HubError | DataError) -> None:
    assert str(error) == "f.bin: broken. Try keep_source=True"
    assert error.next_step == "Try keep_source=True"
    assert spelled(error.words, lambda option: "...") == "f.bin: broken. Try ..."


def test_the_next_step_of_a_data_error_can_be_extended() -> None:
    error = DataError("empty", "f.jsonl", "is empty", place="line 2", next_step=("Try ", Option("rank")))
    longer = error.advising(" or ", Option("too_long", "drop"))
    assert str(longer) == "f.jsonl: line 2: is empty. Try rank or too_long='drop'"
    assert (longer.reason, longer.path, longer.problem, longer.place) == ("empty", "f.jsonl", "is empty", "line 2")
    assert longer.next_step == "Try rank or too_long='drop'"
    assert spelled(longer.words, lambda option: option.name.upper()).endswith("Try RANK or TOO_LONG")


def test_control_characters_in_a_message_are_escapes() -> None:
    error = SourceError(Reason.HEADER_FIELD, "a\nb\x1b[2J", "got \u202e\n", tensor="t\x9b", next_step="Do \x07")
    assert str(error) == r"a\nb\x1b[2J: tensor 't\x9b': got \u202e\n. Do \x07"
    assert error.path == "a\nb\x1b[2J"
    assert str(VerificationError("found:", *on_lines(["a\nb", "c"]))) == "found:\na\\nb\nc"


def test_a_message_does_not_grow_with_values_and_names() -> None:
    large = "x" * 10**6
    error = SourceError(Reason.HEADER_FIELD, large, f"expected 1, got {large!r}", tensor=large, field=large)
    assert "(1,000,000 characters)" in str(error)
    assert len(str(error)) < 3000
    for message in (
        str(DataError("not_json", large, large, place=large, next_step=large)),
        str(HubError(large, large, next_step=large)),
        str(UsageError(large)),
    ):
        assert len(message) < 4000
