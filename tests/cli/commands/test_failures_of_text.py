"""Mistakes around tokenizer, template and generation settings end `generate` and `train` with a message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from qformat.cli.main import run
from qformat.converters.convert import convert
from tests.small_models import llama_config, llama_tensors, write_checkpoint
from tests.training import runs

SIZES = {"hidden": 64, "intermediate": 96, "n_layers": 1}

Change = Callable[[Path], object]


def artifact(folder: Path, change: Change, *, vocabulary: int = runs.VOCABULARY) -> Path:
    tensors = llama_tensors(**SIZES, vocabulary=vocabulary)
    config = llama_config(**SIZES, vocabulary=vocabulary)
    source = write_checkpoint(folder / "source", tensors, config=config, side_files={})
    runs.small_tokenizer().save_pretrained(source)
    change(source)
    convert(source, folder / "nf4")
    return folder / "nf4"


def classifier(folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder)


def writes(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text)


def remove_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def cut(name: str) -> Change:
    return lambda folder: (folder / name).write_text((folder / name).read_text()[:40])


NO_TOKENIZER = "tokenizer.json: the model has no tokenizer. Put tokenizer.json"
MISTAKES: dict[str, tuple[Change, int, str]] = {
    "no tokenizer": (remove_tokenizer, 1, NO_TOKENIZER),
    "tokenizer.json is cut": (cut("tokenizer.json"), 1, "tokenizer.json: is not valid JSON"),
    "tokenizer_config.json is cut": (cut("tokenizer_config.json"), 1, "tokenizer_config.json: is not valid JSON"),
    "tokenizer.json is of another kind": (writes("tokenizer.json", "{}"), 1, "transformers cannot load the tokenizer"),
    "generation_config.json is cut": (writes("generation_config.json", '{"top_k": 5,'), 1, "is not valid JSON"),
    "generation_config.json is a list": (writes("generation_config.json", "[1]"), 1, "generation_config.json: "),
    "generation_config.json has a wrong value": (
        writes("generation_config.json", json.dumps({"cache_implementation": "unheard of"})),
        1,
        "generation_config.json: transformers rejects it",
    ),
    "a classifier": (classifier, 2, "does not predict the next token"),
}
"""What is changed in the source, the exit code, and a part of the message."""

ONLY_GENERATE: dict[str, tuple[Change, int, str]] = {
    "the template refuses": (writes("chat_template.jinja", "{{ raise_exception('no system') }}"), 2, "no system"),
    "the template is damaged": (writes("chat_template.jinja", "{% for %}"), 2, "the chat template fails"),
    "the template has no bounds": (
        writes("chat_template.jinja", "{{ 'x' * 2000000 }}"),
        1,
        "chat_template.jinja: the chat template makes a text of more than",
    ),
    "the template writes to the terminal": (
        writes("chat_template.jinja", "{{ raise_exception('\x1b[2J\u202e') }}"),
        2,
        r"the chat template fails: \x1b[2J\u202e",
    ),
    "a method that needs other code": (
        writes("generation_config.json", json.dumps({"dola_layers": "low"})),
        2,
        "transformers cannot generate text",
    ),
}


def generate(path: Path) -> int:
    return run(["generate", str(path), "--device", "cpu", "--chat", "--prompt", "the block", "--max-new-tokens", "2"])


def train(path: Path) -> int:
    runs.write_examples(path.parent / "rows.jsonl", 4)
    options = ["--data", str(path.parent / "rows.jsonl"), "--max-steps", "1", "--seq-len", "32", "--device", "cpu"]
    return run(["train", str(path), str(path.parent / "adapter"), *options])


@pytest.mark.parametrize("mistake", [*MISTAKES, *ONLY_GENERATE])
def test_generate_names_the_mistake(mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, code, message = {**MISTAKES, **ONLY_GENERATE}[mistake]
    path = artifact(tmp_path, change)
    assert generate(path) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_train_names_the_mistake(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    change, code, message = MISTAKES[mistake]
    path = artifact(tmp_path, change)
    assert train(path) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [generate, train])
def test_a_token_beyond_the_embedding_is_named(
    command: Callable[[Path], int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = artifact(tmp_path, lambda folder: None, vocabulary=40)
    assert command(path) == 2
    assert "but the model has embeddings for 40 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings", [{"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 3}, {"num_beams": 2, "do_sample": True}]
)
def test_settings_of_several_texts_do_not_apply_to_a_stream(
    settings: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = artifact(tmp_path, writes("generation_config.json", json.dumps(settings)))
    assert generate(path) == 0
    assert "2 tokens" in capsys.readouterr().err


def test_the_tokenizer_beside_an_adapter_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = artifact(tmp_path, writes("chat_template.jinja", "{{ raise_exception('of the artifact') }}"))
    assert train(path) == 0
    options = ["--device", "cpu", "--chat", "--prompt", "the block", "--max-new-tokens", "2", "--json"]
    command = ["generate", str(path), "--adapter", str(tmp_path / "adapter"), *options]
    assert run(command) == 2
    assert "of the artifact" in capsys.readouterr().err
    runs.small_tokenizer().save_pretrained(tmp_path / "adapter")
    assert run(command) == 0
