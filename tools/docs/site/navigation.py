"""The navigation of the site. Pure: which pages there are is given."""

from __future__ import annotations

from collections.abc import Iterable

Entries = tuple[tuple[str, str], ...]

API_PAGE = "docs/api.md"
"""The page that is made from the docstrings; it is not in the repository."""

NAVIGATION: tuple[tuple[str, str | Entries], ...] = (
    ("Home", "README.md"),
    (
        "Guide",
        (
            ("Convert a checkpoint", "docs/convert.md"),
            ("Sources", "docs/sources.md"),
            ("The Hub as a source", "docs/hub.md"),
            ("Verify an artifact", "docs/verify.md"),
            ("Measure and raise quality", "docs/quality.md"),
            ("Load and generate", "docs/load.md"),
            ("Train an adapter", "docs/train.md"),
            ("Other programs", "docs/programs.md"),
            ("Plan memory", "docs/memory.md"),
            ("Publish an artifact", "docs/publish.md"),
        ),
    ),
    (
        "Reference",
        (
            ("Python", "docs/python.md"),
            ("Python API", API_PAGE),
            ("The format", "docs/format.md"),
            ("Specification", "spec/README.md"),
            ("Kernels", "docs/kernels.md"),
            ("Benchmarks", "docs/benchmarks.md"),
            ("Security", "docs/security.md"),
            ("Troubleshooting", "docs/troubleshooting.md"),
        ),
    ),
    ("Comparison", "docs/comparison.md"),
    ("Contributing", "CONTRIBUTING.md"),
    ("Changelog", "CHANGELOG.md"),
)
"""Titles and pages, in the order in which the site shows them."""


def listed() -> list[str]:
    """Return the pages of the navigation."""
    pages = []
    for _, entry in NAVIGATION:
        pages.extend([entry] if isinstance(entry, str) else [page for _, page in entry])
    return pages


def problems(pages: Iterable[str]) -> list[str]:
    """Return what is wrong with the navigation.

    Args:
        pages: The pages of the repository that the navigation must list, and no others.
    """
    existing = {*pages, API_PAGE}
    missing = [f"{page}: not in the navigation (tools/docs/site/navigation.py)" for page in existing - {*listed()}]
    gone = [f"{page}: in the navigation, but does not exist" for page in {*listed()} - existing]
    return sorted(missing) + sorted(gone)


def as_toml() -> str:
    """Return the navigation as the generator reads it."""
    entries = []
    for title, entry in NAVIGATION:
        if isinstance(entry, str):
            entries.append(f'{{ "{title}" = "{entry}" }}')
        else:
            inner = ", ".join(f'{{ "{name}" = "{page}" }}' for name, page in entry)
            entries.append(f'{{ "{title}" = [{inner}] }}')
    return f"[{', '.join(entries)}]"
