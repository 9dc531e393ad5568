"""Mistakes that are found without running a page."""

from __future__ import annotations

import pytest

from tools.docs.check import repository
from tools.docs.examples.page import Command, parse
from tools.docs.examples.rules import Repository, findings, is_run, makefile_targets

KNOWN = Repository(frozenset({"demo", "test"}), frozenset({"models", "sign"}))


def found(page: str) -> list[tuple[int, str]]:
    return [(finding.line, finding.text) for finding in findings(parse(page), KNOWN)]


def console(*lines: str) -> str:
    return "\n".join(["```console", *lines, "```", ""])


@pytest.mark.parametrize(
    "page",
    [
        console("$ make demo", "$ make test PYTHON=python3.12   # a comment", "$ make -s demo"),
        console("$ pip install '.[models,sign]'", "$ python -m pip install 'qformat[models]' httpx", "$ pip install ."),
        console("$ cd somewhere && qformat info"),
        "    an indented block without a command\n",
        "```text\nplain text\n```\n",
        "<!-- not run: needs a GPU -->\n" + console("$ make nothing"),
    ],
)
def test_pages_without_a_mistake(page: str) -> None:
    assert found(page) == []


@pytest.mark.parametrize(
    ("page", "line", "text"),
    [
        (console("$ make demos"), 2, "the Makefile has no target 'demos'"),
        (console("$ pip install '.[model]'"), 2, "pyproject.toml has no extra 'model'"),
        (console("$ pip install 'qformat[models,x]'"), 2, "pyproject.toml has no extra 'x'"),
        (console("text"), 1, "a console block without a command: commands begin with `$ `"),
        (console("text", "$ one"), 1, "text before the first command is not compared: 'text'"),
        (console("$ cd somewhere"), 2, "'cd somewhere' has no effect: each command runs in a shell of its own"),
        (console("$ one \\"), 2, "the command ends in a backslash, and no line follows"),
        ("<!-- setup\n-->\n", 1, "a setup without a command: commands begin with `$ `"),
        ("<!-- not run -->\n" + console("$ one"), 2, "`not run` needs a reason: why, and which test runs it instead"),
        ("<!-- exits 1 -->\n" + console("$ one"), 2, "the comment before this block has no meaning here: 'exits 1'"),
        ("```\n$ one\n```\n", 1, "a command in a block that is not run: use ```console"),
        ("```text\n$ one\n```\n", 1, "a command in a block that is not run: use ```console"),
        ("text\n\n    $ one\n", 3, "a command in a block that is not run: use ```console"),
        ("```bash\none\n```\n", 1, "a bash block is not run: use ```console and `$ ` before each command"),
        ("1. a\n\n   ```console\n   $ one\n   ```\n", 3, "a console block in a list item is not run: do not indent it"),
        ('```toml title="../a"\n```\n', 1, "title '../a': expected a path inside the working directory"),
        ('```python title="a.py"\n```\n', 1, "a Python block with a title is not run: leave the title out"),
    ],
)
def test_mistakes_are_reported_with_their_line(page: str, line: int, text: str) -> None:
    assert found(page) == [(line, text)]


@pytest.mark.parametrize(
    "text", ["make demo", "make test PYTHON=python3.12", "pip install .", "python -m pip install ."]
)
def test_commands_that_set_up_a_machine_are_not_run(text: str) -> None:
    assert not is_run(Command(1, text))


def test_targets_and_extras_of_this_repository() -> None:
    assert makefile_targets(".PHONY: one two\none:\n\ttrue\n") == {"one", "two"}
    known = repository()
    assert {"demo", "test", "docs", "docs-check"} <= known.targets
    assert {"models", "dev", "docs"} <= known.extras
