"""What tokenising made of the rows: counts, each row in exactly one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum

from qformat.strict_json import Json


class Dropped(StrEnum):
    """Why a good row gives no example. The values are stable."""

    TOO_LONG = "too_long"
    CUT_TO_NOTHING = "cut_to_nothing"  # all trained tokens lay behind the limit
    NOTHING_TO_TRAIN = "nothing_to_train"  # no turn of the assistant, or a single token


@dataclass(frozen=True, slots=True)
class DataStatistics:
    """Counts of one tokenised data set: rows = examples + dropped + bad.

    trained_tokens: those that are predicted; the first token of an example never is.
    longest: tokens of the longest example that is kept, after truncation.
    truncated: examples that were cut at the limit and kept.
    """

    rows: int
    examples: int
    tokens: int
    trained_tokens: int
    longest: int
    truncated: int
    dropped: Mapping[str, int]
    bad: Mapping[str, int]

    def to_json(self) -> dict[str, Json]:
        """Return the counts as JSON, reasons sorted by name."""
        record: dict[str, Json] = asdict(self)
        return record | {"dropped": dict(sorted(self.dropped.items())), "bad": dict(sorted(self.bad.items()))}

    @classmethod
    def from_json(cls, record: Json) -> DataStatistics:
        """Read what `to_json` wrote. Raises ValueError for anything else."""
        names = {field.name for field in fields(cls)}
        if not isinstance(record, dict) or set(record) != names:
            raise ValueError("not the statistics of a data set")
        counts = {name: _count(record[name]) for name in names - {"dropped", "bad"}}
        return cls(**counts, dropped=_counts(record["dropped"]), bad=_counts(record["bad"]))


def _count(value: Json) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _counts(value: Json) -> dict[str, int]:
    if not isinstance(value, dict):
        raise ValueError("not counts by reason")
    return {reason: _count(count) for reason, count in value.items()}
