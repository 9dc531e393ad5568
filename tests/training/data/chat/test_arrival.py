"""What a row holds is proved to stand in its text; the variables and templates of a row are the right ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from qformat.errors import DataError
from qformat.training.data.chat.arrival import lost_field
from qformat.training.data.place import BadRow, Place
from qformat.training.data.render import LossOn, Rendered
from tests.training import runs
from tests.training.data.chat import stock_templates
from tests.training.data.chat.stock_templates import (
    CALL,
    SYSTEM,
    THREE_TURNS,
    TOOL_USE,
    TOOLS,
    TURNS,
    assistant,
    source_of,
    tokenizer_with,
    user,
)


def render(template: str | dict[str, str], row: dict[str, Any], loss_on: LossOn = LossOn.COMPLETIONS) -> Rendered:
    return stock_templates.render(template, row, Place(Path("rows.jsonl"), "line", 3), loss_on)


@pytest.mark.parametrize("loss_on", LossOn)
@pytest.mark.parametrize(
    ("template", "field"),
    [
        (
            "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}{% endif %}{% endfor %}",
            r"messages\[2\].content",
        ),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}{{ tools }}", r"messages\[3\]"),
        ("{% for m in messages %}{{ m.content[:9] }}{% endfor %}", r"messages\[0\].content"),
        ("{{ messages[-1].content }}", r"messages\[0\].content"),
    ],
)
def test_content_that_the_template_leaves_out_is_refused_with_line_and_field(
    template: str, field: str, loss_on: LossOn
) -> None:
    messages = [user("How warm is it in Paris?"), assistant("Wait"), {"role": "tool", "content": "18 degrees"}]
    row = {"messages": [*messages, SYSTEM, assistant("Warm")]}
    with pytest.raises(DataError, match=rf"line 3: the chat template leaves out {field}") as caught:
        render(template, row, loss_on)
    assert caught.value.reason == BadRow.LOST_CONTENT


@pytest.mark.parametrize(
    ("template", "field"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", r"tools\[0\].function.name"),
        (
            "{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}",
            r"messages\[1\].tool_calls\[0\].function.arguments",
        ),
        ("{{ tools }} Paris {% for m in messages %}{{ m.content }}{% endfor %}", None),
    ],
)
def test_tools_and_arguments_that_the_template_leaves_out_are_refused(template: str, field: str | None) -> None:
    row = {"messages": [user("How warm?"), *TOOL_USE[1:]], "tools": TOOLS}
    if field is None:
        assert "18 degrees" in render(template, row, LossOn.ALL).text
        return
    with pytest.raises(DataError, match=f"leaves out {field}"):
        render(template, row, LossOn.ALL)


@pytest.mark.parametrize(
    "written",
    [
        "How  warm\nis it?",
        '"How warm\\nis it?"',
        "<think>\n</think>How warm is it?",
        "'How warm\\nis it?'",
    ],
)
def test_spaces_and_quoting_do_not_count(written: str) -> None:
    assert lost_field([user("How warm\nis it?")], None, f"<user>{written}</s>") is None


def test_a_text_that_another_message_repeats_must_stand_there_twice() -> None:
    messages = [user("Say yes"), assistant("yes"), user("Once more"), assistant("yes")]
    assert lost_field(messages, None, "Say yes yes Once more yes") is None
    assert lost_field(messages, None, "Say yes yes Once more") == "messages[3].content"


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "gptoss", "deepseekv3", "glm4moe"])
def test_arguments_as_json_text_are_rendered_as_arguments_that_are_an_object(name: str) -> None:
    row: dict[str, Any] = {"messages": TOOL_USE, "tools": TOOLS}
    as_text = copy.deepcopy(row)
    as_text["messages"][1]["tool_calls"][0]["function"]["arguments"] = json.dumps(CALL["function"]["arguments"])  # type: ignore[index]
    for loss_on in LossOn:
        assert render(source_of(name), as_text, loss_on) == render(source_of(name), row, loss_on)
    assert '\\"city\\"' not in render(source_of(name), as_text).text


def test_arguments_that_are_no_json_are_refused() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": "{city: Paris}"}}
    with pytest.raises(DataError, match=r"line 3: messages\[1\]: tool_calls\[0\]: 'arguments'"):
        render(source_of("qwen2_5"), {"messages": [user("Hi"), assistant("", tool_calls=[call])]})


@pytest.mark.parametrize("name", ["smolvlm", "idefics3", "llava_next"])
def test_a_template_that_reads_parts_gets_parts(name: str) -> None:
    row = {"messages": THREE_TURNS}
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in row["messages"]]
    expected = tokenizer_with(source_of(name)).apply_chat_template(parts, tokenize=False)
    assert render(source_of(name), row, LossOn.ALL).text == expected
    assert render(source_of(name), {"messages": parts}, LossOn.ALL).text == expected


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "phi3"])
def test_a_template_that_reads_strings_gets_strings(name: str) -> None:
    messages = THREE_TURNS
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    assert render(source_of(name), {"messages": parts}) == render(source_of(name), {"messages": messages})


def test_a_part_that_is_no_text_is_refused() -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image", "url": "cat.png"}]
    with pytest.raises(DataError, match=r"messages\[0\]: content\[1\]: .*'image'.*Only text"):
        render(source_of("smolvlm"), {"messages": [{"role": "user", "content": parts}, assistant("A cat")]})


def test_each_row_gets_its_template_if_there_are_several() -> None:
    several = {"default": source_of("llama3"), "tool_use": source_of("qwen2_5")}
    tokenizer = tokenizer_with("")
    tokenizer.chat_template = several
    rows: list[dict[str, Any]] = [
        {"messages": TOOL_USE, "tools": TOOLS},
        {"messages": TURNS[0]},
        {"messages": TURNS[0], "tools": TOOLS},
    ]
    for row in rows:
        expected = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
        assert render(several, row, LossOn.ALL).text == expected
        assert render(several, row).text == expected


@pytest.mark.parametrize("value", [{"enable_thinking": False}, '{"enable_thinking": false}'])
def test_variables_of_a_row_reach_the_template(value: object) -> None:
    template = "{% if enable_thinking is false %}no thoughts{% endif %}" + runs.TEMPLATE
    row = {"messages": TURNS[0], "chat_template_kwargs": value}
    assert render(template, row).text.startswith("no thoughts")
    assert not render(template, {"messages": TURNS[0]}).text.startswith("no thoughts")
    prompt = {"prompt": TURNS[0][:1], "completion": TURNS[0][1:], "chat_template_kwargs": value}
    assert render(template, prompt).text.startswith("no thoughts")


@pytest.mark.parametrize("value", [{"messages": []}, [1], "[1]", {"add_generation_prompt": True}])
def test_variables_that_cannot_be_set_are_refused(value: object) -> None:
    with pytest.raises(DataError, match="line 3: 'chat_template_kwargs'"):
        render(runs.TEMPLATE, {"messages": TURNS[0], "chat_template_kwargs": value})
