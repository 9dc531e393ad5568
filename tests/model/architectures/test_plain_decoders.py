"""The table of plain decoders states the tensors of the models that transformers builds."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from qformat.model.rules.expected_tensors import ModelComparison, compare_with_model
from qformat.model.rules.plain_decoders import FAMILIES, NEUTRAL_FIELDS, equals_plain_decoder

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

SIZES = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "pad_token_id": None,
}  # fmt: skip
VARIATIONS: dict[str, Config] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "head_dim": {"head_dim": 10},
    "as many keys as queries": {"num_key_value_heads": 6},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "both biases, tied, head_dim": {
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 10,
    },
}  # fmt: skip
NEUTRAL: Config = {
    "_name_or_path": "a", "_model_name_or_path": "a", "_sliding_window_pattern": 2, "attention_dropout": 0.5,
    "attention_multiplier": 3.0, "attn_logit_softcapping": 7.0, "bos_token_id": 3, "cache_implementation": "hybrid",
    "dtype": "float16", "embd_pdrop": 0.5, "embedding_multiplier": 3.0, "eos_token_id": [4, 5],
    "final_logit_softcapping": 7.0, "hidden_act": "gelu", "hidden_activation": "gelu", "initializer_range": 0.5,
    "layer_types": ["full_attention", "sliding_attention"], "logits_scaling": 3.0, "max_position_embeddings": 64,
    "max_window_layers": 1, "no_rope_layer_interval": 1, "no_rope_layers": [0, 1],
    "original_max_position_embeddings": 32, "pad_token_id": 6, "pretraining_tp": 2, "query_pre_attn_scalar": 11,
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}, "resid_pdrop": 0.5,
    "residual_multiplier": 3.0, "rms_norm_eps": 0.5, "rope_local_base_freq": 300.0, "rope_theta": 500.0,
    "sliding_window": 8, "sliding_window_pattern": 2, "torch_dtype": "float16", "transformers_version": "4.0.0",
    "unk_token_id": 7, "use_cache": False, "use_sliding_window": True, "rope_interleaved": True,
    "partial_rotary_factor": 0.5, "is_llama_config": True, "unsloth_fixed": True, "use_mrope": True,
    "use_bidirectional_attention": True, "transformers.js_config": {"dtype": "q4"},
}  # fmt: skip


def config_of(model_type: str, **fields: object) -> Config:
    needed = {"head_dim": 8} if FAMILIES[model_type].needs_head_dim else {}
    return {"architectures": [FAMILIES[model_type].model_class], "model_type": model_type, **SIZES, **needed, **fields}


def built(config: Config) -> Shapes:
    """Return the shapes of the model that transformers builds from a config."""
    read = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(read)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def is_tied(config: Config) -> bool:
    return bool(transformers.AutoConfig.for_model(**config).tie_word_embeddings)


@pytest.mark.parametrize("variation", [None, *VARIATIONS])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_table_states_the_tensors_that_transformers_builds(model_type: str, variation: str | None) -> None:
    fields = {} if variation is None else VARIATIONS[variation]
    if unknown := {"attention_bias", "mlp_bias"} & fields.keys() - FAMILIES[model_type].optional_biases.keys():
        # These families ignore the field. The table leaves such a config to transformers.
        config = config_of(model_type, **fields)
        assert not equals_plain_decoder(config, built(config))
        fields = {name: value for name, value in fields.items() if name not in unknown}
    config = config_of(model_type, **fields)
    shapes = built(config)
    assert equals_plain_decoder(config, shapes)
    without_head = {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}
    assert equals_plain_decoder(config, without_head) == is_tied(config)
    assert not equals_plain_decoder(config, {**shapes, "model.norm.bias": (24,)})
    for name, shape in shapes.items():
        if name != "lm_head.weight":
            assert not equals_plain_decoder(config, {kept: shapes[kept] for kept in shapes if kept != name}), name
        assert not equals_plain_decoder(config, {**shapes, name: (*shape[:-1], shape[-1] + 1)}), name
        assert not equals_plain_decoder(config, {**shapes, name: (*shape, 1)}), name


@pytest.mark.parametrize("model_type", FAMILIES)
def test_neutral_fields_change_neither_names_nor_shapes(model_type: str) -> None:
    # Phi-3 has one kind of scaling, whose numbers depend on other fields.
    rope: Config = {"rope_type": "default"} if model_type == "phi3" else {"rope_type": "linear", "factor": 2.0}
    parameters = {**rope, "rope_theta": 500.0}
    if model_type == "gemma3_text":
        parameters = dict.fromkeys(("sliding_attention", "full_attention"), parameters)
    shapes = built(config_of(model_type))
    scaling = {"rope_scaling": rope}
    assert NEUTRAL.keys() | {"rope_parameters"} | scaling.keys() == NEUTRAL_FIELDS
    for fields in ({**NEUTRAL, "rope_parameters": parameters}, scaling):
        config = {**config_of(model_type), **fields}
        assert built(config) == shapes
        assert equals_plain_decoder(config, shapes)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_table_knows_every_field_that_transformers_saves(model_type: str) -> None:
    config = config_of(model_type)
    saved = json.loads(transformers.AutoConfig.for_model(**config).to_json_string())
    assert equals_plain_decoder(saved, built(config))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_comparison_with_the_model_finds_nothing_in_what_the_table_states(model_type: str) -> None:
    config = config_of(model_type)
    shapes = built(config)
    assert equals_plain_decoder(config, shapes)
    assert compare_with_model(json.dumps(config).encode(), shapes, list(shapes)) == ModelComparison()


REFUSED: dict[str, Callable[[Config], Config]] = {
    "another model_type": lambda config: {**config, "model_type": "llama4_text"},
    "no model_type": lambda config: {name: value for name, value in config.items() if name != "model_type"},
    "another class": lambda config: {**config, "architectures": ["LlamaForSequenceClassification"]},
    "two classes": lambda config: {**config, "architectures": ["LlamaForCausalLM", "LlamaModel"]},
    "code of its own": lambda config: {**config, "auto_map": {"AutoModelForCausalLM": "mine.Mine"}},
    "an unknown field": lambda config: {**config, "num_experts": 4},
    "no number of heads": lambda config: {k: v for k, v in config.items() if k != "num_attention_heads"},
    "heads that do not divide": lambda config: {**config, "num_attention_heads": 7},
    "no heads": lambda config: {**config, "num_attention_heads": 0},
    "true for a size": lambda config: {**config, "num_hidden_layers": True},
    "a text for a size": lambda config: {**config, "hidden_size": "24"},
    "a fraction for a size": lambda config: {**config, "hidden_size": 24.0},
    "null for head_dim": lambda config: {**config, "head_dim": None},
    "a text for a bias": lambda config: {**config, "attention_bias": "false"},
    "null for tied": lambda config: {**config, "tie_word_embeddings": None},
    "more layers than memory": lambda config: {**config, "num_hidden_layers": 10**15},
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_the_table_does_not_know_is_left_to_transformers(change: str) -> None:
    config = config_of("llama")
    assert not equals_plain_decoder(REFUSED[change](config), built(config))


def test_a_family_whose_heads_have_a_size_of_their_own_must_say_it() -> None:
    config = config_of("qwen3")
    shapes = built(config)
    del config["head_dim"]
    assert not equals_plain_decoder(config, shapes)
