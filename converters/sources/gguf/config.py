"""config.json of a model in a GGUF file, from its metadata.

Unlike transformers, which reads the same files, this module carries over the scaling of rotary positions, the softcaps
of Gemma 2, sliding windows and the base of the frequencies for every architecture that has them. Numbers that GGUF
keeps in float32 are written with the fewest digits that give the same float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qformat.artifact.manifest import JsonObject
from qformat.converters.sources.gguf.architectures import OUTPUT_NAME, Architecture
from qformat.converters.sources.gguf.header import GgufHeader
from qformat.converters.sources.gguf.metadata import Metadata
from qformat.converters.sources.gguf.rope import ReadVector, rope_scaling
from qformat.converters.sources.gguf.sizes import Sizes

_MAX_CONTEXT = 2**31
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3_text": 62}
"""Number of layers of the model that scales its queries by hidden size and number of heads. No key tells; llama.cpp
takes it from this number, too."""


def config_of(
    metadata: Metadata, header: GgufHeader, architecture: Architecture, sizes: Sizes, read_vector: ReadVector
) -> JsonObject:
    """Return the contents of config.json without the dtype.

    Args:
        metadata: Metadata of the file.
        header: Header of the file.
        architecture: Architecture of the model.
        sizes: Sizes of the model.
        read_vector: Reads a vector of the file.

    Raises:
        SourceError: A key is missing or has a value that cannot be converted.
    """
    context = metadata.integer("context_length", 1, _MAX_CONTEXT)
    theta = metadata.number("rope.freq_base", default=10000.0)
    letters = sizes.letters
    epsilon, epsilon_name = architecture.epsilon
    activation, activation_value = architecture.activation
    config: JsonObject = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        activation: activation_value,
        "hidden_size": letters["h"],
        "intermediate_size": letters["f"],
        "num_hidden_layers": sizes.n_layers,
        "num_attention_heads": letters["n"],
        "num_key_value_heads": letters["g"],
        "head_dim": letters["d"],
        "max_position_embeddings": context,
        epsilon_name: metadata.number(f"attention.{epsilon}"),
        "rope_theta": theta,
        "tie_word_embeddings": OUTPUT_NAME not in header.tensors,
        "vocab_size": letters["v"],
    }
    if architecture.partly_rotated:
        config["partial_rotary_factor"] = sizes.n_rotated / letters["d"]
    if (scaling := rope_scaling(metadata, context, theta, sizes.n_rotated, read_vector)) is not None:
        config["rope_scaling"] = scaling
    if (add := _OF_ARCHITECTURE.get(architecture.model_type)) is not None:
        config |= add(metadata, header, sizes)
    for token in ("bos", "eos", "padding", "unknown"):
        identifier = header.metadata.get(f"tokenizer.ggml.{token}_token_id")
        if isinstance(identifier, int):
            config[{"padding": "pad", "unknown": "unk"}.get(token, token) + "_token_id"] = identifier
    return config


def _llama(metadata: Metadata, header: GgufHeader, sizes: Sizes) -> JsonObject:
    return {"attention_bias": "blk.0.attn_q.bias" in header.tensors}


def _granite(metadata: Metadata, header: GgufHeader, sizes: Sizes) -> JsonObject:
    return {
        **_llama(metadata, header, sizes),
        "attention_multiplier": metadata.number("attention.scale", default=sizes.letters["d"] ** -0.5),
        "embedding_multiplier": metadata.number("embedding_scale", default=1.0),
        "residual_multiplier": metadata.number("residual_scale", default=1.0),
        "logits_scaling": metadata.number("logit_scale", default=1.0),
    }


def _smollm3(metadata: Metadata, header: GgufHeader, sizes: Sizes) -> JsonObject:
    # No key tells which layers do not rotate; llama.cpp takes every fourth, too.
    return {"no_rope_layer_interval": 4, "use_sliding_window": False}


def _olmo2(metadata: Metadata, header: GgufHeader, sizes: Sizes) -> JsonObject:
    """Return what Olmo 3 has, whose files differ from those of Olmo 2 by the sliding windows of some layers."""
    key = "attention.sliding_window"
    if (window := metadata.integer(key, 0, _MAX_CONTEXT, default=0)) == 0:
        return {}
    windows = metadata.flags(f"{key}_pattern", sizes.n_layers)
    return {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "sliding_window": window,
        "layer_types": ["sliding_attention" if has_window else "full_attention" for has_window in windows],
    }


def _experts(metadata: Metadata, sizes: Sizes) -> JsonObject:
    return {
        "num_experts": sizes.letters["e"],
        "num_experts_per_tok": metadata.integer("expert_used_count", 1, sizes.letters["e"]),
        "moe_intermediate_size": sizes.letters["m"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2_moe(metadata: Metadata, header: GgufHeader, sizes: Sizes) -> JsonObject:
    # As llama.cpp runs them, the weights of the chosen experts are normalized in Qwen3 only.
    shared = {"shared_expert_intermediate_size": sizes.letters["s"]}
    return {**_experts(metadata, sizes), "norm_topk_prob": False, **shared}


def _qwen3_moe(metadata: Metadata, header: GgufHeader, sizes: Sizes) -> JsonObject:
    return {**_experts(metadata, sizes), "norm_topk_prob": True}


def _gemma(metadata: Metadata, sizes: Sizes, model_type: str) -> JsonObject:
    letters = sizes.letters
    largest = sizes.n_layers == _GEMMA_27B_LAYERS[model_type]
    return {
        "query_pre_attn_scalar": letters["h"] // letters["n"] if largest else letters["d"],
        "sliding_window": metadata.integer("attention.sliding_window", 1, _MAX_CONTEXT),
    }


def _gemma2(metadata: Metadata, header: GgufHeader, sizes: Sizes) -> JsonObject:
    return {
        **_gemma(metadata, sizes, "gemma2"),
        "attn_logit_softcapping": metadata.number("attn_logit_softcapping", default=50.0),
        "final_logit_softcapping": metadata.number("final_logit_softcapping", default=30.0),
    }


def _gemma3(metadata: Metadata, header: GgufHeader, sizes: Sizes) -> JsonObject:
    return {
        **_gemma(metadata, sizes, "gemma3_text"),
        "rope_local_base_freq": metadata.number("rope.freq_base_swa", default=10000.0),
        "sliding_window_pattern": metadata.integer("attention.sliding_window_pattern", 1, 2**16, default=6),
    }


def _phi3(metadata: Metadata, header: GgufHeader, sizes: Sizes) -> JsonObject:
    context = metadata.integer("context_length", 1, _MAX_CONTEXT)
    window = metadata.integer("attention.sliding_window", 0, _MAX_CONTEXT, default=0)
    original = metadata.integer("rope.scaling.original_context_length", 1, _MAX_CONTEXT, default=context)
    # llama.cpp's converter writes 0 where a model has no window.
    return {"original_max_position_embeddings": original, "sliding_window": window or None}


def _lfm2(metadata: Metadata, header: GgufHeader, sizes: Sizes) -> JsonObject:
    return {
        "block_auto_adjust_ff_dim": False,  # the file has the adjusted size
        "conv_L_cache": sizes.letters["c"],
        "conv_bias": False,
        "layer_types": ["full_attention" if attention else "conv" for attention in sizes.has_attention],
    }


def _starcoder2(metadata: Metadata, header: GgufHeader, sizes: Sizes) -> JsonObject:
    window = metadata.integer("attention.sliding_window", 0, _MAX_CONTEXT, default=0)
    return {"use_bias": True, "sliding_window": window or None}


def _stablelm(metadata: Metadata, header: GgufHeader, sizes: Sizes) -> JsonObject:
    return {
        "use_qkv_bias": "blk.0.attn_q.bias" in header.tensors,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in header.tensors,
    }


_OF_ARCHITECTURE: Mapping[str, Callable[[Metadata, GgufHeader, Sizes], JsonObject]] = {
    "llama": _llama,
    "granite": _granite,
    "smollm3": _smollm3,
    "olmo2": _olmo2,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "lfm2": _lfm2,
    "starcoder2": _starcoder2,
    "stablelm": _stablelm,
}
"""What config.json has in addition, by model type."""
