"""Write the texts of the quality table, taken from Python and from packages that qformat's tests need.

Usage: python -m tools.quality.texts FOLDER

    calibration   the first part of the language reference (`pydoc_data.topics`), docstrings of the standard library
    reference     the rest of the language reference: the same kind of text as the calibration
    docstrings    docstrings of numpy: a similar kind with other contents
    code          the standard library without comments and docstrings: another kind
    licences      licences of pyarrow, pillow and matplotlib: another kind
    jargon        essays and lexicon of the Jargon File: another kind. Only if Debian's package jargon-text is installed
                  (apt-get install jargon-text)

The texts do not overlap. Their bytes depend on the versions of Python and of the packages; the table shows digests.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

CALIBRATION = "calibration"
SAME_KIND = ("reference",)
ANOTHER_KIND = ("code", "licences", "jargon")

_REFERENCE_CHARACTERS = 230_000
_DOCSTRING_CHARACTERS = 500_000
_EVALUATED_CHARACTERS = 200_000
_SHORTEST_DOCSTRING = 200
_JARGON = Path("/usr/share/doc/jargon-text/jargon.txt.gz")
_STANDARD_LIBRARY = Path(os.__file__).parent


def write_texts(folder: Path) -> dict[str, Path]:
    """Write the texts that are available on this machine to a directory. Return the files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    topics = _reference()
    library = _first(_docstrings(_modules()), _DOCSTRING_CHARACTERS)
    texts = {
        CALIBRATION: topics[:_REFERENCE_CHARACTERS] + "\n\n" + library,
        "reference": topics[_REFERENCE_CHARACTERS:],
        "docstrings": _first(_docstrings(_package_files("numpy")), _EVALUATED_CHARACTERS),
        "code": _first(map(_bare_code, _modules()[::2]), _EVALUATED_CHARACTERS),
        "licences": "\n\n".join(_licence(package) for package in ("pyarrow", "pillow", "matplotlib")),
    }
    if _JARGON.exists():
        texts["jargon"] = gzip.decompress(_JARGON.read_bytes()).decode("latin-1")[: 6 * _EVALUATED_CHARACTERS]
    files = {name: folder / f"{name}.txt" for name in texts}
    for name, text in texts.items():
        files[name].write_text(text, encoding="utf-8")
    return files


def write_code_examples(path: Path) -> Path:
    """Write code for a fine-tuning as JSON lines, from the modules that are not in the text `code`."""
    rows = [{"text": _bare_code(module)} for module in _modules()[1::2]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _reference() -> str:
    """Return the pages of `help()` with each paragraph once, because chapters repeat the text of their sections."""
    import pydoc_data.topics

    pages = pydoc_data.topics.topics
    paragraphs = [paragraph for name in sorted(pages) for paragraph in pages[name].split("\n\n")]
    return "\n\n".join(dict.fromkeys(paragraphs))


def _first(texts: Iterable[str], n_characters: int) -> str:
    """Join texts until they have `n_characters`."""
    taken, total = [], 0
    for text in texts:
        taken.append(text)
        total += len(text)
        if total >= n_characters:
            break
    return "\n\n".join(taken)[:n_characters]


def _modules() -> list[Path]:
    """Return the modules in the top directory of the standard library."""
    return sorted(path for path in _STANDARD_LIBRARY.glob("*.py") if not path.name.startswith("_"))


def _package_files(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    assert spec is not None, package
    assert spec.origin is not None, package
    folder = Path(spec.origin).parent
    return sorted(path for path in folder.rglob("*.py") if "test" not in str(path.relative_to(folder)))


def _docstrings(paths: Iterable[Path]) -> Iterator[str]:
    """Yield every docstring except short ones, once each."""
    seen = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text is not None and len(text) >= _SHORTEST_DOCSTRING and text not in seen:
                    seen.add(text)
                    yield text


def _bare_code(path: Path) -> str:
    """Return a module without docstrings, and without comments because its syntax tree has none."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (
            ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _licence(package: str) -> str:
    files = importlib.metadata.files(package) or []
    found = sorted(file for file in files if Path(str(file)).name.startswith("LICENSE") and "dist-info" in str(file))
    return max((file.read_text() for file in found), key=len)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="directory to write")
    for name, path in write_texts(parser.parse_args().folder).items():
        print(f"{name}: {path}")


if __name__ == "__main__":
    main()
