"""Text arrives piece by piece while it is generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qformat.model.text.generation import generate
from tests.training import runs


class Writer(torch.nn.Module):
    """A stand-in for a model: it "generates" the tokens of a text, one at a time."""

    device = torch.device("cpu")

    def __init__(self, tokens: list[int]) -> None:
        super().__init__()
        self.tokens = tokens
        self.n_generated = 0

    def can_generate(self) -> bool:
        return True

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return torch.nn.Embedding(runs.VOCABULARY, 1)

    def get_output_embeddings(self) -> torch.nn.Module:
        return torch.nn.Identity()

    def generate(self, *, input_ids: torch.Tensor, streamer: Any, **_: object) -> None:
        streamer.put(input_ids)
        for token in self.tokens:
            self.n_generated += 1
            streamer.put(torch.tensor([token]))
        streamer.end()


def stream(text: str, on_text: Callable[[Writer, str], None], *, drop: int = 0) -> str:
    """Generate a text, without its last `drop` tokens, and return what `generate` says that it was."""
    tokenizer = runs.small_tokenizer()
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    writer = Writer(tokens[: len(tokens) - drop])
    return generate(writer, tokenizer, "a prompt", on_text=lambda piece: on_text(writer, piece)).text  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "Two words",
        "one line\nand another\n",
        " spaces  around ",
        "no_spaces_at_all_in_it",
        "日本語のテキスト",
        "naïve 🙂🙂 é",
    ],
)
def test_every_token_that_completes_a_character_is_passed_on_at_once(text: str) -> None:
    pieces: list[tuple[int, str]] = []
    assert stream(text, lambda writer, piece: pieces.append((writer.n_generated, piece))) == text
    assert "".join(piece for _, piece in pieces) == text
    tokenizer = runs.small_tokenizer()
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    assert len(tokens) > 1
    complete = [n for n in range(1, len(tokens) + 1) if not tokenizer.decode(tokens[:n]).endswith("\ufffd")]
    assert [n for n, _ in pieces] == complete


def test_a_character_that_stays_incomplete_is_passed_on_at_the_end() -> None:
    pieces: list[str] = []
    text = stream("ab🙂", lambda _, piece: pieces.append(piece), drop=1)
    assert "".join(pieces) == text
    assert text.startswith("ab")
    assert text.endswith("\ufffd")


def test_special_tokens_are_left_out() -> None:
    def ignore(_: Writer, piece: str) -> None:
        assert piece

    assert stream("the end</s>", ignore) == "the end"


def test_a_failure_of_the_reader_ends_the_generation() -> None:
    def fail(_: Writer, piece: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        stream("some text", fail)
