"""A model of transformers, written as llama.cpp's converter writes it, comes back with the same tensors and logits.

This covers settings that transformers' own reader ignores (softcaps, scaled positions, windows, partial rotation), and
architectures that it does not read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qformat.converters.sources.gguf.architectures import ARCHITECTURES
from qformat.converters.sources.open_source import open_source
from tests.converters.sources.gguf.family_models import CONTEXT, FAMILIES, VOCABULARY, Family, settings, write_tensors
from tests.converters.sources.gguf.transformers_reader import built

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")

LAYER_NORM = "layer_norm_epsilon"
GEMMA = {"attention.key_length": 16, "attention.sliding_window": 8}
LONG, SHORT = np.linspace(1, 4, 6, dtype=np.float32), np.linspace(1, 1.5, 6, dtype=np.float32)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR_KEYS = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
GRANITE = {
    "attention_multiplier": 0.0625, "embedding_multiplier": 12.0, "residual_multiplier": 0.25, "logits_scaling": 8.0,
}  # fmt: skip
GRANITE_KEYS = {"attention.scale": 0.0625, "embedding_scale": 12.0, "residual_scale": 0.25, "logit_scale": 8.0}
OLMO3_LAYERS = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]

CASES: dict[str, tuple[str, Family]] = {
    "gemma": ("gemma", Family("gemma", {"head_dim": 16}, {"attention.key_length": 16})),
    "gemma2": (
        "gemma2",
        Family(
            "gemma2",
            {
                "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "attn_logit_softcapping": 20.0,
                "final_logit_softcapping": 10.0,
            },
            {**GEMMA, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
        ),
    ),
    "gemma2 27B": (
        "gemma2",
        Family(
            "gemma2",
            {"head_dim": 32, "query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 46},
            {**GEMMA, "attention.key_length": 32, "block_count": 46},
        ),
    ),
    "gemma3": (
        "gemma3",
        Family(
            "gemma3_text",
            {
                "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 7,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6,
            },
            {**GEMMA, **LINEAR_KEYS, "block_count": 7, "rope.freq_base": 1e6},
        ),
    ),
    "phi3 with a window": (
        "phi3",
        Family("phi3", {"pad_token_id": 0, "sliding_window": 16}, {"attention.sliding_window": 16}),
    ),
    "phi3 with long positions": (
        "phi3",
        Family(
            "phi3",
            {
                "pad_token_id": 0, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64,
                "rope_scaling": {"rope_type": "longrope", "short_factor": SHORT.tolist(), "long_factor": LONG.tolist()},
            },
            {
                "attention.sliding_window": 0, "rope.dimension_count": 12,
                "rope.scaling.original_context_length": 64,
            },
        ),
    ),
    "lfm2": (
        "lfm2",
        Family(
            "lfm2",
            {**FAMILIES["lfm2"].settings, "rope_theta": 1e6},
            {**FAMILIES["lfm2"].metadata, "rope.freq_base": 1e6},
        ),
    ),
    "starcoder2": (
        "starcoder2",
        Family("starcoder2", {"rope_theta": 1e5}, {"rope.freq_base": 1e5}, epsilon=LAYER_NORM),
    ),
    "nemotron": (
        "nemotron",
        Family("nemotron", {"partial_rotary_factor": 0.25}, {"rope.dimension_count": 4}, epsilon=LAYER_NORM),
    ),
    "stablelm": (
        "stablelm",
        Family(
            "stablelm",
            {"use_parallel_residual": True, "partial_rotary_factor": 0.5, "rope_theta": 5000.0},
            {"rope.dimension_count": 8, "rope.freq_base": 5000.0},
            epsilon=LAYER_NORM,
        ),
    ),
    "smollm3": ("smollm3", Family("smollm3", {"num_hidden_layers": 5, "pad_token_id": 0}, {"block_count": 5})),
    "granite": ("granite", Family("granite", GRANITE, GRANITE_KEYS)),
    "granite with biases": (
        "granite",
        Family("granite", {**GRANITE, "attention_bias": True, "tie_word_embeddings": True}, GRANITE_KEYS),
    ),
    "olmo2": ("olmo2", Family("olmo2")),
    "olmo3": (
        "olmo2",
        Family(
            "olmo3",
            {"num_hidden_layers": 4, "layer_types": OLMO3_LAYERS, "sliding_window": 8, "rope_scaling": YARN},
            {
                **YARN_KEYS, "block_count": 4, "attention.sliding_window": 8,
                "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in OLMO3_LAYERS],
            },
        ),
    ),
}  # fmt: skip
FACTORS = {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT}


def model_of(family: Family) -> Any:
    """Return a model whose parameters are multiples of 1/1024, so that adding 1 to them is exact in float32."""
    config = AutoConfig.for_model(
        family.model_type, max_position_embeddings=CONTEXT, **{"rope_theta": 10000.0, **settings(family)}
    )
    config.rms_norm_eps = config.norm_eps = config.norm_epsilon = config.layer_norm_eps = 1e-5
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn(parameter.shape) * 100).round() / 1024)
    return model


def as_llama_cpp_writes_it(name: str, values: np.ndarray, *, permuted: bool, norms_plus_one: bool) -> np.ndarray:
    """Apply what `convert_hf_to_gguf.py` does to the parameter of that name.

    Args:
        name: Name in transformers.
        values: The parameter, float32.
        permuted: Whether the rows of query and key are permuted, as `LlamaModel.permute` does.
        norms_plus_one: Whether 1 is added to the norms.
    """
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2], 0)
    if permuted and heads:
        n_rows = values.shape[0]
        halves = values.reshape(heads, 2, n_rows // heads // 2, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)
    if norms_plus_one and name.endswith("norm.weight"):
        return values + np.float32(1)
    return values.squeeze(1) if name.endswith("conv.conv.weight") else values


SLOW = {"gemma2 27B"}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_a_converted_model_gives_the_logits_of_the_original(case: str, tmp_path: Path) -> None:
    architecture, family = CASES[case]
    model = model_of(family)
    tensors = {
        name: as_llama_cpp_writes_it(
            name,
            values.numpy(),
            permuted=architecture in {"smollm3", "granite"},
            norms_plus_one=architecture in {"gemma", "gemma2", "gemma3", "nemotron"},
        )
        for name, values in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    extra = FACTORS if case == "phi3 with long positions" else {}
    source = open_source(write_tensors(tmp_path / "gguf", architecture, family, tensors, extra=extra))
    found = built(source, torch.float32)
    assert type(found) is type(model)
    assert found.state_dict().keys() == model.state_dict().keys()
    for name, values in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], values), name
    tokens = torch.arange(100)[None] % VOCABULARY
    with torch.no_grad():
        expected = model(tokens).logits
        assert torch.equal(found(tokens).logits, expected)
    assert expected.std() > 0
    source.close()


def test_every_added_architecture_is_tested() -> None:
    older = {"llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe"}
    assert ARCHITECTURES.keys() == older | {architecture for architecture, _ in CASES.values()}
