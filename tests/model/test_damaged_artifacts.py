"""Every damaged artifact of the specification's corpus is refused by the loader, with the reason that verify gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from qformat.errors import ArtifactError
from qformat.model.load import load_model
from tests.spec import corpus
from tests.spec.test_edited_artifacts import make, refused_by

# Without its manifest an artifact is a folder as bitsandbytes writes it, which loads, with a warning.
REFUSED = [vector for vector in refused_by("open") if vector["name"] != "no_manifest"]


@pytest.mark.parametrize("vector", REFUSED, ids=corpus.name_of)
def test_what_the_reader_refuses_is_refused_with_its_reason(vector: corpus.Vector, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as refusal:
        load_model(make(vector, tmp_path), device="cpu")
    assert (refusal.value.reason.value, refusal.value.tensor) == (vector["reason"], vector["tensor"])


# A full verification reads what `qformat verify` reads: not the SHA-256 of shards, whose bytes have another digest.
FOUND = [vector for vector in refused_by("verify") if vector["name"] != "changed_sha256_of_shard"]


@pytest.mark.parametrize("vector", FOUND, ids=corpus.name_of)
def test_what_only_verify_finds_is_refused_by_a_full_verification(vector: corpus.Vector, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as refusal:
        load_model(make(vector, tmp_path), device="cpu", verify="full")
    assert refusal.value.reason.value == vector["reason"]
