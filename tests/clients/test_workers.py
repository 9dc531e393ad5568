"""Models that are sent to spawned processes, as data loaders and evaluation pools do."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.clients.peft_methods.sides import packed
from tests.clients.spawned import logits

IDS = list(range(3, 15))


def by_from_pretrained(artifact: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("load", [packed, by_from_pretrained])
def test_a_spawned_process_computes_the_same_logits(load: Callable[[Path], Any], tiny_llama: Path) -> None:
    model = load(tiny_llama)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(logits, model, IDS).result()
    assert found == logits(model, IDS)
