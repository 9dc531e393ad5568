"""Parses the messages of a conversation and what belongs to them: tools, tool calls, variables of the template.

The forms that differ between data sets become one form: the text of a message is a string, the arguments of a tool call
are an object, and the roles have the names that chat templates know.
"""

from __future__ import annotations

from qformat.strict_json import Json
from qformat.training.data.place import BadRow, Place, json_in_string, kind_of

Message = dict[str, Json]

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "model": "assistant",
         "bot": "assistant", "ai": "assistant", "observation": "tool", "function_response": "tool"}  # fmt: skip
"""Role in chat templates by its name in data sets of other tools."""

RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "chat_template", "conversations",
                      "return_assistant_tokens_mask", "continue_final_message"})  # fmt: skip
"""Variables that the row itself or the preparation sets."""


def parse_messages(value: Json, name: str, place: Place) -> list[Message]:
    """Parse a list of messages.

    Args:
        value: The list, each entry with `role` and `content`.
        name: Name of the field.
        place: Origin of the row.

    Returns:
        The messages.

    Raises:
        DataError: The list is empty, or a message cannot be used.
    """
    if not isinstance(value, list):
        place.refuse(BadRow.WRONG_TYPE, f"{name!r}: expected a list of messages, got {kind_of(value)}")
    if not value:
        place.refuse(BadRow.EMPTY, f"{name!r} has no messages")
    return [_message(entry, f"{name}[{index}]", place) for index, entry in enumerate(value)]


def parse_tools(value: Json, place: Place) -> list[Json] | None:
    """Return the tools of a row. Hub datasets often store them as JSON text, because their types vary by row.

    Args:
        value: A list of objects, the same as JSON text, or None.
        place: Origin of the row.

    Returns:
        The tools, or None if the row has none.

    Raises:
        DataError: The value is not a list of objects.
    """
    if isinstance(value, str):
        value = json_in_string(value, "'tools'", place)
    if value is None:
        return None
    if not isinstance(value, list):
        place.refuse(BadRow.WRONG_TYPE, f"'tools': expected a list of objects, got {kind_of(value)}")
    tools = [json_in_string(tool, f"tools[{index}]", place) if isinstance(tool, str) else tool
             for index, tool in enumerate(value)]  # fmt: skip
    if not all(isinstance(tool, dict) for tool in tools):
        place.refuse(BadRow.WRONG_TYPE, f"'tools': expected a list of objects, got {kind_of(value)}")
    return tools


def parse_template_kwargs(value: Json, place: Place) -> dict[str, Json]:
    """Return the variables that a row sets in the chat template, such as `enable_thinking`.

    Args:
        value: An object, the same as JSON text, or None. Null values count as absent.
        place: Origin of the row.

    Returns:
        The variables by name.

    Raises:
        DataError: The value is not an object, or sets a variable that belongs to the preparation.
    """
    name = "chat_template_kwargs"
    if isinstance(value, str):
        value = json_in_string(value, f"{name!r}", place)
    if value is None:
        return {}
    if not isinstance(value, dict):
        place.refuse(BadRow.WRONG_TYPE, f"{name!r}: expected an object, got {kind_of(value)}")
    for reserved in sorted(RESERVED & value.keys()):
        place.refuse(BadRow.WRONG_TYPE, f"{name!r}: cannot set {reserved!r}")
    return {key: entry for key, entry in value.items() if entry is not None}


def _message(value: Json, name: str, place: Place) -> Message:
    if not isinstance(value, dict):
        place.refuse(BadRow.WRONG_TYPE, f"{name}: expected an object with 'role' and 'content', got {kind_of(value)}")
    # Drop nulls as transformers does: templates print a null as "None" but handle an absent key.
    message: Message = {key: entry for key, entry in value.items() if entry is not None}
    role = message.get("role")
    if not isinstance(role, str):
        place.refuse(BadRow.WRONG_TYPE, f"{name}: 'role': expected a string, got {kind_of(role)}")
    message["role"] = ROLES.get(role, role)
    if isinstance(message.get("content"), list):
        message["content"] = _joined_parts(message["content"], name, place)
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], name, place)
        if not message["tool_calls"]:
            del message["tool_calls"]
    if not isinstance(message.get("content"), str) and not ("content" not in message and "tool_calls" in message):
        place.refuse(BadRow.WRONG_TYPE, f"{name}: 'content': expected a string, got {kind_of(value.get('content'))}")
    return message


def _joined_parts(parts: Json, name: str, place: Place) -> str:
    """Return the text of a content that is a list of parts, as OpenAI and multimodal models write it."""
    assert isinstance(parts, list)
    texts = []
    for index, part in enumerate(parts):
        if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            kind = f"a part of type {part.get('type')!r}" if isinstance(part, dict) else kind_of(part)
            place.refuse(
                BadRow.WRONG_TYPE,
                f"{name}: content[{index}]: expected a text, got {kind}",
                next_step="Only text can be trained on. Remove images, sounds and other parts",
            )
    return "".join(map(str, texts))


def _tool_calls(value: Json, name: str, place: Place) -> list[Json]:
    if isinstance(value, str):
        value = json_in_string(value, f"{name}: 'tool_calls'", place)
    if not isinstance(value, list):
        place.refuse(BadRow.WRONG_TYPE, f"{name}: 'tool_calls': expected a list of objects, got {kind_of(value)}")
    return [_tool_call(call, f"{name}: tool_calls[{index}]", place) for index, call in enumerate(value)]


def _tool_call(value: Json, name: str, place: Place) -> Message:
    """Parse a tool call. OpenAI writes its arguments as JSON text, and templates would quote that text once more."""
    if not isinstance(value, dict):
        place.refuse(BadRow.WRONG_TYPE, f"{name}: expected an object, got {kind_of(value)}")
    call: Message = {key: entry for key, entry in value.items() if entry is not None}
    function = call.get("function")
    if isinstance(function, dict):
        call["function"] = _with_decoded_arguments(function, name, place)
        return call
    return _with_decoded_arguments(call, name, place)


def _with_decoded_arguments(function: Message, name: str, place: Place) -> Message:
    found: Message = {key: entry for key, entry in function.items() if entry is not None}
    if isinstance(found.get("arguments"), str):
        text = str(found["arguments"])
        found["arguments"] = json_in_string(text, f"{name}: 'arguments'", place) if text.strip() else {}
    found.setdefault("arguments", {})
    return found
