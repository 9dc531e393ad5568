"""The site holds every page, its links lead somewhere, and it needs no other host."""

from __future__ import annotations

from pathlib import Path

import pytest

import qformat
from tests.repository import ROOT
from tools.docs import build as building
from tools.docs.site import built, navigation, reference
from tools.docs.site.assembly import SiteError, assemble, links, resolved, without_comments

PAGES = [page for page in navigation.listed() if page != navigation.API_PAGE]


def repository(folder: Path, **texts: str) -> Path:
    """Write a repository of empty pages, but for some."""
    for name in [*PAGES, *texts]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(texts.get(name, "# Title\n"))
    (folder / "qformat").mkdir()
    (folder / "converters").mkdir()
    return folder


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    site = building.build(ROOT, tmp_path)
    assert (site / "index.html").exists()
    assert 'id="qformat.convert"' in (site / "docs" / "api.html").read_text()
    assert "<!-- setup" not in "".join(path.read_text() for path in site.rglob("*.html"))


def test_every_page_of_docs_is_in_the_navigation_and_the_navigation_has_no_other() -> None:
    assert navigation.problems(PAGES) == []
    assert navigation.problems([*PAGES, "docs/new.md"]) == [
        "docs/new.md: not in the navigation (tools/docs/site/navigation.py)"
    ]
    assert navigation.problems(set(PAGES) - {"docs/hub.md"}) == ["docs/hub.md: in the navigation, but does not exist"]


def test_every_public_name_has_one_place_on_the_api_page() -> None:
    assert reference.problems(qformat.__all__) == []
    assert reference.problems([*qformat.__all__, "new"]) == ["qformat.new: in no group (tools/docs/site/reference.py)"]
    assert reference.problems(set(qformat.__all__) - {"convert"}) == ["qformat.convert: in a group, but not public"]


def test_pages_and_the_files_they_link_to_keep_their_places(tmp_path: Path) -> None:
    root = repository(
        tmp_path / "repository",
        **{
            "README.md": "[hub](docs/hub.md#title) [data](spec/data.json) `[no](link.md)` [web](https://example.org/a)\n",
            "docs/hub.md": (
                "# Title\n![image](images/a.png)\n\n```text\n[no](link.md)\n```\n\n[home]\n\n[home]: ../README.md\n"
            ),
            "docs/images/a.png": "",
            "spec/data.json": "{}",
        },
    )
    assemble(root, tmp_path / "docs")
    made = {
        path.relative_to(tmp_path / "docs" / "source").as_posix()
        for path in (tmp_path / "docs").rglob("*.*")
        if path.is_relative_to(tmp_path / "docs" / "source")
    }
    assert {"README.md", "docs/hub.md", "docs/images/a.png", "spec/data.json", "docs/api.md"} <= made


@pytest.mark.parametrize("link", ["missing.md", "../../outside.md", "images"])
def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path, link: str) -> None:
    root = repository(tmp_path / "repository", **{"docs/hub.md": f"# Title\n\n[a]({link})\n"})
    with pytest.raises(SiteError, match=rf"^docs/hub.md:3: {link}: no such file in the repository$"):
        assemble(root, tmp_path / "docs")


def test_links_are_found_with_their_lines() -> None:
    page = (
        '[a](one.md) and\n[b](two%20words.md#part "Title")\n<!-- setup\n[c](no.md)\n-->\n[d](#here) [e](mailto:x@y)\n'
    )
    assert list(links(page)) == [(1, "one.md"), (2, "two words.md")]
    assert resolved("docs/hub.md", "../spec/README.md") == "spec/README.md"
    assert resolved("README.md", "../outside.md") is None


def test_comments_leave_blank_lines_outside_of_blocks_only() -> None:
    page = "a\n<!-- setup\n$ one\n-->\n```html\n<!-- kept -->\n```\n"
    assert without_comments(page) == "a\n\n\n\n```html\n<!-- kept -->\n```\n"


def test_built_pages_are_checked(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "index.html").write_text(
        '<h1 id="top">a</h1><a href="docs/a.html#b">good</a><a href="docs/a.html#c">bad</a><a href="#top">good</a>'
        '<a href="gone.html">bad</a><img src="gone.png"><script src="https://example.org/a.js"></script>'
        '<a href="https://example.org">good</a><link rel="canonical" href="https://example.org/">'
    )
    (tmp_path / "docs" / "a.html").write_text('<h2 id="b">b</h2><a href="../index.html">good</a><a href="..">good</a>')
    (tmp_path / "a.css").write_text("a { b: url(https://example.org/a.woff2) } c { d: url('a.png') }")
    assert sorted(built.problems(tmp_path)) == [
        "a.css: https://example.org/a.woff2: fetched from another host",
        "index.html: docs/a.html#c: no such anchor",
        "index.html: gone.html: leads nowhere",
        "index.html: gone.png: leads nowhere",
        "index.html: https://example.org/a.js: fetched from another host",
    ]


@pytest.mark.parametrize(
    ("docstring", "message"),
    [
        ("Return.\n\n    Args:\n        gone: No parameter.\n    ", "Parameter 'gone' does not appear"),
        ("Return [a][qformat.nothing].", "nothing"),
    ],
)
def test_a_mistake_in_a_docstring_is_an_error(tmp_path: Path, docstring: str, message: str) -> None:
    root = repository(tmp_path / "repository")
    (root / "qformat").rmdir()
    (root / "qformat").mkdir()
    names = "".join(f'def {name}(a: int) -> None:\n    """Return."""\n\n\n' for name in qformat.__all__)
    (root / "qformat" / "__init__.py").write_text(names.replace('"""Return."""', f'"""{docstring}"""', 1))
    (root / "qformat" / "errors.py").write_text('"""Errors."""\n')
    with pytest.raises(SiteError, match=message):
        building.build(root, tmp_path / "build")
