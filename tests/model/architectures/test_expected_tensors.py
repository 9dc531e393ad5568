"""A checkpoint's tensors fit the model of its config.json, or not, as transformers finds when it loads them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from qformat.model.rules.expected_tensors import ModelComparison, as_request, compare_with_model, from_answer

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 20,
}  # fmt: skip
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}
TIED = {**LLAMA, "tie_word_embeddings": True}
BERT = {"architectures": ["BertForMaskedLM"], "model_type": "bert", **SIZES, "max_position_embeddings": 8}
QWEN = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 8, **SIZES}
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 2, **SIZES}


def state_of(config: dict[str, object]) -> dict[str, Tensor]:
    """Return the tensors that transformers writes for a model."""
    read = transformers.AutoConfig.for_model(**config)
    model = getattr(transformers, config["architectures"][0])(read)  # type: ignore[index]
    tied = model.all_tied_weights_keys
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in tied}


def compare(config: dict[str, object], state: dict[str, Tensor], packed: tuple[str, ...] = ()) -> ModelComparison:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return compare_with_model(json.dumps(config).encode(), shapes, packed)


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {kept: tensor for kept, tensor in state.items() if kept != name}


def having(name: str, *shape: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {**state, name: torch.ones(shape)}


def of_the_base(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the names that a model without a head saves."""
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def unchanged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state


CASES = {
    "llama": (LLAMA, unchanged),
    "tied": (TIED, unchanged),
    "bert": (BERT, unchanged),
    "names of the base": (TIED, of_the_base),
    "tied, with a head": (TIED, having("lm_head.weight", 20, 16)),
    "tied, with the head only": (
        TIED, lambda state: having("lm_head.weight", 20, 16)(without("model.embed_tokens.weight")(state)),
    ),
    "value head": (LLAMA, having("v_head.summary.weight", 1, 16)),
    "cached rotary table": (LLAMA, having("model.layers.0.self_attn.rotary_emb.inv_freq", 4)),
    "pooler": (BERT, having("bert.pooler.dense.weight", 16, 16)),
    "a layer too many": (QWEN, having("model.layers.7.mlp.up_proj.weight", 24, 16)),
    "no norm": (LLAMA, without("model.norm.weight")),
    "no head": (LLAMA, without("lm_head.weight")),
    "no bias": (BERT, without("bert.encoder.layer.0.output.dense.bias")),
    "no normalized keys": (QWEN, without("model.layers.0.self_attn.k_norm.weight")),
    "other vocabulary": (LLAMA, having("lm_head.weight", 24, 16)),
    "other width": (QWEN, having("model.layers.0.mlp.up_proj.weight", 32, 16)),
    "other heads": (LLAMA, having("model.layers.0.self_attn.k_proj.weight", 8, 16)),
}  # fmt: skip
WITHOUT_A_PLACE = {"value head", "cached rotary table", "pooler", "a layer too many"}


@pytest.mark.parametrize("case", CASES)
def test_it_finds_what_transformers_finds_when_it_loads_the_tensors(case: str, tmp_path: Path) -> None:
    config, change = CASES[case]
    state = change(state_of(config))
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = getattr(transformers, config["architectures"][0])  # type: ignore[index]
    _, info = loaded.from_pretrained(tmp_path, output_loading_info=True, ignore_mismatched_sizes=True)
    found = compare(config, state)
    assert found.not_compared is None
    assert set(found.missing) == set(info["missing_keys"])
    assert {(name, stored, wanted) for name, (stored, wanted) in found.wrong_shapes.items()} == {
        (name, tuple(stored), tuple(wanted)) for name, stored, wanted in info["mismatched_keys"]
    }
    # transformers does not report those that it ignores on purpose.
    assert set(found.not_loaded) >= set(info["unexpected_keys"])
    added = state.keys() - state_of(config).keys()
    assert set(found.not_loaded) == (added if case in WITHOUT_A_PLACE else set())


def test_a_weight_to_pack_without_a_layer_is_told_from_one_that_the_model_ignores() -> None:
    stray, cached = "model.layers.7.mlp.up_proj.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"
    state = having(stray, 24, 16)(having(cached, 4)(state_of(LLAMA)))
    assert compare(LLAMA, state, (stray,)).without_layer == (stray,)
    assert compare(LLAMA, state, (cached,)).without_layer == ()
    assert compare(LLAMA, state).without_layer == ()


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({**LLAMA, "model_type": "a_model_of_mine"}, "a_model_of_mine"),
        ({**LLAMA, "architectures": ["MineForCausalLM"]}, "MineForCausalLM"),
        ({**LLAMA, "num_attention_heads": 0}, "cannot"),
        ({"architectures": ["LlamaForCausalLM"]}, "model_type"),
    ],
)
def test_a_model_that_transformers_cannot_build_is_not_compared(config: dict[str, object], why: str) -> None:
    found = compare(config, state_of(LLAMA))
    assert why in str(found.not_compared)
    assert tempfile.gettempdir() not in str(found.not_compared)
    assert found == ModelComparison(found.not_compared)


@pytest.mark.parametrize(
    ("fields", "doubt"),
    [
        ({}, "states no size"),
        ({"use_cache": True, "rms_norm_eps": 1e-5, "quantization_config": {"bits": 4}}, "states no size"),
        ({"vocab_size": 32000}, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, None),
        ({"vocab_size": 32000, "auto_map": {"AutoModel": "mine.Mine"}}, "its own code"),
    ],
)
def test_a_config_that_may_belong_to_another_model_is_named(fields: dict[str, object], doubt: str | None) -> None:
    found = compare({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **fields}, {})
    assert found.missing
    assert found.doubt is None if doubt is None else doubt in str(found.doubt)


def test_experts_that_transformers_merges_are_not_compared() -> None:
    experts = {
        f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight": torch.ones(24, 16)
        for expert in range(2)
        for name in ("w1", "w3")
    }
    assert "merges" in str(compare(MIXTRAL, {**state_of(LLAMA), **experts}).not_compared)


@pytest.mark.parametrize("name", ["norm", "größe", "a\nb"])
def test_the_messages_of_the_other_process_hold_the_comparison(name: str) -> None:
    found = ModelComparison(None, (name,), (name,), (name,), {name: ((1, 2), ())}, name)
    assert from_answer(json.dumps(asdict(found)).encode()) == found
    request = json.loads(as_request(b'{"x": Infinity}', {name: (1, 2)}, [name]))
    assert request == {"config": '{"x": Infinity}', "shapes": {name: [1, 2]}, "packed": [name]}
