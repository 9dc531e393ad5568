"""Pointers and error pages are recognized as what they are, and nothing else is taken for one of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat.artifact.sources.stand_ins import HEAD_NBYTES, stand_in, stand_in_of
from tests.artifact.not_fetched import POINTER, STAND_INS
from tests.small_models import header_bytes


@pytest.mark.parametrize("kind", STAND_INS)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "pytorch_model.bin", "x.gguf", "modeling_x.py"]
)
def test_what_takes_the_place_of_a_file_is_named_with_the_command_that_fetches_it(kind: str, name: str) -> None:
    data, problem, next_step = STAND_INS[kind]
    found = stand_in(name, data[:HEAD_NBYTES])
    assert found is not None
    assert problem in found.problem
    assert next_step in found.next_step


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("model.safetensors", header_bytes({"a": {}})),
        ("model.safetensors", b""),
        ("tokenizer.json", b'{"version": "1.0"}'),
        ("merges.txt", b"#version: 0.2\nv e\n"),
        ("vocab.txt", b"version\nhttps\n"),
        ("vocab.txt", b"<htmlx>\n"),
        ("chat_template.jinja", b"{% for m in messages %}<html>{% endfor %}"),
        ("LICENSE.html", b"<!DOCTYPE html>"),
        ("LICENSE", b"<!DOCTYPE html>"),
        ("README.md", b"<html>"),
        ("NOTICE", b"Access to models is free."),
        ("a.py", b"# see /annex/objects/x\n"),
        ("notes.txt", (POINTER + b"and more " * 200)[:HEAD_NBYTES]),
    ],
)
def test_real_files_are_not_taken_for_one(name: str, data: bytes) -> None:
    assert stand_in(name, data) is None


def test_a_file_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert stand_in_of(tmp_path / "missing") is None
    assert stand_in_of(tmp_path) is None
