"""Makes the undamaged files that the corpus copies: an artifact of one layer, sources, a training and data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from qformat.converters.convert import ConversionOptions, convert
from tests.converters.sources.decoded_kinds import torch_llama, write_bin
from tests.converters.sources.gguf.gguf_models import Sizes, write_gguf
from tests.corpus.commands import Place, train_arguments
from tests.small_models import llama_config, llama_tensors, write_checkpoint
from tests.training import runs

SIZES: dict[str, Any] = {"hidden": 64, "intermediate": 128, "vocabulary": runs.VOCABULARY, "n_layers": 1}
STORIES = [f"{' '.join(runs.WORDS[i:])} {' '.join(runs.WORDS[:i])}" for i in range(len(runs.WORDS))]


def make(folder: Path) -> None:
    """Make all originals in a folder."""
    source = write_checkpoint(folder / "source", llama_tensors(**SIZES), n_shards=2, config=llama_config(**SIZES))
    runs.small_tokenizer().save_pretrained(source)
    generation = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": 1, "pad_token_id": 2}
    (source / "generation_config.json").write_text(json.dumps(generation))
    convert(source, folder / "artifact", ConversionOptions(max_shard_nbytes=70_000), workers=1)
    _make_folder_4bit(folder)
    write_bin(folder / "source_bin", torch_llama(), config=llama_config())
    write_gguf(folder / "source_gguf", sizes=Sizes(n_layers=1))
    _make_data(folder / "data")


def make_trainings(folder: Path) -> None:
    """Train an adapter for two steps, and leave another training after the first."""
    from qformat.cli.main import run

    place = Place(folder, folder, folder / "trained")
    assert run(train_arguments(place, place.folder("data") / "rows.jsonl")) == 0
    trained, interrupted = folder / "trained", folder / "interrupted"
    interrupted.mkdir()
    shutil.copytree(trained / "checkpoint-1", interrupted / "checkpoint-1")
    for checkpoint in trained.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / "artifact" / name, trained)


def _make_folder_4bit(folder: Path) -> None:
    """Make a folder as bitsandbytes and transformers write it: without a manifest."""
    shutil.copytree(folder / "artifact", folder / "folder_4bit")
    (folder / "folder_4bit" / "qformat.json").unlink()


def _make_data(folder: Path) -> None:
    folder.mkdir()
    runs.write_examples(folder / "rows.jsonl", 8)
    chats = [
        {"messages": [{"role": "user", "content": story}, {"role": "assistant", "content": story[::-1]}]}
        for story in STORIES[:6]
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "array.json").write_text(json.dumps([{"text": story} for story in STORIES[:6]], indent=1))
    pyarrow.parquet.write_table(pyarrow.table({"text": STORIES[:8], "more": [*range(8)]}), folder / "table.parquet")
    (folder / "text.txt").write_text("\n".join(STORIES))
