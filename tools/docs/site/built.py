"""Check the built pages: links, anchors and images lead somewhere, and nothing is fetched from other hosts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""What a browser fetches when it shows a page: tags, and the attributes with the address."""

FETCHED_BY_STYLE = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')]+)""")
NOT_FETCHED_RELATIONS = ("canonical", "prev", "next", "alternate", "edit")


@dataclass(slots=True)
class Page(HTMLParser):
    """The anchors and addresses of a page.

    Attributes:
        anchors: Names that a link can end in.
        links: Addresses of the links that a reader may follow.
        fetched: Addresses that the browser fetches by itself.
    """

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        HTMLParser.__init__(self)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors.update(found[name] for name in ("id", "name") if name in found)
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif FETCHED.get(tag) in found and found.get("rel") not in NOT_FETCHED_RELATIONS:
            self.fetched.append(found[FETCHED[tag]])


def problems(site: Path) -> list[str]:
    """Return what is wrong with a built site, one line for each mistake."""
    pages = {path.resolve(): read(path) for path in sorted(site.rglob("*.html"))}
    found: list[str] = []
    for path in sorted(site.rglob("*.css")):
        addresses = FETCHED_BY_STYLE.findall(path.read_text(encoding="utf-8"))
        found.extend(
            f"{path.relative_to(site).as_posix()}: {address}: fetched from another host" for address in addresses
        )
    for path, page in pages.items():
        name = path.relative_to(site.resolve()).as_posix()
        found.extend(f"{name}: {problem}" for problem in _of_page(site.resolve(), path, page, pages))
    return found


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def _of_page(site: Path, path: Path, page: Page, pages: dict[Path, Page]) -> Iterator[str]:
    for address in page.fetched:
        if urlsplit(address).netloc:
            yield f"{address}: fetched from another host"
    # The page for missing addresses is shown at any address: its links begin at the top of a server.
    base = site if path.name == "404.html" else path.parent
    for address in [*page.links, *page.fetched]:
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            continue
        target = path
        if parts.path:
            target = (
                base / unquote(parts.path).lstrip("/") if parts.path.startswith("/") else base / unquote(parts.path)
            )
            target = target.resolve()
        if target.is_dir():
            target /= "index.html"
        if not target.is_file():
            yield f"{address}: leads nowhere"
        elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
            yield f"{address}: no such anchor"
