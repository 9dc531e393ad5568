"""Every chat template that trl ships renders conversations completely, or the row is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trl.chat_template_utils import get_training_chat_template

from qformat.errors import DataError
from qformat.training.data.place import BadRow, Place
from qformat.training.data.render import Rendered
from qformat.training.data.tokenise import own_tokenizer, tokenise
from tests.training.data.chat import stock_templates
from tests.training.data.chat.stock_templates import CONVERSATIONS, PATCHED, STOCK, source_of, tokenizer_with

WITHOUT_TOOLS = {
    *("cohere", "cohere2", "deepseek_r1_distill", "gemma", "gemma3", "idefics3", "llama3", "llava_next"),
    *("phi3", "phi3_5", "qwen2_5_vl", "smolvlm"),
}
WITHOUT_SYSTEM = {"gemma"}
WITH_REASONING = {
    *("glm4moe", "gptoss", "muse_glimmer", "diffusion_gemma", "gemma4_v5", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"),
    *("nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"),
    *("qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"),
}
WITH_EARLIER_REASONING = {*("muse_glimmer", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8")}
"""Templates, or their versions for training, that show the reasoning of earlier turns."""


def refuses(name: str, conversation: str) -> bool:
    """Return whether a template cannot show a conversation."""
    return (
        ("tools" in conversation and name in WITHOUT_TOOLS)
        or ("system" in conversation and name in WITHOUT_SYSTEM)
        or (conversation == "reasoning" and name not in WITH_REASONING)
        or (conversation == "reasoning twice" and name not in WITH_EARLIER_REASONING)
    )


def render(template: str, row: dict[str, Any]) -> Rendered:
    return stock_templates.render(template, row, Place(Path("rows"), "line", 7))


def untrained(rendered: Rendered) -> str:
    """Return the text with a line break in the place of each trained range."""
    text, spans = rendered.text, rendered.spans
    assert spans is not None
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    return "\n".join(text[edges[n] : edges[n + 1]] for n in range(0, len(edges), 2))


def check_turns(rendered: Rendered, row: dict[str, Any]) -> None:
    """Check that what the assistant wrote is trained, and nothing that others wrote."""
    assert rendered.spans is not None
    trained = "\n".join(rendered.text[start:stop] for start, stop in rendered.spans)
    for message in row["messages"]:
        assert message["content"] in (trained if message["role"] == "assistant" else untrained(rendered))
        assert message["role"] == "assistant" or message["content"] not in trained


def test_there_are_templates() -> None:
    assert len(STOCK) > 40
    assert len(PATCHED) > 25


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_the_turns_of_the_assistant_are_trained_or_the_row_is_refused(conversation: str) -> None:
    row = CONVERSATIONS[conversation]
    for name in STOCK:
        if not refuses(name, conversation):
            check_turns(render(source_of(name), row), row)
            continue
        with pytest.raises(DataError, match="line 7") as caught:
            render(source_of(name), row)
        assert caught.value.reason in (BadRow.LOST_CONTENT, BadRow.TEMPLATE_REFUSED), name


@pytest.mark.parametrize("conversation", ["two turns", "three turns", "system, three turns"])
def test_a_template_that_trl_does_not_know_is_trained_on_too(conversation: str) -> None:
    row = CONVERSATIONS[conversation]
    for name in STOCK:
        if not refuses(name, conversation):
            check_turns(render(source_of(name) + "{# edited #}", row), row)


@pytest.mark.parametrize("conversation", ["one turn", "three turns", "tools"])
def test_tokens_and_mask_are_those_of_transformers_with_the_template_of_trl(conversation: str) -> None:
    row = CONVERSATIONS[conversation]
    for name in PATCHED:
        if refuses(name, conversation):
            continue
        tokenizer = tokenizer_with(source_of(name))
        rendered = render(source_of(name), row)
        (ours,) = tokenise(own_tokenizer(tokenizer), [rendered], bos_id=tokenizer.bos_token_id)
        content = row["messages"]
        if name in ("idefics3", "smolvlm", "llava_next"):
            content = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in content]
        theirs = tokenizer.apply_chat_template(
            content,
            tools=row.get("tools"),
            chat_template=get_training_chat_template(tokenizer),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        mask = np.array(theirs["assistant_masks"], bool)
        mask[:1] = False
        assert ours.ids.tolist() == theirs["input_ids"], name
        assert ours.trained.tolist() == mask.tolist(), name
