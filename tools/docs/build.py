"""Build the site of the documentation: the repository's Markdown and the docstrings of the public names.

Usage: python -m tools.docs.build [--root FOLDER]

The site lies in build/site then; open build/site/index.html, or serve it: python -m http.server --directory build/site.
Warnings of the generator are errors, and so are broken links, anchors and images. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tools.docs.site import built
from tools.docs.site.assembly import SiteError, assemble

ROOT = Path(__file__).resolve().parents[2]
CLEAN_LINE = re.compile(r"Build started|Build finished in .*|No issues found|\s*")
"""What the generator prints when nothing is wrong. Strict mode lets warnings about docstrings pass."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (default: this one)")
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="where docs/ and site/ are written")
    options = parser.parse_args()
    try:
        site = build(options.root, options.build)
    except SiteError as error:
        sys.exit(str(error))
    n_pages = len(list(site.rglob("*.html")))
    print(f"{site}: {n_pages} pages")


def build(root: Path, folder: Path) -> Path:
    """Build the site of a repository.

    Args:
        root: The repository.
        folder: Where `docs/`, the collected sources, and `site/` are written.

    Returns:
        The folder of the site.

    Raises:
        SiteError: A page, a link or a docstring has a mistake.
    """
    sources, site = folder / "docs", folder / "site"
    assemble(root, sources)
    shutil.rmtree(site, ignore_errors=True)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    ran = subprocess.run(command, cwd=sources, capture_output=True, text=True, check=False)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", ran.stdout + ran.stderr)
    # The generator's own traceback helps only if it said nothing else.
    mistakes = [line for line in printed.split("Traceback")[0].splitlines() if not CLEAN_LINE.fullmatch(line)]
    if ran.returncode or mistakes:
        raise SiteError("\n".join(mistakes) or printed)
    # The generator writes only below its configuration.
    shutil.move(sources / "site", site)
    found = built.problems(site)
    if found:
        raise SiteError("\n".join(found))
    return site


if __name__ == "__main__":
    main()
