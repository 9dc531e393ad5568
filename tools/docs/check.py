"""Run the examples of README.md and docs/*.md, and compare what they print with what the pages show.

Usage: python -m tools.docs.check [PAGE ...] [--update]

`tools.docs.examples.page` describes the syntax. With --update, an output that differs is replaced on its page, unless
it leaves something out (`...`): those are reported. The exit code is 1 if anything was reported.
"""

from __future__ import annotations

import argparse
import sys
import time
import tomllib
from pathlib import Path

from tools.demo import build_checkpoint
from tools.docs.examples.page import parse
from tools.docs.examples.rewriting import corrected
from tools.docs.examples.rules import Finding, Repository, findings, makefile_targets
from tools.docs.examples.running import run
from tools.docs.examples.sandbox import ROOT, SOURCE_NAME, sandbox


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE", help="default: README.md and docs/*.md")
    parser.add_argument("--update", action="store_true", help="replace outputs that differ")
    options = parser.parse_args()
    n_findings = 0
    for page in options.pages or all_pages():
        began = time.monotonic()
        found = check_page(page, demo_source(), update=options.update)
        for finding in found:
            print(f"{page}:{finding.line}: {finding.text}\n", flush=True)
        verdict = f"{len(found)} found" if found else "passed"
        print(f"{page}: {verdict}, {time.monotonic() - began:.0f} s", flush=True)
        n_findings += len(found)
    sys.exit(1 if n_findings else 0)


def all_pages() -> list[Path]:
    """Return the pages whose examples are checked."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def check_page(page: Path, source: Path, *, update: bool = False) -> list[Finding]:
    """Check the examples of a page: by the static rules first, then by running them.

    Args:
        page: A Markdown file.
        source: The source checkpoint that the examples find in their working directory.
        update: Whether to replace outputs that differ, if the page shows all of them.

    Returns:
        What is wrong. An output that was replaced is not among it.
    """
    text = page.read_text(encoding="utf-8")
    examples = parse(text)
    static = findings(examples, repository())
    if static:
        return static
    with sandbox(source) as place:
        problems = list(run(examples, place))
    if not update:
        return [problem.finding for problem in problems]
    corrections = [problem.correction for problem in problems if problem.correction is not None]
    if corrections:
        page.write_text(corrected(text, corrections), encoding="utf-8")
    return [problem.finding for problem in problems if problem.correction is None]


def repository() -> Repository:
    """Return the targets of the Makefile and the extras of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    targets = makefile_targets((ROOT / "Makefile").read_text(encoding="utf-8"))
    return Repository(targets, frozenset(project["optional-dependencies"]))


def demo_source() -> Path:
    """Return the source checkpoint of the demo; build it if it does not exist."""
    folder = ROOT / "demo"
    source = folder / SOURCE_NAME
    if not (source / "config.json").exists():
        folder.mkdir(exist_ok=True)
        build_checkpoint(folder, source)
    return source


if __name__ == "__main__":
    main()
