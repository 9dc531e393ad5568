"""Every damaged artifact of the specification's corpus is refused by the loader, with the reason that verify gives."""

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


@pytest.fixture
def streaming_to_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way to a GPU, with the CPU as the device that is copied to."""
    real = load.shards_on_device
    monkeypatch.setattr(load, "chosen_device", lambda device: torch.device("cuda", 0))

    def on_the_cpu(layout: Any, device: Any, *, verify: Any) -> Any:
        return real(layout, torch.device("cpu"), verify=verify)

    monkeypatch.setattr(load, "shards_on_device", on_the_cpu)


@pytest.mark.usefixtures("streaming_to_a_device")
@pytest.mark.parametrize("vector", [*REFUSED, *FOUND], ids=corpus.name_of)
def test_loading_to_a_device_refuses_with_the_same_reason(vector: corpus.Vector, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as refusal:
        load_model(make(vector, tmp_path), device="cuda", verify="full")
    assert refusal.value.reason.value == vector["reason"]


@pytest.fixture
def registered() -> Iterator[None]:
    before = AUTO_QUANTIZER_MAPPING[METHOD]
    qformat.register()
    yield
    AUTO_QUANTIZER_MAPPING[METHOD] = before


# transformers itself reads config.json, the index and headers first, and says in its own words what is wrong there.
OURS = {"quant_state", "codebook", "nonfinite_scale"}
ONE_OF_EACH_REASON = {
    vector["reason"]: vector for vector in REFUSED if vector["file"] == MANIFEST_NAME or vector["reason"] in OURS
}.values()


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("vector", ONE_OF_EACH_REASON, ids=corpus.name_of)
def test_from_pretrained_refuses_with_the_same_reason(vector: corpus.Vector, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as refusal:
        AutoModelForCausalLM.from_pretrained(make(vector, tmp_path))
    assert (refusal.value.reason.value, refusal.value.tensor) == (vector["reason"], vector["tensor"])
