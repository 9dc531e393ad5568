"""Streams of tokens: equal to the whole text tokenised piece by piece, and thinned evenly if they are too long."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qformat.errors import DataError, UsageError
from qformat.quality import token_stream
from qformat.quality.token_stream import ThinnedTokens, TokenStream
from qformat.training.data import tokenise as tokenise_module
from qformat.training.data.render import Rendered
from qformat.training.data.tokenise import Tokens, tokenise
from tests.training import runs

LINES = [
    "the block holds one scale\n",
    "\n",
    "each code counts — naïve 量化 🙂\r\n",
    "  while pages move\n\n\n",
    "x" * 90,
]
TEXT = "\ufeff" + "".join(LINES) * 40


def words() -> PreTrainedTokenizerFast:
    """Return a tokenizer like BERT's, which drops spaces and puts pieces of words together."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[UNK]")


def sentences() -> PreTrainedTokenizerFast:
    """Return a tokenizer like T5's, which marks spaces and begins every text with one."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        LINES, trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>")
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<unk>")


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level BPE": runs.small_tokenizer,
    "WordPiece": words,
    "Unigram": sentences,
}


def expected_pieces(text: str, characters: int) -> list[str]:
    """Cut a whole text at its last line end within `characters`, the definition that streaming must not change."""
    pieces = []
    while text:
        stop = characters
        if stop < len(text):
            stop = (text.rfind("\n", 0, stop) + 1) or stop
        pieces.append(text[:stop])
        text = text[stop:]
    return pieces


def stream(path: Path, tokenizer: Any, *, limit: int = 2**40, characters: int = 2**20) -> TokenStream:
    made = TokenStream(tokenizer, limit=limit, piece_characters=characters)
    made.read(path, split="train")
    return made


@pytest.mark.parametrize("read_nbytes", [1, 7, 1000, 2**20])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_streamed_text_has_the_tokens_of_its_pieces_and_its_digest(
    name: str, read_nbytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_stream, "READ_NBYTES", read_nbytes)
    tokenizer = TOKENIZERS[name]()
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    read = stream(path, tokenizer, characters=300)
    ids = [
        i for piece in expected_pieces(TEXT[1:], 300) for i in tokenizer(piece, add_special_tokens=False)["input_ids"]
    ]
    assert read.tokens.joined().tolist() == ids
    assert read.sha256.hexdigest() == hashlib.sha256(TEXT.encode()).hexdigest()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_of_one_piece_has_the_tokens_of_the_whole_text(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]()
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    for limit in (1, 2**40):
        ids = stream(path, tokenizer, characters=len(TEXT) - 1, limit=limit).tokens.joined().tolist()
        assert ids == tokenizer(TEXT[1:], add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("read_nbytes", [1, 3, 2**20])
@pytest.mark.parametrize("damage", [b"\xff", b"\xe2\x82\x28", b"\xe2\x82"])
def test_the_position_of_a_byte_that_is_not_utf8_does_not_depend_on_the_parts(
    damage: bytes, read_nbytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_stream, "READ_NBYTES", read_nbytes)
    path = tmp_path / "text.txt"
    path.write_bytes("naïve".encode() + damage)
    with pytest.raises(DataError, match=r"not valid UTF-8 \(byte 6\)"):
        stream(path, runs.small_tokenizer())


def test_units_are_thinned_to_every_second_fourth_and_so_on() -> None:
    for n_units in range(1, 40):
        kept = ThinnedTokens(limit=30)
        n_added = 0
        for number in range(n_units):
            if kept.wants(number):
                n_added += 1
                kept.add(number, np.full(10, number, np.int32))
        numbers = kept.joined()[::10].tolist()
        assert numbers == list(range(0, n_units, kept.stride))
        assert len(numbers) <= 3
        assert kept.stride == 1 or len(range(0, n_units, kept.stride // 2)) > 3, "no more was dropped than necessary"
        assert n_added <= 3 + 2 * n_units.bit_length(), "units that are not kept are not even tokenised"


def test_a_single_unit_is_kept_whole() -> None:
    kept = ThinnedTokens(limit=3)
    kept.add(0, np.arange(10, dtype=np.int32))
    assert kept.joined().tolist() == list(range(10))


def test_a_long_text_is_tokenised_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory follows the limit, and work the limit and the logarithm of the size."""
    tokenizer = runs.small_tokenizer()
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number:06d} the block\n" for number in range(6400)))
    made = TokenStream(tokenizer, limit=4000, piece_characters=340)
    encoded = []

    def counting(backend: Tokenizer, batch: list[Rendered], **options: Any) -> list[Tokens]:
        encoded.extend(len(piece.text) for piece in batch)
        return tokenise(backend, batch, **options)

    monkeypatch.setattr(token_stream, "tokenise", counting)
    monkeypatch.setattr(tokenise_module, "_BATCH_CHARACTERS", 1000)
    made.read(path, split="train")
    tokens = made.tokens.joined()
    assert 2000 < len(tokens) <= 4000
    assert sum(encoded) < path.stat().st_size / 4
    lines = tokenizer.decode(tokens).splitlines()
    starts = np.array([int(line[:6]) for line in lines[::20]])
    assert starts[0] == 0
    assert starts[-1] > 5000, "the part is spread over the text"
    assert len(set(np.diff(starts).tolist())) == 1
    assert made.sha256.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_rows_that_are_not_kept_are_checked_but_not_rendered(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number:04d} block"}) + "\n" for number in range(1000)))
    tokenizer = runs.small_tokenizer()
    read = stream(path, tokenizer, limit=500)
    numbers = [int(text[:4]) for text in tokenizer.decode(read.tokens.joined()).split("</s>") if text]
    assert numbers == list(range(0, 1000, read.tokens.stride))
    assert read.tokens.stride > 1
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(DataError, match="line 1001"):
        stream(path, tokenizer, limit=500)


@pytest.mark.parametrize("name", ["text.txt", "rows.jsonl"])
def test_a_pipe_is_refused_before_it_is_read(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UsageError, match=rf"{name}: is not a regular file.*Write the data to a file first"):
        stream(tmp_path / name, runs.small_tokenizer())
