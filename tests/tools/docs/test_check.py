"""Pages are run for real: what a page shows is what its commands print."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.repository import ROOT
from tools.docs.check import all_pages, check_page
from tools.docs.examples.rewriting import corrected
from tools.docs.examples.running import Correction

# The examples of README.md run with every change, those of the other pages with the long tests.
PAGES = [
    pytest.param(
        page, id=page.relative_to(ROOT).as_posix(), marks=[] if page.name == "README.md" else [pytest.mark.slow]
    )
    for page in all_pages()
]

PACKAGES = {"programs.md": ("lightning", "lm_eval", "sentence_transformers")}
"""Packages that a page needs in addition to those of the extra `dev`."""


@pytest.fixture
def small_source(tmp_path: Path) -> Path:
    """A source of one file: these tests are about the check and read no model."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "llama"}\n')
    return source


def written(tmp_path: Path, text: str) -> Path:
    page = tmp_path / "page.md"
    page.write_text(text)
    return page


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_do_what_it_shows(page: Path, smollm2: Path) -> None:
    for package in PACKAGES.get(page.name, ()):
        pytest.importorskip(package, reason="the extra 'clients' is not installed: make test-slow")
    found = check_page(page, smollm2)
    assert not found, "\n\n".join(f"{page.relative_to(ROOT)}:{finding.line}: {finding.text}" for finding in found)


AGREES = """
<!-- setup
$ echo hidden > made
-->

```console
$ cat made
hidden
$ cat made | tr a-z A-Z; echo "to stderr" >&2; echo last
HIDDEN
...
last
```

```json title="folder/settings.json"
{}
```

<!-- exits with 3 -->
```console
$ cat folder/settings.json SmolLM2-135M-Instruct/config.json
{}
{"model_type": "llama"}
$ pwd; echo "$HF_ENDPOINT"; exit 3
/home/me/models
https://huggingface.co
```

```python
from huggingface_hub import HfApi

print(HfApi().whoami()["name"], HfApi().model_info("HuggingFaceTB/SmolLM2-135M-Instruct").id)
```

```text
user HuggingFaceTB/SmolLM2-135M-Instruct
```

```console
$ yes | head -n 1
y
```
"""


def test_a_page_that_agrees(tmp_path: Path, small_source: Path) -> None:
    assert check_page(written(tmp_path, AGREES), small_source) == []


@pytest.mark.parametrize(
    ("page", "line", "texts"),
    [
        ("```console\n$ echo new\nold\n```\n", 2, ["echo new", "-old", "+new"]),
        ("```console\n$ echo text; false\ntext\n```\n", 2, ["exit code 1, expected 0", "text"]),
        ("```console\n$ false | cat\n```\n", 2, ["exit code 1, expected 0"]),
        ("<!-- exits with 1 -->\n```console\n$ true\n```\n", 3, ["exit code 0, expected 1"]),
        ("<!-- setup\n$ true\n$ cat missing\n-->\n", 3, ["exit code 1, expected 0", "missing: No such file"]),
        ("```python\nprint(1)\n```\n```text\n2\n```\n", 1, ["-2", "+1"]),
        ("```python\nraise ValueError('text')\n```\n", 1, ["exit code 1, expected 0", "ValueError: text"]),
        ("```\n$ touch made\n```\n", 1, ["a command in a block that is not run"]),
    ],
)
def test_what_does_not_agree_is_reported(
    tmp_path: Path, small_source: Path, page: str, line: int, texts: list[str]
) -> None:
    (finding,) = check_page(written(tmp_path, page), small_source)
    assert finding.line == line
    for text in texts:
        assert text in finding.text


def test_blocks_that_are_not_run(tmp_path: Path, small_source: Path) -> None:
    page = (
        "<!-- not run: needs a GPU -->\n```console\n$ false\n```\n\n"
        "```console\n$ make demo\n$ pip install '.[models]'\n```\n"
    )
    assert check_page(written(tmp_path, page), small_source) == []


def test_an_update_replaces_what_differs_and_leaves_the_rest(tmp_path: Path, small_source: Path) -> None:
    page = written(
        tmp_path,
        "```console\n$ echo 1 s\n2 s\n$ printf 'a\\nb\\n'\nold\n\n$ true\nnothing\n```\n\n"
        "```python\nprint(1)\n```\n\n```text\n```\n",
    )
    assert check_page(page, small_source, update=True) == []
    assert page.read_text() == (
        "```console\n$ echo 1 s\n2 s\n$ printf 'a\\nb\\n'\na\nb\n\n$ true\n```\n\n"
        "```python\nprint(1)\n```\n\n```text\n1\n```\n"
    )
    assert check_page(page, small_source) == []


@pytest.mark.parametrize("block", ["$ printf 'a\\nc\\n'\na\n...\nb", "$ echo '$ x'\nold", "$ false\nold"])
def test_an_update_leaves_what_only_a_person_can_mend(tmp_path: Path, small_source: Path, block: str) -> None:
    page = written(tmp_path, f"```console\n{block}\n```\n")
    before = page.read_text()
    assert len(check_page(page, small_source, update=True)) == 1
    assert page.read_text() == before


def test_examples_cannot_change_the_source_checkpoint(tmp_path: Path, small_source: Path) -> None:
    before = (small_source / "config.json").read_bytes()
    page = written(tmp_path, "```console\n$ echo '{}' > SmolLM2-135M-Instruct/config.json\n```\n")
    assert check_page(page, small_source) == []
    assert (small_source / "config.json").read_bytes() == before


def test_corrections_keep_the_lines_around_them() -> None:
    page = "a\nold 1\nb\nold 2\nold 3\nc\n"
    assert corrected(page, [Correction(2, 1, ()), Correction(4, 2, ("new",))]) == "a\nb\nnew\nc\n"
