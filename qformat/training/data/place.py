"""The origin of a row of training data, and the reasons why a row cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NoReturn

from qformat import strict_json
from qformat.errors import DataError, InvalidFileError, SourceError, Words
from qformat.strict_json import Json

CORRECT_IT = "Correct it"

MAX_ROW_NBYTES = 16 * 2**20
"""Largest size of a row in bytes, in every format: room for several million words. Without a limit, a file that has no
line breaks would be read into memory as a single line."""


class BadRow(StrEnum):
    """Reason why a row cannot be used. The values are stable, because statistics count by them."""

    NOT_UTF8 = "not_utf8"
    NOT_JSON = "not_json"
    NOT_AN_OBJECT = "not_an_object"
    NO_KNOWN_FIELD = "no_known_field"
    WRONG_TYPE = "wrong_type"
    EMPTY = "empty"
    TOO_LARGE = "too_large"
    TEMPLATE_REFUSED = "template_refused"
    UNSTABLE_TEMPLATE = "unstable_template"
    LOST_CONTENT = "lost_content"
    DAMAGED_FILE = "damaged_file"  # concerns the whole file and is never skipped


@dataclass(frozen=True, slots=True)
class Place:
    """Origin of a row, such as line 17 of train.jsonl.

    Attributes:
        path: File that holds the row.
        unit: "line", "row" or "entry".
        number: Number of the line, row or entry, counted from 1.
    """

    path: Path
    unit: str
    number: int

    def refuse(self, reason: BadRow, problem: str, *, next_step: str | Words = CORRECT_IT) -> NoReturn:
        """Raise a DataError for this row.

        Args:
            reason: Why the row cannot be used.
            problem: What is wrong, in words.
            next_step: What the user can do about it.

        Raises:
            DataError: Always.
        """
        raise DataError(reason, self.path, problem, place=f"{self.unit} {self.number}", next_step=next_step) from None


def refuse_large(place: Place, max_nbytes: int) -> NoReturn:
    """Raise the DataError for a row beyond the limit.

    Args:
        place: Origin of the row.
        max_nbytes: Largest size of a row in bytes.

    Raises:
        DataError: Always.
    """
    place.refuse(
        BadRow.TOO_LARGE,
        f"is longer than {max_nbytes:,} bytes, the limit of a row",
        next_step="Divide it into several rows",
    )


def json_in_string(value: str, name: str, place: Place) -> Json:
    """Return the value of a field that holds JSON as text.

    Args:
        value: The text.
        name: Name of the field, for messages.
        place: Origin of the row.

    Returns:
        The decoded value.

    Raises:
        DataError: The text is not valid JSON.
    """
    data = value.encode("utf-8", errors="surrogatepass")
    try:
        return strict_json.loads(data, path="", max_nbytes=json_limit(data), error=SourceError)
    except InvalidFileError as refused:
        place.refuse(BadRow.WRONG_TYPE, f"{name}: {refused.problem}")


def json_limit(data: bytes) -> int:
    """Return the size limit for the JSON loader, which also limits the number of values by it. A short line may have
    many values for its size, so the limit has a lower bound.
    """
    return max(len(data), 2**16)


def kind_of(value: Json) -> str:
    """Return the type of a value in words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    # Parquet has more types than JSON, such as dates and bytes.
    return {str: "a string", list: "a list", dict: "an object"}.get(type(value), type(value).__name__)
