"""No text advises to install qformat from PyPI, where the name has another owner, and recommended extras exist."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator

import pytest

from qformat.errors import install_extra
from tests.repository import ROOT

SOURCES = [path for folder in ("qformat", "converters") for path in sorted((ROOT / folder).rglob("*.py"))]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

FROM_PYPI = re.compile(r"(?:pip|uv|pipx|uvx)3? (?:install|add|run)\b[^`\n]*?[\s'\"]qformat\b|qformat\[")
"""A command that installs the name, or the name with an extra."""


@pytest.mark.parametrize("text", ["pip install qformat", "pip install -U 'qformat[gguf]'", '"qformat[sign]"'])
def test_advice_to_install_the_name_is_found(text: str) -> None:
    assert FROM_PYPI.search(text)


@pytest.mark.parametrize("text", ["pip install '.[gguf]'", "`pip install .` in the checkout of `qformat`"])
def test_advice_to_install_the_checkout_is_accepted(text: str) -> None:
    assert not FROM_PYPI.search(text)


def test_no_text_advises_to_install_qformat_from_pypi() -> None:
    found = {
        str(path.relative_to(ROOT)): match.group()
        for path in [*SOURCES, *PAGES]
        if (match := FROM_PYPI.search(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def recommended() -> Iterator[object]:
    """Yield the argument of each call of `install_extra`, None if it is not a constant."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "install_extra":
                (argument,) = node.args
                yield argument.value if isinstance(argument, ast.Constant) else None


def test_every_recommended_extra_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = set(recommended())
    assert found
    assert found <= extras.keys()


def test_the_advice_names_the_extra_and_the_checkout() -> None:
    advice = "Install the extra 'sign' of qformat: run pip install '.[sign]' in its checkout"
    assert install_extra("sign") == advice
