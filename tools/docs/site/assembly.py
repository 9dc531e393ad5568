"""Collect what the site is made from: the repository's Markdown in its own places, so that relative links stay true."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import qformat
from tools.docs.examples.page import FENCE
from tools.docs.site import navigation, reference

TOP_PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "spec/README.md")
LINK = re.compile(
    r"\]\(\s*<?(?P<target>[^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|^\[[^\]]+\]:\s*(?P<definition>\S+)", re.MULTILINE
)
CODE_SPAN = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL)
HERE = Path(__file__).parent


class SiteError(Exception):
    """The site cannot be built from these pages: one line for each mistake."""


def assemble(root: Path, folder: Path) -> None:
    """Write the generator's configuration and its sources into a folder.

    Args:
        root: The repository.
        folder: Where the configuration, `source/` and `package/` are written. What it held is removed.

    Raises:
        SiteError: A page is not in the navigation, a link leads nowhere, or a public name has no place on the API page.
    """
    pages = [*TOP_PAGES, *(path.relative_to(root).as_posix() for path in sorted((root / "docs").glob("*.md")))]
    shutil.rmtree(folder, ignore_errors=True)
    source = folder / "source"
    mistakes = [*navigation.problems(pages), *reference.problems(qformat.__all__), *_copy(root, source, pages)]
    if mistakes:
        raise SiteError("\n".join(mistakes))
    (source / navigation.API_PAGE).write_text(reference.page(), encoding="utf-8")
    (source / "assets").mkdir()
    shutil.copyfile(HERE / "site.css", source / "assets" / "site.css")
    configuration = (HERE / "zensical.toml").read_text(encoding="utf-8")
    written = configuration.replace("[project]\n", f"[project]\nnav = {navigation.as_toml()}\n", 1)
    (folder / "zensical.toml").write_text(written, encoding="utf-8")
    _link_package(root, folder / "package" / "qformat")


def _copy(root: Path, source: Path, pages: Sequence[str]) -> Iterator[str]:
    """Copy pages and the files that they link to; yield the links that lead nowhere."""
    waiting, done = list(pages), set[str]()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        if not (root / name).is_file():
            continue
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith(".md"):
            shutil.copyfile(root / name, target)
            continue
        text = (root / name).read_text(encoding="utf-8")
        target.write_text(without_comments(text), encoding="utf-8")
        for line, link in links(text):
            linked = resolved(name, link)
            if linked is None or not (root / linked).is_file():
                yield f"{name}:{line}: {link}: no such file in the repository"
            else:
                waiting.append(linked)


def links(text: str) -> Iterator[tuple[int, str]]:
    """Yield the relative links and images of a page, without their anchors, and their lines."""
    prose = CODE_SPAN.sub(lambda span: re.sub(r"[^\n]", " ", span[0]), _without_fences(text))
    for match in LINK.finditer(prose):
        target = unquote((match["target"] or match["definition"]).split("#")[0])
        if target and not re.match(r"[a-z][a-z0-9+.-]*:", target):
            yield prose.count("\n", 0, match.start()) + 1, target


def resolved(page: str, link: str) -> str | None:
    """Return the file that a link of a page leads to; None if it leads out of the repository."""
    parts: list[str] = []
    for part in (PurePosixPath(page).parent / link).parts:
        if part == "..":
            if not parts:
                return None
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)


def without_comments(text: str) -> str:
    """Return a page with blank lines in place of its HTML comments: what they hold is for the check of examples."""
    return "\n".join("" if kind == "comment" else line for kind, line in _kinds(text))


def _without_fences(text: str) -> str:
    """Return a page with blank lines in place of its fenced blocks and comments."""
    return "\n".join(line if kind == "prose" else "" for kind, line in _kinds(text))


def _kinds(text: str) -> Iterator[tuple[str, str]]:
    """Yield the lines of a page, each with what it belongs to: a comment, a fenced block, or prose."""
    inside_fence, inside_comment = "", False
    for line in text.split("\n"):
        if inside_comment or (not inside_fence and line.lstrip().startswith("<!--")):
            inside_comment = "-->" not in line
            yield "comment", line
            continue
        was_inside, inside_fence = inside_fence, _fence_after(line, inside_fence)
        yield "fence" if was_inside or inside_fence else "prose", line


def _fence_after(line: str, inside: str) -> str:
    """Return the fence that is open after a line, given the one that was open before it; empty if none is."""
    match = FENCE.match(line)
    if match is None:
        return inside
    if not inside:
        return match["fence"]
    closes = match["fence"].startswith(inside) and not match["language"] and not match["rest"].strip()
    return "" if closes else inside


def _link_package(root: Path, package: Path) -> None:
    """Show the reader of docstrings the installed layout, in which converters/ is qformat.converters."""
    package.mkdir(parents=True)
    paths: Sequence[Path] = [*(root / "qformat").iterdir(), root / "converters"]
    for path in paths:
        if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__"):
            (package / path.name).symlink_to(path.resolve())
