"""Data files as token windows, compared with the output of transformers' tokenizer on the same text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from qformat.errors import DataError, UsageError
from qformat.quality.windows import cut, read_windows
from tests.artifact.not_fetched import STAND_INS
from tests.training import runs

TEXT = "the block holds one scale, and every code counts from zero to fifteen\nwhile pages move on and on\n" * 20
ROWS = [
    {"text": "the block holds one scale " * 8},
    {"prompt": "every code", "completion": " counts from zero to fifteen" * 6},
    {"messages": [{"role": "user", "content": "the block"}, {"role": "assistant", "content": "holds one " * 9}]},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return runs.small_tokenizer()


@pytest.fixture(scope="module")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that begins every text with BOS, like Llama's."""
    tokenizer = runs.small_tokenizer()
    tokenizer.bos_token = "</s>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # type: ignore[attr-defined]
        single="</s> $A", special_tokens=[("</s>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(TEXT)
    return path


def write_rows(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_windows_of_a_text_are_its_tokens_cut_without_overlap(
    text_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    got = read_windows(text_file, tokenizer, length=32)
    assert got.ids.shape == (len(expected) // 32, 32)
    assert got.ids.reshape(-1).tolist() == expected[: got.ids.size]
    assert got.numbers.tolist() == list(range(len(got)))


def test_the_digest_is_the_sha256_of_the_bytes(
    text_file: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    whole = text_file.read_bytes()
    assert read_windows(text_file, tokenizer, length=8).sha256 == hashlib.sha256(whole).hexdigest()
    both = read_windows([text_file, rows], tokenizer, length=8)
    assert both.sha256 == hashlib.sha256(whole + rows.read_bytes()).hexdigest()


def test_windows_begin_with_bos_if_the_tokenizer_adds_it(
    text_file: Path, bos_tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = bos_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    got = read_windows(text_file, bos_tokenizer, length=32)
    assert (got.ids[:, 0] == bos_tokenizer.bos_token_id).all()
    assert got.ids[:, 1:].reshape(-1).tolist() == expected[: 31 * len(got)]


def test_a_window_never_begins_with_two_bos() -> None:
    got = cut(np.array([1, 5, 6, 7, 8, 1, 9, 9], np.int32), 4, bos_id=1)
    assert got.tolist() == [[1, 5, 6, 7], [1, 8, 1, 9]]
    assert cut(np.array([1, 5, 6, 7, 8], np.int32), 2, bos_id=None).tolist() == [[1, 5], [6, 7]]


def test_rows_are_concatenated_as_training_renders_them(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    got = read_windows(write_rows(tmp_path / "rows.jsonl"), tokenizer, length=16)
    assert isinstance(tokenizer.eos_token, str)
    expected = [
        *tokenizer(str(ROWS[0]["text"]) + tokenizer.eos_token)["input_ids"],
        *tokenizer(f"{ROWS[1]['prompt']}{ROWS[1]['completion']}{tokenizer.eos_token}")["input_ids"],
        *tokenizer.apply_chat_template(ROWS[2]["messages"], tokenize=True, return_dict=True)["input_ids"],  # type: ignore[arg-type]
    ]
    assert got.ids.reshape(-1).tolist() == expected[: got.ids.size]


def test_parquet_gives_the_windows_of_the_same_json_lines(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    lines = read_windows(write_rows(tmp_path / "rows.jsonl"), tokenizer, length=16)
    table = {name: [row.get(name) for row in ROWS] for name in ("text", "prompt", "completion", "messages")}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
    columns = read_windows(tmp_path / "rows.parquet", tokenizer, length=16)
    assert np.array_equal(lines.ids, columns.ids)


def test_a_long_text_is_cut_at_line_ends_for_the_tokenizer(text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = read_windows(text_file, tokenizer, length=32)
    assert np.array_equal(read_windows(text_file, tokenizer, length=32, piece_characters=150).ids, whole.ids)


def test_a_text_without_line_ends_keeps_every_character(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "line.txt"
    path.write_text("one scale " * 50)
    ids = read_windows(path, tokenizer, length=2, piece_characters=77).ids
    assert path.read_text().startswith(tokenizer.decode(ids.reshape(-1)).strip())


def test_spread_returns_evenly_spaced_windows(text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    everything = read_windows(text_file, tokenizer, length=8)
    few = everything.spread(4)
    steps = np.diff(few.numbers)
    assert len(few) == 4
    assert steps.max() - steps.min() <= 1
    assert few.numbers[0] == pytest.approx(len(everything) - 1 - few.numbers[-1], abs=1)
    assert np.array_equal(few.ids, everything.ids[few.numbers])
    assert np.array_equal(everything.spread(10**6).ids, everything.ids)


def test_a_sample_is_of_different_windows_and_the_same_for_the_same_seed(
    text_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    everything = read_windows(text_file, tokenizer, length=8)
    one, again, other = (everything.sample(6, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(one.numbers, again.numbers)
    assert not np.array_equal(one.numbers, other.numbers)
    assert len(set(one.numbers.tolist())) == 6
    assert np.array_equal(one.ids, everything.ids[one.numbers])


def test_held_out_and_remaining_windows_are_complete(text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    everything = read_windows(text_file, tokenizer, length=8)
    rest, held_out = everything.hold_out(5)
    assert len(held_out) == 5
    assert sorted([*rest.numbers.tolist(), *held_out.numbers.tolist()]) == everything.numbers.tolist()
    with pytest.raises(UsageError, match="would be held out"):
        everything.hold_out(len(everything))


def test_less_than_one_window_is_rejected_with_both_sizes(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "short.txt"
    path.write_text("the block")
    n_tokens = len(tokenizer("the block")["input_ids"])
    with pytest.raises(DataError, match=f"short.txt: contains {n_tokens} tokens, fewer than one window of 64"):
        read_windows(path, tokenizer, length=64)
    path.write_text("")
    with pytest.raises(DataError, match="contains 0 tokens"):
        read_windows(path, tokenizer, length=64)


def test_a_binary_file_is_rejected_with_the_position(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "rows.bin"
    path.write_bytes(b"text" + bytes([0xFF, 0xFE]))
    with pytest.raises(DataError, match=r"not valid UTF-8 \(byte 4\)"):
        read_windows(path, tokenizer, length=4)


def test_an_unusable_row_is_reported_without_an_option_that_does_not_exist(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Only training can skip rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    with pytest.raises(DataError, match=r"rows.jsonl: line 1: has no 'messages'.*\. Correct it$"):
        read_windows(path, tokenizer, length=4)


@pytest.mark.parametrize("name", ["text.txt", "rows.jsonl", "rows.json", "rows.parquet", "inside/rows.jsonl"])
@pytest.mark.parametrize("kind", STAND_INS)
def test_what_takes_the_place_of_a_file_is_named(
    kind: str, name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    content, problem, next_step = STAND_INS[kind]
    if name == "text.txt" and problem == "web page":
        content, problem, next_step = b"<html>" + content, "fewer than one window", "Give more text"  # it is a text
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        read_windows(path.parent if "/" in name else path, tokenizer, length=2**20)
    assert problem in refused.value.problem
    assert next_step in refused.value.next_step
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl"])
def test_a_missing_file_is_reported(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match=name):
        read_windows(tmp_path / name, tokenizer, length=4)


def test_a_window_of_one_token_is_rejected(text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match="at least 2"):
        read_windows(text_file, tokenizer, length=1)
