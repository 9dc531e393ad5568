"""Every causal language model that the installed transformers can build, with random weights and small sizes."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.converters.rules.built_types import BUILD_ERRORS, CONFIG_FIELDS, N_LAYERS, cut_layers

N_TOKENS = 128

SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "embedding_size", "d_embed"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 96),
    **dict.fromkeys(("word_embed_proj_dim", "max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "qk_head_dim"), 32),
    **dict.fromkeys(("head_dim", "global_head_dim", "d_kv", "q_lora_rank", "kv_lora_rank", "v_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "moe_k", "top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), N_TOKENS),
}
"""Upper limits of the sizes in a config."""

OF_TYPE: dict[str, dict[str, object]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "mamba2": {"num_heads": 8},
    "xlnet": {"d_head": 16},
}
"""Fields of some types that other sizes imply."""

_TOKEN_FIELDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")

MAX_PARAMETERS = 5_000_000


def tiny_model(name: str) -> transformers.PreTrainedModel | None:
    """Build a model of a type in bfloat16, or return None if small sizes do not describe one."""
    torch.manual_seed(0)
    try:
        config = transformers.AutoConfig.for_model(name, **CONFIG_FIELDS.get(name, {}))
        cut_layers(config)
        _shrink(config)
        for field, value in OF_TYPE.get(name, {}).items():
            setattr(config, field, value)
        with torch.device("meta"):
            on_meta: Any = transformers.AutoModelForCausalLM.from_config(config)
        if sum(parameter.numel() for parameter in on_meta.parameters()) > MAX_PARAMETERS:
            return None
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except BUILD_ERRORS:
        return None
    assert isinstance(model, transformers.PreTrainedModel)
    return model.eval()


def _shrink(config: Any, depth: int = 0) -> None:
    for field, limit in SIZES.items():
        value = vars(config).get(field)
        if type(value) is int and value > limit:
            setattr(config, field, limit)
    for field in _TOKEN_FIELDS:
        value = vars(config).get(field)
        if type(value) is int and value >= N_TOKENS:
            setattr(config, field, 1)
    for field, value in list(vars(config).items()):
        if "layer" in field and isinstance(value, list) and len(value) > N_LAYERS:
            setattr(config, field, [value[0], value[-1]])
    if depth < 3:
        for value in list(vars(config).values()):
            if isinstance(value, transformers.PreTrainedConfig):
                _shrink(value, depth + 1)
