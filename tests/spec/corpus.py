"""The conformance corpus of spec/vectors. A missing or short file fails a test and is never created."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.repository import ROOT

SPEC = ROOT / "spec" / "README.md"
SCHEMA = ROOT / "spec" / "manifest.schema.json"
VECTORS = ROOT / "spec" / "vectors"
ARTIFACTS = VECTORS / "artifacts"

AT_LEAST = {"tensors.json": 45, "artifacts.json": 10, "edited.json": 300}
"""Smallest number of vectors per file, because an empty corpus would pass every test."""

Vector = dict[str, Any]


def load(file: str, member: str = "vectors") -> list[Vector]:
    """Return the vectors of one file."""
    vectors: list[Vector] = json.loads((VECTORS / file).read_text("utf-8"))[member]
    assert len(vectors) >= AT_LEAST[file], f"{file} has {len(vectors)} vectors, expected {AT_LEAST[file]} or more"
    names = [vector["name"] for vector in vectors]
    assert len(set(names)) == len(names), f"{file}: a name occurs twice"
    return vectors


def tensors() -> list[Vector]:
    return load("tensors.json")


def artifacts() -> list[Vector]:
    return load("artifacts.json", "artifacts")


def edited() -> list[Vector]:
    return load("edited.json")


def name_of(vector: Vector) -> str:
    """Return the id of a vector in the output of pytest."""
    return str(vector["name"])


def copy_of(base: str, tmp_path: Path) -> Path:
    """Return a copy of an artifact in a directory with the layout of the Hub's cache."""
    folder = tmp_path / "models--test" / "snapshots" / ("0" * 40)
    shutil.copytree(ARTIFACTS / base, folder)
    return folder
