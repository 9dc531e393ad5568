"""The artifacts of spec/vectors/edited.json, and which of them opening and verification reject."""

from __future__ import annotations

from pathlib import Path

from tests.spec import corpus, edits

ALL = corpus.edited()


def refused_by(check: str | None) -> list[corpus.Vector]:
    return [vector for vector in ALL if vector["refused_by"] == check]


def make(vector: corpus.Vector, tmp_path: Path) -> Path:
    folder = corpus.copy_of(vector["base"], tmp_path)
    edits.apply(vector["edits"], folder)
    return folder
