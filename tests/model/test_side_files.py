"""Whatever transformers and tokenizers raise for a damaged file beside the weights becomes one line that names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qformat.errors import ArtifactError, QformatError
from qformat.model.checkpoint import load_checkpoint
from qformat.model.load import load_tokenizer
from tests.small_models import llama_config, write_llama
from tests.training import runs


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    runs.small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tokenizer_files: Path, tmp_path: Path) -> Path:
    """A copy of a tokenizer that a test may damage."""
    return Path(shutil.copytree(tokenizer_files, tmp_path / "model"))


def assert_one_line(error: QformatError, file: Path) -> None:
    assert str(error).startswith(str(file)), error
    assert "\n" not in str(error)


def edited(path: Path, **fields: object) -> bytes:
    return json.dumps({**json.loads(path.read_text()), **fields}).encode()


NOT_TEXT = b'{"a": "\xff"}'
NESTED = b"[" * 100_000 + b"]" * 100_000
DAMAGE = (b"", b"[]", b"null", b"{", NOT_TEXT, NESTED, b"1" * 5_000)


@pytest.mark.parametrize("data", DAMAGE, ids=lambda data: repr(data[:9]))
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_of_a_tokenizer_is_named(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(ArtifactError) as caught:
        load_tokenizer(folder)
    assert_one_line(caught.value, folder / name)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("chat_template.jinja", b"{{ messages }}\xff"),
        ("special_tokens_map.json", b'{"eos_token": [[]]'),
        ("added_tokens.json", b"\xff"),
    ],
)
def test_a_damaged_file_beside_a_tokenizer_is_named(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    try:
        load_tokenizer(folder)
    except ArtifactError as error:
        assert_one_line(error, folder / name)
    else:
        assert name == "added_tokens.json"  # not read beside tokenizer.json


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("tokenizer.json", {"model": {"type": "unheard_of"}}, "cannot load the tokenizer"),
        ("tokenizer.json", {"decoder": 5}, "cannot load the tokenizer"),
        ("tokenizer_config.json", {"model_max_length": "many"}, "cannot load the tokenizer"),
        ("tokenizer_config.json", {"chat_template": 5}, "cannot load the tokenizer"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "cannot load the tokenizer"),
    ],
)
def test_a_wrong_value_in_a_file_of_a_tokenizer_is_named(
    folder: Path, name: str, fields: dict[str, Any], says: str
) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / name).write_bytes(edited(folder / name, **fields))
    with pytest.raises(ArtifactError, match=says) as caught:
        load_tokenizer(folder)
    assert_one_line(caught.value, folder / name)


def test_code_of_a_tokenizer_does_not_run_unasked(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    config = folder / "tokenizer_config.json"
    config.write_bytes(edited(config, tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]}))
    with pytest.raises(ArtifactError, match="trust_remote_code=True") as caught:
        load_tokenizer(folder)
    assert_one_line(caught.value, config)


@pytest.mark.parametrize("data", DAMAGE, ids=lambda data: repr(data[:9]))
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_damaged_config_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    (write_llama(tmp_path / "model") / name).write_bytes(data)
    with pytest.raises(ArtifactError) as caught:
        load_checkpoint(tmp_path / "model", device="cpu")
    assert_one_line(caught.value, tmp_path / "model" / name)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("config.json", {"hidden_size": "many"}),
        ("config.json", {"hidden_size": None}),
        ("config.json", {"num_attention_heads": 0}),
        ("config.json", {"vocab_size": -1}),
        ("config.json", {"rope_scaling": [1]}),
        ("config.json", {"architectures": {"LlamaForCausalLM": 1}}),
        ("config.json", {"id2label": 5}),
        ("config.json", {"attention_dropout": 2.0}),
        ("config.json", {"attention_dropout": -0.5}),
        ("config.json", {"num_hidden_layers": -1}),
        ("generation_config.json", {"watermarking_config": 5}),
        ("generation_config.json", {"max_new_tokens": -1}),
    ],
    ids=str,
)
def test_a_wrong_value_in_a_config_is_named(tmp_path: Path, name: str, fields: dict[str, Any]) -> None:
    path = write_llama(tmp_path / "model") / name
    path.write_bytes(json.dumps({**(llama_config() if name == "config.json" else {}), **fields}).encode())
    with pytest.raises(ArtifactError) as caught:
        load_checkpoint(path.parent, device="cpu")
    assert_one_line(caught.value, path)
