"""Numbers in config.json that no model with these tensors has are rejected before transformers builds anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from qformat.artifact.reading.structure import ShardLayout
from qformat.errors import ArtifactError, Reason
from qformat.model import build
from qformat.model.build import read_config
from qformat.model.checkpoint import load_checkpoint
from qformat.model.load import load_tokenizer
from qformat.model.rules.expected_tensors import compare_with_model
from qformat.model.rules.plausible_config import (
    FEW_EXPERTS,
    FEW_LAYERS,
    MAX_COMPUTED_NBYTES,
    MAX_LAYERS,
    Evidence,
    check_computed,
    check_numbers,
)
from tests.small_models import llama_config, llama_tensors, write_llama

SHAPES = {name: tensor.shape for name, tensor in llama_tensors().items()}
"""Shapes of a Llama of two layers."""


@pytest.fixture
def _nothing_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("transformers was asked before the numbers were checked")

    monkeypatch.setattr(build.AutoConfig, "from_pretrained", refuse)
    monkeypatch.setattr(build, "_model_class", refuse)


def write(folder: Path, **changed: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**llama_config(), **changed}))
    return folder


@pytest.mark.usefixtures("_nothing_built")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 3_000_000),
        ("num_hidden_layers", MAX_LAYERS + 1),
        ("num_hidden_layers", 10**400),
        ("encoder_layers", 10**9),
        ("depths", [2, 2, 10**7]),
        ("num_experts", 2**20 + 1),
        ("num_labels", 10**9),
        ("vocab_size", 2**24 + 1),
        ("hidden_size", 10**12),
        ("num_attention_heads", 10**9),
    ],
)
def test_a_number_that_no_model_has_is_rejected_even_without_tensors(field: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no model has more than") as refused:
        read_config(write(tmp_path, **{field: value}), trust_remote_code=False)
    assert (refused.value.reason, refused.value.field) == (Reason.CONFIG_FIELD, field)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("field", "most"), [("num_hidden_layers", FEW_LAYERS), ("n_layer", FEW_LAYERS), ("vocab_size", 2**16)]
)
def test_numbers_are_compared_with_the_tensors(field: str, most: int, tmp_path: Path) -> None:
    evidence = Evidence.of(SHAPES)
    check_numbers(write(tmp_path, **{field: most}), evidence)
    with pytest.raises(ArtifactError, match=f"is {most + 1}, but the tensors of this one allow at most {most}"):
        check_numbers(write(tmp_path, **{field: most + 1}), evidence)
    check_numbers(write(tmp_path, **{field: most + 1}))


def test_a_model_may_have_as_many_layers_as_its_tensors(tmp_path: Path) -> None:
    shapes = {f"model.layers.{layer}.mlp.up_proj.weight": (48, 32) for layer in range(400)}
    check_numbers(write(tmp_path, num_hidden_layers=400), Evidence.of(shapes))


def test_a_huge_number_in_one_name_allows_no_more_than_the_limit(tmp_path: Path) -> None:
    shapes = {"model.layers.3000000.mlp.up_proj.weight": (48, 32), f"model.layers.{'9' * 200}.weight": (1,)}
    with pytest.raises(ArtifactError, match="no model has more than"):
        check_numbers(write(tmp_path, num_hidden_layers=3_000_000), Evidence.of(shapes))


def test_experts_of_all_layers_are_counted_unless_a_tensor_holds_them_together(tmp_path: Path) -> None:
    write(tmp_path, num_hidden_layers=64, text_config={"num_experts": FEW_EXPERTS})
    with pytest.raises(ArtifactError, match="allow at most 256") as refused:
        check_numbers(tmp_path, Evidence.of(SHAPES))
    assert refused.value.field == "num_experts"
    check_numbers(tmp_path, Evidence.of({**SHAPES, "model.layers.0.experts": (FEW_EXPERTS, 4, 4)}))


@pytest.mark.usefixtures("_nothing_built")
def test_loading_a_checkpoint_compares_first(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    write(source, num_hidden_layers=FEW_LAYERS + 1)
    with pytest.raises(ArtifactError, match="num_hidden_layers"):
        load_checkpoint(source, device="cpu")


@pytest.mark.usefixtures("_nothing_built")
def test_a_conversion_compares_nothing_with_a_model_that_it_would_not_build() -> None:
    config = json.dumps(llama_config(n_layers=FEW_LAYERS + 1)).encode()
    assert "allow at most" in (compare_with_model(config, SHAPES, ()).not_compared or "")


def test_a_tokenizer_is_not_loaded_beside_an_implausible_config(tmp_path: Path) -> None:
    write(tmp_path, num_hidden_layers=10**12)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="num_hidden_layers"):
        load_tokenizer(tmp_path)


def test_the_defaults_of_every_architecture_are_plausible(tmp_path: Path) -> None:
    checked = 0
    for name in (
        "llama",
        "qwen3_next",
        "doge",
        "albert",
        "gemma3",
        "hrm_text",
        "deepseek_v3",
        "bailing_hybrid",
        "swin",
    ):
        if name in CONFIG_MAPPING:
            CONFIG_MAPPING[name]().to_json_file(tmp_path / "config.json", use_diff=False)
            check_numbers(tmp_path)
            checked += 1
    assert checked >= 5


def test_buffers_that_no_file_holds_are_limited(tmp_path: Path) -> None:
    model, inner = nn.Module(), nn.Module()
    model.add_module("attention", inner)
    layout = ShardLayout(tmp_path, {"model.safetensors": 100}, {}, {})
    with torch.device("meta"):
        inner.register_buffer("mask", torch.empty(MAX_COMPUTED_NBYTES, dtype=torch.bool), persistent=False)
        check_computed(model, layout)
        inner.register_buffer("table", torch.empty(1, dtype=torch.bool), persistent=False)
    with pytest.raises(ArtifactError, match=r"most of them in attention\.mask"):
        check_computed(model, layout)
    check_computed(model, ShardLayout(tmp_path, {"model.safetensors": 2 * MAX_COMPUTED_NBYTES}, {}, {}))
