"""Damage to the tokenizer's files and to the chat template, and to files that only accompany the model."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from tests.corpus.damage.edits import Damage, Where, any_edit
from tests.corpus.damage.odd_json import damage_json, set_json

TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_FILES = (TOKENIZER, TOKENIZER_CONFIG, TEMPLATE)
_OF_TEMPLATE = (TEMPLATE, TOKENIZER_CONFIG, "the chat template")


def tokenizer(random: Random, folder: Path) -> Damage:
    return Damage(_FILES, damage_json(random, folder / TOKENIZER))


_TOKENIZER: list[tuple[tuple[Any, ...], Any]] = [
    *((("model", "vocab"), value) for value in ({}, [], "x", {"a": 10**9}, {"a": -1}, {"a": "x"})),
    *((("model", "merges"), value) for value in ([["x"]], "x", [[1, 2]], ["a b c"], [["q", "zz"]])),
    *((("model", "type"), value) for value in ("Unigram", "x", None, "WordLevel")),
    *((("model", "unk_token"), value) for value in ("x", 3)),
    *((("added_tokens",), value) for value in ([], {}, [{"id": 10**9, "content": "x"}], [{"id": 0, "content": ""}])),
    *((("added_tokens", 0, "id"), value) for value in (-1, 10**12, 319, "x")),
    *((("added_tokens", 0, "content"), value) for value in ("", "x" * 10_000, None)),
    *((("pre_tokenizer",), value) for value in ({"type": "x"}, [], {"type": "Split", "pattern": {"Regex": "(a+)+$"},
                                                                    "behavior": "Isolated", "invert": False})),
    *((("normalizer",), value) for value in ({"type": "x"}, {"type": "Sequence", "normalizers": []},
                                             {"type": "Replace", "pattern": {"Regex": "("}, "content": "x"})),
    *((("post_processor",), value) for value in ({"type": "x"}, {"type": "TemplateProcessing", "single": [],
                                                                 "pair": [], "special_tokens": {}})),
    *((("decoder",), value) for value in ({"type": "x"}, None, {"type": "Sequence", "decoders": []})),
    *((("truncation",), value) for value in ({"max_length": 0, "strategy": "LongestFirst", "stride": 0,
                                              "direction": "Right"}, "x")),
    *((("padding",), value) for value in ("x", {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_id": 0,
                                                "pad_type_id": 0, "pad_token": "x", "pad_to_multiple_of": None})),
    *((("version",), value) for value in ("9.0", 3, None)),
]  # fmt: skip


def tokenizer_values(random: Random, folder: Path) -> Damage:
    """Set a member of tokenizer.json to a value that its reader may not expect."""
    place, value = random.choice(_TOKENIZER)
    return Damage(_FILES, set_json(folder / TOKENIZER, place, value))


_TOKENIZER_CONFIG: list[tuple[str, Any]] = [
    *(("tokenizer_class", value) for value in ("x", "", 3, None, "LlamaTokenizer", "BertTokenizer", "AutoTokenizer")),
    *(("auto_map", value) for value in ({"AutoTokenizer": ["x.Y", None]}, {"AutoTokenizer": "o/r--m.C"}, "x", [3])),
    *(("chat_template", value) for value in (3, "{{ 1", {"default": "x"}, [{"name": "x"}], "{% for m in 3 %}")),
    *(("model_max_length", value) for value in (0, -1, "x", 10**30, None)),
    *(("bos_token", value) for value in ("", 3, {"content": 3}, {"__type": "AddedToken"}, [])),
    *(("eos_token", value) for value in ("", "new token", None, {"content": "x", "__type": "AddedToken"})),
    *(("pad_token", value) for value in ("another", None, 3)),
    *(("added_tokens_decoder", value) for value in ({"x": {}}, {"0": {"content": 3}}, {"1000000000": {"content": "x"}},
                                                    [])),
    *(("extra_special_tokens", value) for value in ([3], {"x": 3}, "x", {"a": "b"})),
    *(("additional_special_tokens", value) for value in ([3], "x", ["new"])),
    *(("padding_side", value) for value in ("x", "left", 3)),
    *(("truncation_side", value) for value in ("x", 3)),
    *(("clean_up_tokenization_spaces", value) for value in ("x", True)),
    *(("split_special_tokens", value) for value in ("x", True)),
    *(("backend", value) for value in ("x", 3)),
    *(("response_schema", value) for value in ("x", 3)),
    *(("processor_class", value) for value in ("x", 3)),
]  # fmt: skip


def tokenizer_config_values(random: Random, folder: Path) -> Damage:
    name, value = random.choice(_TOKENIZER_CONFIG)
    return Damage(_FILES, set_json(folder / TOKENIZER_CONFIG, (name,), value))


def tokenizer_config(random: Random, folder: Path) -> Damage:
    return Damage(_FILES, damage_json(random, folder / TOKENIZER_CONFIG))


def template_bytes(random: Random, folder: Path) -> Damage:
    return Damage(_OF_TEMPLATE, any_edit(random, folder / TEMPLATE))


_TEMPLATES = [
    "{% for i in range(10 ** 10) %}{% endfor %}", "{{ 'x' * 10 ** 10 }}", "{{ 9 ** 9 ** 9 }}",
    "{% for i in range(10 ** 6) %}{% for j in range(10 ** 6) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages.append(3) }}", "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__ }}", "{% include 'config.json' %}", "{{ raise_exception('\x1b[2Jno') }}",
    "{{ undefined.x.y }}", "{{ messages[5]['content'] }}", "{{ 1 / 0 }}", "", "{%", "{{ messages | tojson }}",
    "{{ messages[0]['content'] | center(10 ** 10) }}", "{{ '%*d' % (10 ** 9, 3) }}", "{{ [1] * 10 ** 10 }}",
    "{{ lipsum(n=100000) }}", "{{ messages | map(attribute='x') | list }}", "{{ 'x' | indent(10 ** 10) }}",
    "{{ 'x'.ljust(10 ** 10) }}", "{{ range(10 ** 9) | list | length }}", "{{ strftime_now('%Y' * 10 ** 6) }}",
    "{% generation %}{{ messages[0]['content'] }}", "{{ bos_token }}{{ '\x1b]0;t\x07' }}", "\ufeff{{ 1 }}",
    "{{ '{:>9999999999}'.format(1) }}", "{{ 'ab' * 3 | int | x }}", "{{ (1,) * 10 ** 10 }}",
]  # fmt: skip


def template_programs(random: Random, folder: Path) -> Damage:
    """Replace the template with one that runs long, needs much memory, fails or wants more than its input."""
    chosen = random.choice(_TEMPLATES)
    (folder / TEMPLATE).write_text(chosen, "utf-8")
    # A program that works may cut every chat short, which is then the problem.
    return Damage((*_OF_TEMPLATE, "no examples are left"), chosen)


def accompanying(random: Random, folder: Path) -> Damage:
    """Change, remove or add a file that only accompanies the model: nothing of it is refused."""
    path = folder / "LICENSE"
    match random.randrange(3):
        case 0:
            what = any_edit(random, path)
        case 1:
            path.unlink()
            what = "removed"
        case _:
            name = random.choice(["README.md", "trainer_state.json", "training_args.bin", "a\x1b[2J.png"])
            (folder / name).write_bytes(random.randbytes(50))
            what = f"{name!r} added"
    return Damage((path.name,), what, Where.ACCOMPANYING)


def unlisted(random: Random, folder: Path) -> Damage:
    """Add a file that the manifest does not list."""
    name = random.choice(["adapter_config.json", "modeling_x.py", "pytorch_model.bin", "x.safetensors", "vocab.json",
                          "added_tokens.json", "special_tokens_map.json", "merges.txt", "chat_template.json",
                          "processor_config.json", "a\x1b[2Jb"])  # fmt: skip
    content = random.choice([b"", b"{}", b"[]", b"\xff\xfe", json.dumps({"a": 1}).encode(), random.randbytes(64)])
    (folder / name).write_bytes(content)
    return Damage((name, name.replace("\x1b", "\\x1b"), *_FILES), f"{name!r} added: {content[:10]!r}", Where.UNLISTED)
