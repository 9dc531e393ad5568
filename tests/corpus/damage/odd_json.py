"""Edits of JSON files as objects: values of other types, missing and repeated members, numbers beyond every limit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from random import Random
from typing import Any

from tests.corpus.damage.edits import any_edit

Json = Any

ODD: list[Json] = [
    None, True, False, 0, 1, -1, 2, 7, 64.5, -0.5, 1e308, 10**18, 2**31, 2**63, 3_000_000, "", "x", "..", "0", "🦙",
    "\x1b[31m", "a" * 5000, "owner/name", "float8_e4m3fn", "__class__", "{{ 1 }}", [], {}, [[]], [0], [None], ["x", 1],
    {"": ""}, {"a": {"b": []}}, [1] * 300, {"type": "x"},
]  # fmt: skip


def places_in(value: Json, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a JSON value."""
    found = [prefix] if prefix else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places_in(inner, (*prefix, key))
    return found


def at(value: Json, place: tuple[Any, ...]) -> Json:
    for key in place:
        value = value[key]
    return value


def odd_edit(random: Random, record: Json) -> str:
    """Change one value anywhere in a record, and return what was done."""
    place = random.choice(places_in(record))
    holder, last = at(record, place[:-1]), place[-1]
    name = "/".join(map(str, place))
    match random.randrange(5):
        case 0:
            del holder[last]
            return f"{name} removed"
        case 1 if isinstance(holder, dict):
            new = random.choice(["", "x", "\x1b]0;t\x07", "auto_map", "a" * 600, *map(str, holder)])
            holder[new] = holder.pop(last)
            return f"{name} renamed to {new[:20]!r}"
        case 2 if type(holder[last]) is int:
            holder[last] += random.choice([-1, 1, -(2**40), 2**40, 2**63])
            return f"{name} = {holder[last]}"
        case 3:
            holder[last] = copy.deepcopy(at(record, random.choice(places_in(record))))
            return f"{name} = {str(holder[last])[:40]}"
        case _:
            holder[last] = copy.deepcopy(random.choice(ODD))
            return f"{name} = {str(holder[last])[:40]!r}"


def odd_text(random: Random, text: str) -> tuple[str, str]:
    """Change the text of a JSON object in a way that objects cannot express."""
    match random.randrange(5):
        case 0:
            return text.replace("{", '{"x": NaN, ', 1), "a member NaN"
        case 1:
            key = random.choice(list(json.loads(text)))
            return text.replace("{", "{" + json.dumps(key) + ": 0, ", 1), f"{key!r} twice"
        case 2:
            return text.replace("{", '{"x": ' + "[" * 100_000 + "]" * 100_000 + ", ", 1), "100,000 levels"
        case 3:
            return text.replace("{", '{"x": ' + "9" * 5000 + ", ", 1), "an integer of 5,000 digits"
        case _:
            return text.replace("{", '{"x": "\\ud800", ', 1), "half a surrogate pair"


def damage_json(random: Random, path: Path) -> str:
    """Change a JSON file: its bytes, its text or its object."""
    match random.randrange(5):
        case 0:
            return any_edit(random, path)
        case 1:
            text, what = odd_text(random, path.read_text("utf-8"))
            path.write_text(text, "utf-8")
            return what
        case _:
            record = json.loads(path.read_bytes())
            what = "; ".join(odd_edit(random, record) for _ in range(random.choice([1, 1, 2])) if places_in(record))
            path.write_text(json.dumps(record, indent=2), "utf-8")
            return what


def set_json(path: Path, place: tuple[Any, ...], value: Json) -> str:
    """Set one member of a JSON file, and return what was done."""
    record = json.loads(path.read_bytes())
    at(record, place[:-1])[place[-1]] = value
    path.write_text(json.dumps(record, indent=2), "utf-8")
    return f"{'/'.join(map(str, place))} = {str(value)[:40]!r}"
