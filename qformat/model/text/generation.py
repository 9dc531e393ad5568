"""Generates text with a model, token by token, and measures speed and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from qformat.errors import Option, UsageError, first_line
from qformat.model.boundary import check_can_generate, check_tokens, generation_errors
from qformat.model.memory import peak_nbytes
from qformat.model.nf4_linear import NF4Linear
from qformat.model.text.chat_template import ChatTemplate
from qformat.model.text.rendering import render

_INCOMPLETE = "\ufffd"
"""What tokenizers decode the first bytes of a character to while its other bytes are still missing."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose the next token.

    Attributes:
        max_new_tokens: Largest number of tokens to generate.
        temperature: Temperature of sampling. 0 always takes the most likely token.
        seed: Seed of the random numbers. The same seed gives the same text on the same machine.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """Generated text with its measurements.

    Attributes:
        text: Text without the prompt and without special tokens.
        n_prompt_tokens: Number of tokens of the prompt.
        n_new_tokens: Number of generated tokens.
        first_token_s: Seconds until the first token.
        tokens_per_s: Tokens per second after the first token.
        peak_nbytes: Peak memory in bytes, of the whole process on a CPU and of torch's allocations on a GPU.
    """

    text: str
    n_prompt_tokens: int
    n_new_tokens: int
    first_token_s: float
    tokens_per_s: float
    peak_nbytes: int


class _Stream(BaseStreamer):
    """Passes text on as soon as its characters are complete, and records when each token arrived.

    Every token is decoded together with those of the piece before it, because a tokenizer may drop the space in front
    of the first token that it decodes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._prompt_is_next = True
        self._tokens: list[int] = []
        self._context = 0  # tokens before this one are not decoded any more
        self._n_passed_on = 0
        self.times: list[float] = []
        self.text = ""

    def put(self, value: Any) -> None:
        """Take the prompt at the first call, and one token at each later call."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self.times.append(time.monotonic())
        self._tokens += value.reshape(-1).tolist()
        self._pass_on(at_end=False)

    def end(self) -> None:
        """Pass on the rest of the text."""
        self._pass_on(at_end=True)

    def _pass_on(self, *, at_end: bool) -> None:
        before = self._decode(self._tokens[self._context : self._n_passed_on])
        text = self._decode(self._tokens[self._context :])
        piece = text[len(before) :]
        if not piece or (piece.endswith(_INCOMPLETE) and not at_end):
            return
        self._context, self._n_passed_on = self._n_passed_on, len(self._tokens)
        self.text += piece
        self._on_text(piece)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    chat: bool = False,
    sampling: Sampling | None = None,
    on_text: Callable[[str], None] = lambda _: None,
) -> Generation:
    """Continue a prompt, or answer it as a chat message.

    Args:
        model: Model that generates.
        tokenizer: Tokenizer of the model.
        prompt: Text to continue, or the user's message.
        chat: Put the prompt into the tokenizer's chat template.
        sampling: How to choose tokens, `Sampling()` if omitted.
        on_text: Called with each piece of the text as soon as it is generated.

    Returns:
        The text with its measurements.

    Raises:
        UsageError: The prompt has no tokens, the model does not predict the next token, the tokenizer has no chat
            template or does not belong to the model, or transformers cannot generate with the model's settings.
        ArtifactError: The chat template exceeds a limit.
        DeviceMemoryError: The device has too little memory.
    """
    sampling = sampling or Sampling()
    check_can_generate(model)
    inputs = _inputs(tokenizer, prompt, chat=chat).to(model.device)
    n_prompt = int(inputs["input_ids"].shape[1])
    if n_prompt == 0:
        raise UsageError("the prompt has no tokens")
    check_tokens(int(inputs["input_ids"].max()), model)
    choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature > 0:
        choice = {"do_sample": True, "temperature": sampling.temperature}
        torch.manual_seed(sampling.seed)  # set_seed of transformers imports PEFT, which imports bitsandbytes
    _run_one_row(model)
    stream = _Stream(tokenizer, on_text)
    started = time.monotonic()
    choice |= {
        "num_beams": 1,
        "num_return_sequences": 1,
    }  # a stream shows one text, whatever generation_config.json says
    with torch.inference_mode(), generation_errors(model):
        model.generate(**inputs, max_new_tokens=sampling.max_new_tokens, streamer=stream, **choice)  # type: ignore[operator]
    n_new = len(stream.times)
    after_first = stream.times[-1] - stream.times[0]
    return Generation(
        text=stream.text,
        n_prompt_tokens=n_prompt,
        n_new_tokens=n_new,
        first_token_s=stream.times[0] - started,
        tokens_per_s=(n_new - 1) / after_first if after_first > 0 else 0.0,
        peak_nbytes=peak_nbytes(model.device),
    )


@torch.inference_mode()
def _run_one_row(model: PreTrainedModel) -> None:
    """Run a packed layer on one row, so that on a CPU its kernel is compiled before the text begins."""
    layer = next((layer for layer in model.modules() if isinstance(layer, NF4Linear)), None)
    if layer is not None and layer.weight.device.type == "cpu":
        layer(torch.zeros(1, layer.in_features, dtype=model.dtype))


def _inputs(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool) -> Any:
    if not chat:
        return tokenizer(prompt, return_tensors="pt")
    if tokenizer.chat_template is None:
        raise UsageError(
            "this tokenizer has no chat template. Remove ", Option("chat"), " and write the whole prompt yourself"
        )
    try:
        source = tokenizer.get_chat_template()
    except ValueError as problem:  # several templates, none of which is the default
        raise UsageError(f"this tokenizer has no chat template for a prompt: {first_line(problem)}") from problem
    template = ChatTemplate.of(tokenizer, source)
    text = render(template.rendering([{"role": "user", "content": prompt}], ask=True)).text
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")
