"""The chat templates of many models, as trl ships them, and conversations of the forms that they have to render."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trl

from qformat.training.data.place import Place
from qformat.training.data.render import LossOn, Rendered, Renderer
from qformat.training.data.rows import parse_fields
from tests.training import runs

FOLDER = Path(trl.__file__).parent / "chat_templates"

STOCK = tuple(sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training")))
PATCHED = tuple(name for name in STOCK if (FOLDER / f"{name}_training.jinja").is_file())
"""Templates that trl replaces with a version for training."""

SPECIAL = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|return|>", "<|eot_id|>", "<|start|>", "<|message|>")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


SYSTEM = {"role": "system", "content": "Answer in one word"}
TURNS = [
    [user("Hi there"), assistant("Hello")],
    [user("Who are you?"), assistant("A model")],
    [user("Are you sure?"), assistant("Yes indeed")],
]
THREE_TURNS = [message for turn in TURNS for message in turn]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Report it",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOL_USE = [
    user("How warm is it in Paris?"),
    assistant("", tool_calls=[CALL]),
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "18 degrees"},
    assistant("It is warm there"),
]

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": TURNS[0]},
    "two turns": {"messages": THREE_TURNS[:4]},
    "three turns": {"messages": THREE_TURNS},
    "system, one turn": {"messages": [SYSTEM, *TURNS[0]]},
    "system, three turns": {"messages": [SYSTEM, *THREE_TURNS]},
    "tools": {"messages": TOOL_USE, "tools": TOOLS},
    "tools, more turns": {"messages": [*TOOL_USE, *TURNS[0]], "tools": TOOLS},
    "reasoning": {"messages": [user("2 + 2?"), assistant("Four", reasoning_content="Two and two")]},
    "reasoning twice": {
        "messages": [
            *(user("2 + 2?"), assistant("Four", reasoning_content="Two and two")),
            *(user("3 + 3?"), assistant("Six", reasoning_content="Three and three")),
        ]
    },
}


def tokenizer_with(template: str) -> Any:
    tokenizer = runs.small_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = template
    return tokenizer


def source_of(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def render(
    template: str | dict[str, str], fields: dict[str, Any], place: Place, loss_on: LossOn = LossOn.COMPLETIONS
) -> Rendered:
    """Render one row. Raises the error of a row that is refused."""
    tokenizer = tokenizer_with("")
    tokenizer.chat_template = template
    return Renderer(tokenizer, loss_on).render(parse_fields(fields, place))
