"""Loading rejects every damaged artifact of the specification's corpus with the reason that verify reports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import qformat
from qformat.errors import ArtifactError
from qformat.model import load
from qformat.model.load import load_model
from qformat.model.transformers_quantizer import METHOD
from qformat.names import MANIFEST_NAME
from tests.spec import corpus
from tests.spec.edited_artifacts import make, refused_by

# Without its manifest, an artifact is a directory as bitsandbytes writes it, which loads with a warning.
REFUSED = [vector for vector in refused_by("open") if vector["name"] != "no_manifest"]


@pytest.mark.parametrize("vector", REFUSED, ids=corpus.name_of)
def test_loading_rejects_what_the_reader_rejects_with_the_same_reason(vector: corpus.Vector, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as refusal:
        load_model(make(vector, tmp_path), device="cpu")
    assert (refusal.value.reason.value, refusal.value.tensor) == (vector["reason"], vector["tensor"])


# A full verification reads what `qformat verify` reads; shards are checked with XXH3-128, not with SHA-256.
FOUND = [vector for vector in refused_by("verify") if vector["name"] != "changed_sha256_of_shard"]


@pytest.mark.parametrize("vector", FOUND, ids=corpus.name_of)
def test_a_full_verification_rejects_what_only_verify_finds(vector: corpus.Vector, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as refusal:
        load_model(make(vector, tmp_path), device="cpu", verify="full")
    assert refusal.value.reason.value == vector["reason"]


@pytest.fixture
def streaming_to_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load as for a GPU, with the CPU as the target of the copies."""
    real = load.shards_on_device
    monkeypatch.setattr(load, "chosen_device", lambda device: torch.device("cuda", 0))

    def on_the_cpu(layout: Any, device: Any, *, verify: Any) -> Any:
        return real(layout, torch.device("cpu"), verify=verify)

    monkeypatch.setattr(load, "shards_on_device", on_the_cpu)


@pytest.mark.usefixtures("streaming_to_a_device")
@pytest.mark.parametrize("vector", [*REFUSED, *FOUND], ids=corpus.name_of)
def test_loading_to_a_device_rejects_with_the_same_reason(vector: corpus.Vector, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as refusal:
        load_model(make(vector, tmp_path), device="cuda", verify="full")
    assert refusal.value.reason.value == vector["reason"]


@pytest.fixture
def registered() -> Iterator[None]:
    before = AUTO_QUANTIZER_MAPPING[METHOD]
    qformat.register()
    yield
    AUTO_QUANTIZER_MAPPING[METHOD] = before


# transformers reads config.json, the index and headers first, and reports errors there in its own words.
OURS = {"quant_state", "codebook", "nonfinite_scale"}
ONE_OF_EACH_REASON = {
    vector["reason"]: vector for vector in REFUSED if vector["file"] == MANIFEST_NAME or vector["reason"] in OURS
}.values()


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("vector", ONE_OF_EACH_REASON, ids=corpus.name_of)
def test_from_pretrained_rejects_with_the_same_reason(vector: corpus.Vector, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as refusal:
        AutoModelForCausalLM.from_pretrained(make(vector, tmp_path))
    assert (refusal.value.reason.value, refusal.value.tensor) == (vector["reason"], vector["tensor"])
