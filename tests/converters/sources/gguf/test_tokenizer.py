"""The tokenizer is read from the directory, or converted from the file if transformers is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat.converters.convert import convert, plan
from qformat.converters.sources.gguf import tokenizer as gguf_tokenizer
from qformat.converters.sources.open_source import open_source
from qformat.errors import SourceError
from tests.converters.sources.gguf.gguf_models import write_gguf
from tests.small_models import SIDE_FILES, contents

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


def test_a_tokenizer_in_the_directory_is_used(tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "gguf")
    convert(folder, tmp_path / "out")
    found = contents(tmp_path / "out")
    assert all(found[name] == data for name, data in SIDE_FILES.items())


def test_without_transformers_a_tokenizer_file_is_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_gguf(tmp_path / "gguf")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    plan(folder)  # the tokenizer lies beside the file
    open_source(folder / "model.gguf").close()  # nothing asks for a tokenizer
    with pytest.raises(SourceError, match=r"transformers is not installed.*'\.\[gguf\]'.*tokenizer\.json"):
        plan(folder / "model.gguf")


def test_a_file_without_a_vocabulary_has_no_tokenizer_to_convert(tmp_path: Path) -> None:
    folder = write_gguf(tmp_path / "gguf")
    with pytest.raises(SourceError, match="cannot convert its tokenizer"):
        gguf_tokenizer.tokenizer_files(folder / "model.gguf")
