"""The table of `docs/programs.md` is the one that the tests hold."""

from __future__ import annotations

import re

from tests.clients.peft_methods.methods import REFUSED, WORKING
from tests.repository import ROOT

PAGE = (ROOT / "docs" / "programs.md").read_text(encoding="utf-8")


def listed(verdict: str) -> list[str]:
    """Return the methods in the row of a verdict."""
    row = re.search(rf"^\| {verdict} \| (.*) \|$", PAGE, re.MULTILINE)
    assert row is not None
    return row[1].split(", ")


def test_the_methods_that_work_are_those_that_are_tested() -> None:
    assert listed("work") == list(dict.fromkeys(method.name for method in WORKING))


def test_the_refused_methods_are_those_that_are_tested() -> None:
    assert listed("are refused") == [refused.method.name for refused in REFUSED]


def test_the_page_names_the_release_of_peft_that_was_tested() -> None:
    constraints = (ROOT / ".ci" / "constraints.txt").read_text()
    release = re.search(r"^peft==(\d+\.\d+)", constraints, re.MULTILINE)
    assert release is not None
    assert f"methods of PEFT {release[1]} |" in PAGE
