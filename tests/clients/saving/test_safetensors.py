"""safetensors' `save_model` and `load_model` with a loaded model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model

from tests.clients.saving.conftest import Load


def test_save_model_writes_every_tensor_and_load_model_reads_it(load: Load, tmp_path: Path) -> None:
    model = load()
    state = model.state_dict()
    save_model(model, str(tmp_path / "model.safetensors"))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    assert found.keys() == state.keys()
    assert all(torch.equal(tensor.view(torch.uint8), state[name].view(torch.uint8)) for name, tensor in found.items())
    other = load()
    for parameter in other.parameters():
        parameter.data.zero_()
    assert load_model(other, tmp_path / "model.safetensors") == (set(), [])
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
