"""torch.save, pickle and copies of a loaded model and its parts, compared with those of ordinary tensors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.clients.saving.conftest import Load
from tests.clients.saving.loaders import load_by

IDS = torch.arange(20)[None]


def saved(thing: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


def ordinary(tensors: Mapping[str, Tensor]) -> Any:
    """Return the same state dict with copies of the tensors in memory of their own."""
    found: Any = type(tensors)((name, tensor.clone()) for name, tensor in tensors.items())  # type: ignore[call-arg]
    found._metadata = getattr(tensors, "_metadata", None)
    return found


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_a_saved_state_dict_is_as_large_as_one_of_ordinary_tensors_and_loads_back(load: Load) -> None:
    state = load().state_dict()
    file = saved(state)
    assert len(file.getbuffer()) == len(saved(ordinary(state)).getbuffer())
    found = torch.load(file)
    assert found.keys() == state.keys()
    assert all(same_bytes(found[name], tensor) for name, tensor in state.items())
    assert load().load_state_dict(found).missing_keys == []


@pytest.mark.parametrize("part", [lambda model: model.model.norm, lambda model: model.model.layers[0].mlp.up_proj])
def test_a_saved_part_of_a_model_has_the_bytes_of_that_part(load: Load, part: Callable[[Any], Any]) -> None:
    state = part(load()).state_dict()
    assert len(saved(state).getbuffer()) == len(saved(ordinary(state)).getbuffer())
    for tensor in state.values():
        # pickle writes the address of the storage twice, in decimal: up to 20 digits each.
        assert len(pickle.dumps(tensor)) <= len(pickle.dumps(tensor.clone())) + 2 * 20


@pytest.mark.parametrize(
    "through",
    [
        lambda model: torch.load(saved(model), weights_only=False),
        lambda model: pickle.loads(pickle.dumps(model)),
        copy.deepcopy,
    ],
    ids=["torch.save", "pickle", "deepcopy"],
)
def test_a_copy_of_a_model_has_the_same_logits_and_memory_for_its_own_tensors(
    load: Load, through: Callable[[Any], Any]
) -> None:
    model = load()
    found = through(model)
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, model(IDS).logits)
    for name, tensor in found.state_dict().items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_a_copy_of_a_layer_has_memory_for_that_layer(load: Load) -> None:
    model = load()
    layer = model.model.layers[0].mlp.up_proj
    found = copy.deepcopy(layer)
    state = found.state_dict()
    assert {name: tensor.untyped_storage().nbytes() for name, tensor in state.items()} == {
        name: tensor.nbytes for name, tensor in layer.state_dict().items()
    }
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(found(x), layer(x))


def logits_of(model: Any) -> Any:
    with torch.no_grad():
        return model(IDS).logits.float().tolist()


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["load_model", "register"])
def test_a_spawned_worker_gets_the_model(artifact: Any, loader: str) -> None:
    """The worker is a new process, in which nobody has called `register`."""
    model = load_by(loader, artifact).float() if loader == "load_model" else load_by(loader, artifact)
    # An executor, unlike a queue, reports a worker that ends without a result.
    with ProcessPoolExecutor(1, mp_context=torch.multiprocessing.get_context("spawn")) as workers:
        assert workers.submit(logits_of, model).result() == logits_of(model)
