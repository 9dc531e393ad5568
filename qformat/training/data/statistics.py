"""Counts the outcomes of tokenising. Each row counts once: as an example, as dropped, or as bad."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum

from qformat.strict_json import Json


class Dropped(StrEnum):
    """Reason why a usable row gives no example. The values are stable."""

    TOO_LONG = "too_long"
    CUT_TO_NOTHING = "cut_to_nothing"  # all trained tokens are beyond the limit
    NOTHING_TO_TRAIN = "nothing_to_train"  # no assistant turn, or only one token


_BY_NAME = frozenset({"dropped", "bad", "converted"})
"""Fields that hold several counts."""


@dataclass(frozen=True, slots=True)
class DataStatistics:
    """Counts of one tokenised data set: rows = examples + dropped + bad.

    Attributes:
        rows: Number of rows read.
        examples: Number of examples kept.
        tokens: Number of tokens in all examples.
        trained_tokens: Number of tokens that contribute to the loss. The first token of an example never does.
        longest: Number of tokens in the longest example, after truncation.
        truncated: Number of examples that were truncated and kept.
        dropped: Number of usable rows without an example, by reason (`Dropped`).
        bad: Number of unusable rows, by reason (`BadRow`).
        converted: Number of rows that were converted from another format, by its name.
    """

    rows: int
    examples: int
    tokens: int
    trained_tokens: int
    longest: int
    truncated: int
    dropped: Mapping[str, int]
    bad: Mapping[str, int]
    converted: Mapping[str, int]

    def to_json(self) -> dict[str, Json]:
        """Return the counts as JSON, with the reasons sorted by name."""
        record: dict[str, Json] = asdict(self)
        return record | {name: dict(sorted(getattr(self, name).items())) for name in _BY_NAME}

    @classmethod
    def from_json(cls, record: Json) -> DataStatistics:
        """Read the result of `to_json`.

        Raises:
            ValueError: The record does not have this form.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(record, dict) or set(record) != names:
            raise ValueError("the record does not hold the statistics of a data set")
        counts = {name: _count(record[name]) for name in names - _BY_NAME}
        return cls(**counts, **{name: _counts(record[name]) for name in _BY_NAME})  # type: ignore[arg-type]


def _count(value: Json) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"expected a count, got {value!r}")
    return value


def _counts(value: Json) -> dict[str, int]:
    if not isinstance(value, dict):
        raise ValueError("expected counts by reason")
    return {reason: _count(count) for reason, count in value.items()}
