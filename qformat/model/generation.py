"""Text from a model, token by token, with the figures that a user asks for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from qformat.errors import Option, UsageError
from qformat.model.memory import peak_nbytes


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; seed makes sampling repeatable on one machine."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """What was generated. Seconds; tokens_per_s counts the tokens after the first; peak_nbytes is of the whole process
    on a CPU and of torch's allocations on a GPU."""

    text: str
    n_prompt_tokens: int
    n_new_tokens: int
    first_token_s: float
    tokens_per_s: float
    peak_nbytes: int


class _Clock(TextStreamer):
    """Passes text on as it is finished and notes when each token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self.times: list[float] = []
        self.text = ""

    def put(self, value: Any) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.monotonic())
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self._on_text(text)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    chat: bool = False,
    sampling: Sampling | None = None,
    on_text: Callable[[str], None] = lambda _: None,
) -> Generation:
    """Continue a prompt, or answer it as a chat message; `on_text` gets the text piece by piece.

    Raises UsageError for an empty prompt, and for a chat with a tokenizer that has no chat template.
    """
    sampling = sampling or Sampling()
    inputs = _inputs(tokenizer, prompt, chat=chat).to(model.device)
    n_prompt = int(inputs["input_ids"].shape[1])
    if n_prompt == 0:
        raise UsageError("the prompt has no tokens")
    choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature > 0:
        choice = {"do_sample": True, "temperature": sampling.temperature}
        set_seed(sampling.seed)
    clock = _Clock(tokenizer, on_text)
    started = time.monotonic()
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=sampling.max_new_tokens, streamer=clock, **choice)  # type: ignore[operator]
    n_new = len(clock.times)
    after_first = clock.times[-1] - clock.times[0]
    return Generation(
        text=clock.text,
        n_prompt_tokens=n_prompt,
        n_new_tokens=n_new,
        first_token_s=clock.times[0] - started,
        tokens_per_s=(n_new - 1) / after_first if after_first > 0 else 0.0,
        peak_nbytes=peak_nbytes(model.device),
    )


def _inputs(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool) -> Any:
    if not chat:
        return tokenizer(prompt, return_tensors="pt")
    if tokenizer.chat_template is None:
        raise UsageError(
            "this tokenizer has no chat template. Leave out ", Option("chat"), ", and write the whole prompt yourself"
        )
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
