"""docs/troubleshooting.md explains every class of error and every reason code, once, and no others."""

from __future__ import annotations

import inspect
import re
from collections import Counter

from qformat import errors
from tests.repository import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
ROW = re.compile(r"^\| `(?P<subject>\w+)` \| (?P<meaning>[^|]+) \| (?P<advice>[^|]+) \|$", re.MULTILINE)


def rows_under(heading: str) -> list[re.Match[str]]:
    """Return the rows that explain a class or a code, below a heading of the second level."""
    sections = PAGE.read_text(encoding="utf-8").split("\n## ")
    (section,) = [section for section in sections if section.startswith(heading + "\n")]
    return list(ROW.finditer(section))


def test_every_reason_code_is_explained_once() -> None:
    explained = Counter(row["subject"] for row in rows_under("Reason codes"))
    assert explained == Counter(reason.value for reason in errors.Reason)


def test_every_class_of_error_is_explained_once() -> None:
    classes = inspect.getmembers(errors, inspect.isclass)
    expected = [name for name, value in classes if issubclass(value, errors.QformatError)]
    assert Counter(row["subject"] for row in rows_under("Classes of errors")) == Counter(expected)


def test_every_explanation_says_what_it_means_and_what_to_do() -> None:
    rows = [*rows_under("Classes of errors"), *rows_under("Reason codes")]
    for row in rows:
        assert row["meaning"].strip(), row["subject"]
        assert row["advice"].strip(), row["subject"]
