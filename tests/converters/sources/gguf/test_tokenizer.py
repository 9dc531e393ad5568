"""The tokenizer is read from the directory, or converted from the file if transformers is installed."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer

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


def write_vocabulary(folder: Path, architecture: str) -> Path:
    """Write a file with a byte-level vocabulary and no tensors, and return its path."""
    folder.mkdir()
    writer = gguf.GGUFWriter(str(folder / "model.gguf"), architecture)
    for key in ("embedding_length", "block_count", "attention.head_count", "attention.head_count_kv"):
        writer.add_uint32(f"{architecture}.{key}", 1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(["<s>", "a", "b", "ab"])
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


@pytest.mark.parametrize("architecture", ["granite", "smollm3", "olmo2", "gemma"])
def test_the_tokenizer_of_an_architecture_that_transformers_does_not_read_is_converted(
    architecture: str, tmp_path: Path
) -> None:
    expected = gguf_tokenizer.tokenizer_files(write_vocabulary(tmp_path / "llama", "llama"))
    found = gguf_tokenizer.tokenizer_files(write_vocabulary(tmp_path / "other", architecture), by_architecture=False)
    assert found == expected
    tokenizer = Tokenizer.from_buffer(found["tokenizer.json"])
    assert tokenizer.encode("abba").tokens == ["ab", "b", "a"]
