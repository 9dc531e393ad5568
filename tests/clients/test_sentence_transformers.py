"""sentence-transformers around a packed model: the decoded model's embeddings, and a save that loads again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.clients.peft_methods.sides import FORWARD

pytest.importorskip("sentence_transformers", reason="the extra 'clients' is not installed: make test-slow")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("registered"), pytest.mark.filterwarnings("ignore")]

TEXTS = ["the block holds one scale", "pages move", "every code counts from zero to fifteen"]


def embeddings(path: Path) -> tuple[object, np.ndarray]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(path), device="cpu", model_kwargs={"dtype": torch.float32})
    return model, model.encode(TEXTS)


def test_embeddings_are_those_of_the_decoded_model_and_survive_a_save(
    speaking_llama: Path, decoded_speaking_llama: Path, tmp_path: Path
) -> None:
    model, found = embeddings(speaking_llama)
    _, expected = embeddings(decoded_speaking_llama)
    assert found.shape == (3, 64)
    assert np.abs(found - expected).max() < FORWARD * np.abs(expected).max()
    model.save(str(tmp_path / "saved"))
    _, again = embeddings(tmp_path / "saved")
    assert np.array_equal(again, found)
