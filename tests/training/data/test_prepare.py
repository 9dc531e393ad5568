"""Tokens and labels of rows, compared with those of trl's SFTTrainer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from qformat.cli.messages import as_flag
from qformat.errors import ArtifactError, DataError, TargetError, UsageError, spelled
from qformat.training.data import prepare
from qformat.training.data.prepare import DataSettings, prepare_data
from qformat.training.data.show_example import show_example
from qformat.training.data.tokenised_data import IGNORED, TokenisedData
from tests.converters.faulty_disk import FaultyDisk, Killed
from tests.training import runs

CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "the block"}, {"role": "assistant", "content": "holds one scale"}]},
    {
        "messages": [
            {"role": "system", "content": "every code counts"},
            {"role": "user", "content": "from zero"},
            {"role": "assistant", "content": "to fifteen"},
            {"role": "user", "content": "while"},
            {"role": "assistant", "content": "pages move on and on"},
        ]
    },
]
COMPLETIONS = [
    {"prompt": "the block holds ", "completion": "one scale"},
    {"prompt": "every code", "completion": " counts from zero to fifteen"},
]
CHAT_COMPLETIONS = [
    {
        "prompt": [{"role": "user", "content": "the block"}],
        "completion": [{"role": "assistant", "content": "holds one scale"}],
    }
]
TEXTS = [{"text": "the block holds one scale"}, {"text": "pages move</s>"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return runs.small_tokenizer()


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(path: Path, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> TokenisedData:
    return prepare_data(path, tokenizer, DataSettings(**{"max_length": 64, **settings}))


def examples(data: TokenisedData) -> list[tuple[list[int], list[int]]]:
    return [(data[i]["input_ids"].tolist(), data[i]["labels"].tolist()) for i in range(len(data))]


def peers(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, folder: Path, **settings: Any) -> Any:
    """Return the examples of SFTTrainer. Its first label may be set, because the model never predicts that token."""
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=320)
    )
    arguments = SFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, max_length=64, report_to="none", **settings)
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    made = trainer.train_dataset
    return [
        (list(row["input_ids"]), [IGNORED, *list(row.get("labels", row["input_ids"]))[1:]])
        for row in made  # type: ignore[union-attr]
    ]


@pytest.mark.parametrize(
    ("rows", "settings", "peer"),
    [
        (TEXTS, {}, {}),
        (COMPLETIONS, {}, {}),
        (COMPLETIONS, {"loss_on": "all"}, {"completion_only_loss": False}),
        (CHATS, {}, {"assistant_only_loss": True}),
        (CHATS, {"loss_on": "all"}, {}),
        (CHAT_COMPLETIONS, {}, {}),
    ],
    ids=["text", "completion", "completion_all", "chat", "chat_all", "chat_completion"],
)
def test_tokens_and_labels_equal_those_of_trl(
    rows: list[dict[str, Any]],
    settings: dict[str, Any],
    peer: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    ours = examples(prepared(write(tmp_path / "rows.jsonl", rows), tokenizer, **settings))
    assert ours == peers(rows, tokenizer, tmp_path / "peer", **peer)


def test_a_template_without_markers_trains_the_same_turns(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", CHATS)
    plain = runs.small_tokenizer()
    plain.chat_template = runs.TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    marked, found = examples(prepared(path, tokenizer)), examples(prepared(path, plain))
    for (ids, labels), (plain_ids, plain_labels) in zip(marked, found, strict=True):
        assert ids == plain_ids
        # Without markers, the newline after a turn in the middle cannot be separated from the turn.
        extra = [a for a, b in zip(plain_labels, labels, strict=True) if a != b]
        assert all(tokenizer.decode([token]) == "\n" for token in extra)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_parquet_and_json_lines_give_the_same_tokens(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = COMPLETIONS
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        write(path, rows)
    expected = examples(prepared(write(tmp_path / "same.jsonl", rows), tokenizer))
    assert examples(prepared(path, tokenizer)) == expected


BAD: list[tuple[bytes, str, str]] = [
    (b"{", "not_json", "line 2"),
    (b'{"text": "\xff"}', "not_utf8", "line 2"),
    (b"[1]", "not_an_object", "expected an object, got a list"),
    (b'{"body": "x"}', "no_known_field", r"\(found 'body'\)"),
    (b'{"text": 3}', "wrong_type", "'text': expected a string, got a number"),
    (b'{"text": ""}', "empty", "'text' is empty"),
    (b"", "empty", "line 2: is empty"),
    (b'{"messages": []}', "empty", "'messages' has no messages"),
    (b'{"messages": [{"role": "user"}]}', "wrong_type", r"messages\[0\]: 'content': expected a string, got nothing"),
    (b'{"prompt": "a", "completion": [1]}', "wrong_type", r"must both be strings.* \(got a string and a list\)"),
    (b'{"text": "a", "text": "b"}', "not_json", "line 2"),
    (b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}", "too_large", "line 2"),
]


@pytest.mark.parametrize(("line", "reason", "says"), BAD, ids=[f"{b[1]}_{i}" for i, b in enumerate(BAD)])
def test_a_bad_line_is_reported_with_its_number_and_reason(
    line: bytes, reason: str, says: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "pages move"}\n' + line + b'\n{"text": "every code"}\n')
    with pytest.raises(DataError, match=says) as caught:
        prepared(path, tokenizer)
    assert (caught.value.reason, caught.value.place) == (reason, "line 2")
    assert str(caught.value).endswith("Correct it, or skip unusable rows with skip_bad_lines=True")
    assert spelled(caught.value.words, as_flag).endswith("Correct it, or skip unusable rows with --skip-bad-lines")
    data = prepared(path, tokenizer, skip_bad_lines=True)
    assert len(data) == 2
    assert data.statistics.bad == {reason: 1}


def test_a_line_beyond_the_limit_is_rejected_without_being_read(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "x" * 5000}) + "\n" + json.dumps({"text": "pages move"}) + "\n")
    with pytest.raises(DataError, match="line 1: is longer than 1,000 bytes"):
        prepared(path, tokenizer, max_row_nbytes=1000)
    assert len(prepared(path, tokenizer, max_row_nbytes=1000, skip_bad_lines=True)) == 1


def test_an_example_beyond_the_limit_is_truncated_or_dropped_and_counted(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": "every code counts " * 9}, {"text": "pages"}])
    cut = prepared(path, tokenizer, max_length=8)
    assert (cut.lengths.max(), cut.statistics.truncated, len(cut)) == (8, 1, 2)
    dropped = prepared(path, tokenizer, max_length=8, too_long="drop")
    assert (len(dropped), dropped.statistics.dropped) == (1, {"too_long": 1})


def test_data_without_an_example_are_rejected_with_the_counts(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "the block"}]}])
    with pytest.raises(DataError, match="nothing_to_train: 1") as caught:
        prepared(path, tokenizer)
    assert str(caught.value).endswith("Check the data, seq_len and too_long")
    assert spelled(caught.value.words, as_flag).endswith("Check the data, --seq-len and --too-long")
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(DataError, match="the data have no rows"):
        prepared(tmp_path / "none.jsonl", tokenizer)


def test_a_missing_source_is_a_usage_error(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no\.jsonl: does not exist"):
        prepared(tmp_path / "no.jsonl", tokenizer)
    (tmp_path / "rows.csv").touch()
    with pytest.raises(UsageError, match="must end in one of"):
        prepared(tmp_path / "rows.csv", tokenizer)


def test_the_cache_is_keyed_by_content(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    original = prepare._build
    monkeypatch.setattr(prepare, "_build", lambda *args: built.append(args[1]) or original(*args))
    path = write(tmp_path / "rows.jsonl", TEXTS)
    first = prepared(path, tokenizer)
    assert examples(prepared(path, tokenizer)) == examples(first)
    moved = path.rename(tmp_path / "moved.jsonl")
    prepared(moved, tokenizer)
    assert len(built) == 1
    other = runs.small_tokenizer()
    other.chat_template = "{{ messages }}"
    prepared(moved, other)
    prepared(moved, tokenizer, max_length=32)
    write(moved, [*TEXTS, {"text": "more"}])
    assert len(prepared(moved, tokenizer)) == 3
    assert len(built) == len(set(built)) == 4


@pytest.mark.parametrize("name", ["header.json", "tokens", "trained", "starts"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_cache_is_rebuilt(name: str, damage: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", TEXTS)
    cache = tmp_path / "tokens_cache"
    settings = DataSettings(max_length=64)
    expected = examples(prepare_data(path, tokenizer, settings, cache=cache))
    folder = next(entry for entry in cache.iterdir() if entry.is_dir())
    file = next(entry for entry in folder.iterdir() if entry.stem == Path(name).stem)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(data if damage == "flip" else data[:-1])
    again = prepare_data(path, tokenizer, settings, cache=cache)
    assert examples(again) == expected


@pytest.mark.parametrize("fault", ["ENOSPC", "full from here on", "kill"])
def test_a_disk_that_fails_at_any_call_leaves_no_cache_or_a_complete_one(
    fault: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.jsonl", TEXTS)
    settings = DataSettings(max_length=64)
    expected = examples(prepare_data(path, tokenizer, settings, cache=tmp_path / "expected"))
    counted = FaultyDisk()
    monkeypatch.setattr(prepare, "Disk", lambda: counted)
    prepare_data(path, tokenizer, settings, cache=tmp_path / "counted")
    assert counted.n_calls >= 20
    for number in range(counted.n_calls):
        cache = tmp_path / f"at_{number}"
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "Disk", lambda number=number: FaultyDisk(number, fault))
            # If every call fails, removing the unfinished cache also fails, silently.
            with contextlib.suppress(TargetError, Killed):
                prepare_data(path, tokenizer, settings, cache=cache)
        assert examples(prepare_data(path, tokenizer, settings, cache=cache)) == expected, number
        assert not list(cache.glob("*.partial"))


def test_a_file_that_changes_while_it_is_read_is_detected(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", TEXTS)

    def append(_: int) -> None:
        with path.open("a") as file:
            file.write(json.dumps(TEXTS[0]) + "\n")

    with pytest.raises(DataError, match="changed while it was read"):
        prepare_data(path, tokenizer, DataSettings(max_length=64), on_rows=append)


def test_the_trained_tokens_of_an_example_are_marked(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = prepared(write(tmp_path / "rows.jsonl", CHATS[:1]), tokenizer)
    shown = show_example(tokenizer, data[0])
    assert "«holds one scale<|im_end|>»" in shown
    assert shown.count("«") == 1


def test_data_cannot_control_the_terminal(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = prepared(write(tmp_path / "rows.jsonl", [{"text": "a\x1b[31mb"}]), tokenizer)
    assert "\x1b" not in show_example(tokenizer, data[0])


def test_the_first_token_has_no_label(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = prepared(write(tmp_path / "rows.jsonl", TEXTS), tokenizer)
    for row in (data[0], data[1]):
        assert row["labels"][0] == IGNORED
        assert torch.equal(row["labels"][1:], row["input_ids"][1:])


def test_a_template_that_exceeds_a_limit_is_no_error_of_a_row(tmp_path: Path) -> None:
    tokenizer = runs.small_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content * 10000000 }}"
    with pytest.raises(ArtifactError, match="the tokenizer: the chat template"):
        prepared(write(tmp_path / "rows.jsonl", CHATS), tokenizer, skip_bad_lines=True)


def test_the_first_error_is_raised_whether_reading_or_rendering_finds_it(
    tmp_path: Path,
) -> None:
    tokenizer = runs.small_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') if messages[0].content == 'refused' else messages[0].content }}"
    refused = {"messages": [{"role": "user", "content": "refused"}]}
    rows = write(tmp_path / "rows.jsonl", [{"text": "x"}, refused, {"nothing": 1}])
    with pytest.raises(DataError, match="line 2: the chat template fails"):
        prepared(rows, tokenizer, loss_on="all")
    rows = write(tmp_path / "other.jsonl", [{"messages": [{"role": "user", "content": "x"}]}, {"nothing": 1}, refused])
    with pytest.raises(DataError, match="line 2: has no 'messages'"):
        prepared(rows, tokenizer, loss_on="all")
