"""spec/manifest.schema.json and the parser agree. The parser is stricter, and the vectors show where."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from tests.spec import corpus, edits

SCHEMA = json.loads(corpus.SCHEMA.read_text("utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
BEYOND_THE_SCHEMA = {
    "manifest_packed_tensor_is_no_weight",
    "manifest_component_is_a_tensor",
    "manifest_tensor_named_like_a_component",
}
"""Manifests that only the parser rejects: a schema cannot express that member names depend on other members."""

JUDGED = [vector for vector in corpus.edited() if "schema" in vector]


def accepts(folder: Path) -> bool:
    return bool(VALIDATOR.is_valid(json.loads((folder / edits.MANIFEST).read_bytes())))


def test_the_schema_is_a_valid_json_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("vector", corpus.artifacts(), ids=corpus.name_of)
def test_schema_accepts_the_manifest_of_every_valid_artifact(vector: corpus.Vector) -> None:
    VALIDATOR.validate(json.loads((corpus.ARTIFACTS / vector["name"] / edits.MANIFEST).read_bytes()))


@pytest.mark.parametrize("vector", JUDGED, ids=corpus.name_of)
def test_schema_accepts_or_rejects_a_faulty_manifest_as_the_vector_expects(
    vector: corpus.Vector, tmp_path: Path
) -> None:
    folder = corpus.copy_of(vector["base"], tmp_path)
    edits.apply(vector["edits"], folder)
    assert accepts(folder) == (vector["schema"] == "accepts")


def test_every_vector_with_a_faulty_manifest_member_has_a_result_for_the_schema() -> None:
    about_members = {"manifest_field", "unsupported_version", "unsupported_feature"}
    unjudged = [v["name"] for v in corpus.edited() if v.get("reason") in about_members and "schema" not in v]
    assert unjudged == []
    accepted = {v["name"] for v in JUDGED if v["schema"] == "accepts" and v["reason"] == "manifest_field"}
    assert accepted == BEYOND_THE_SCHEMA


@pytest.mark.parametrize("vector", [v for v in corpus.edited() if v["refused_by"] is None], ids=corpus.name_of)
def test_schema_accepts_the_manifest_of_unusual_artifacts(vector: corpus.Vector, tmp_path: Path) -> None:
    folder = corpus.copy_of(vector["base"], tmp_path)
    edits.apply(vector["edits"], folder)
    assert accepts(folder)
