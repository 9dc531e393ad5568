"""Names and shapes of the tensors of common plain decoders, as a table: one row per tensor of a layer.

A checkpoint that equals its row exactly needs no comparison with a model built by transformers, whose import takes
seconds. Everything else is left to transformers: other models, fields of config.json that this file does not list, and
any difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qformat.artifact.manifest import JsonObject

Sizes = tuple[str, ...]
"""Shape of a tensor, as names of `_sizes`."""

_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_SPLIT_ATTENTION: Mapping[str, Sizes] = {
    "self_attn.q_proj": ("queries", "hidden"),
    "self_attn.k_proj": ("keys", "hidden"),
    "self_attn.v_proj": ("keys", "hidden"),
    "self_attn.o_proj": ("hidden", "queries"),
}
_SPLIT_MLP: Mapping[str, Sizes] = {
    "mlp.gate_proj": ("inner", "hidden"),
    "mlp.up_proj": ("inner", "hidden"),
    "mlp.down_proj": ("hidden", "inner"),
}
_FUSED: Mapping[str, Sizes] = {
    "self_attn.qkv_proj": ("queries and keys and values", "hidden"),
    "self_attn.o_proj": ("hidden", "queries"),
    "mlp.gate_up_proj": ("gate and up", "hidden"),
    "mlp.down_proj": ("hidden", "inner"),
}
_NORMS_BEFORE: Mapping[str, Sizes] = {"input_layernorm": ("hidden",), "post_attention_layernorm": ("hidden",)}
_NORMS_AFTER: Mapping[str, Sizes] = {
    "post_attention_layernorm": ("hidden",),
    "post_feedforward_layernorm": ("hidden",),
}
_FOUR_NORMS: Mapping[str, Sizes] = {**_NORMS_BEFORE, **_NORMS_AFTER, "pre_feedforward_layernorm": ("hidden",)}
_NORMS_OF_A_HEAD: Mapping[str, Sizes] = {"self_attn.q_norm": ("head",), "self_attn.k_norm": ("head",)}
_NORMS_OF_ALL_HEADS: Mapping[str, Sizes] = {"self_attn.q_norm": ("queries",), "self_attn.k_norm": ("keys",)}
_LLAMA = {**_SPLIT_ATTENTION, **_SPLIT_MLP, **_NORMS_BEFORE}

_ATTENTION_BIAS = {"attention_bias": tuple(_SPLIT_ATTENTION)}
_BIASES = {**_ATTENTION_BIAS, "mlp_bias": tuple(_SPLIT_MLP)}


@dataclass(frozen=True, slots=True)
class PlainDecoder:
    """The tensors of one family of models.

    Attributes:
        model_class: Name of the class in transformers.
        weights: Sizes of the weight of each module of a layer.
        optional_biases: Modules of a layer that have a bias if this field of the config is true.
        biases: Modules of a layer that always have a bias.
        tied: Whether head and embedding are tied if the config does not say.
        needs_head_dim: Whether a config must say `head_dim`, because it does not follow from the other sizes.
    """

    model_class: str
    weights: Mapping[str, Sizes]
    optional_biases: Mapping[str, tuple[str, ...]]
    biases: tuple[str, ...] = ()
    tied: bool = False
    needs_head_dim: bool = False


FAMILIES: Mapping[str, PlainDecoder] = {
    "llama": PlainDecoder("LlamaForCausalLM", _LLAMA, _BIASES),
    "mistral": PlainDecoder("MistralForCausalLM", _LLAMA, {}),
    "qwen2": PlainDecoder(
        "Qwen2ForCausalLM", _LLAMA, {}, biases=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    ),
    "qwen3": PlainDecoder("Qwen3ForCausalLM", {**_LLAMA, **_NORMS_OF_A_HEAD}, _ATTENTION_BIAS, needs_head_dim=True),
    "smollm3": PlainDecoder("SmolLM3ForCausalLM", _LLAMA, _BIASES, tied=True),
    "granite": PlainDecoder("GraniteForCausalLM", _LLAMA, _BIASES),
    "phi3": PlainDecoder("Phi3ForCausalLM", {**_FUSED, **_NORMS_BEFORE}, {}),
    "olmo2": PlainDecoder(
        "Olmo2ForCausalLM", {**_SPLIT_ATTENTION, **_SPLIT_MLP, **_NORMS_AFTER, **_NORMS_OF_ALL_HEADS}, _ATTENTION_BIAS
    ),
    "gemma2": PlainDecoder(
        "Gemma2ForCausalLM",
        {**_SPLIT_ATTENTION, **_SPLIT_MLP, **_FOUR_NORMS},
        _ATTENTION_BIAS,
        tied=True,
        needs_head_dim=True,
    ),
    "gemma3_text": PlainDecoder(
        "Gemma3ForCausalLM",
        {**_SPLIT_ATTENTION, **_SPLIT_MLP, **_FOUR_NORMS, **_NORMS_OF_A_HEAD},
        _ATTENTION_BIAS,
        tied=True,
        needs_head_dim=True,
    ),
}
"""The families by `model_type`."""

_SIZE_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
_OTHER_FIELDS_THAT_COUNT = frozenset({"architectures", "model_type", "head_dim", "tie_word_embeddings"})
NEUTRAL_FIELDS = frozenset(
    {
        "_model_name_or_path", "_name_or_path", "_sliding_window_pattern", "attention_dropout", "attention_multiplier",
        "attn_logit_softcapping", "bos_token_id", "cache_implementation", "dtype", "embd_pdrop",
        "embedding_multiplier", "eos_token_id", "final_logit_softcapping", "hidden_act", "hidden_activation",
        "initializer_range", "is_llama_config", "layer_types", "logits_scaling", "max_position_embeddings",
        "max_window_layers", "no_rope_layer_interval", "no_rope_layers", "original_max_position_embeddings",
        "pad_token_id", "partial_rotary_factor", "pretraining_tp", "quantization_config", "query_pre_attn_scalar",
        "resid_pdrop", "residual_multiplier", "rms_norm_eps", "rope_interleaved", "rope_local_base_freq",
        "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "sliding_window_pattern", "torch_dtype",
        "transformers.js_config", "transformers_version", "unk_token_id", "unsloth_fixed",
        "use_bidirectional_attention", "use_cache", "use_mrope", "use_sliding_window",
    }
)  # fmt: skip
"""Fields of config.json on which neither names nor shapes depend in any of the families."""


def equals_plain_decoder(config: JsonObject, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether a checkpoint certainly has the tensors of its model: no more, no less, each of the right shape.

    If head and embedding are tied, the head may be absent.

    Args:
        config: Contents of config.json.
        shapes: Shape of every tensor by its name in the checkpoint.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    sizes = _sizes(config)
    if family is None or sizes is None or not _is_understood(config, family):
        return False
    modules = {f"{module}.weight": wanted for module, wanted in family.weights.items()}
    modules |= {f"{module}.bias": family.weights[module][:1] for module in _with_bias(config, family)}
    may_lack = {_HEAD} if config.get("tie_word_embeddings", family.tied) else set()
    # The number is compared first: a config may name more layers than there is memory for.
    if len({*shapes} | may_lack) != sizes["layers"] * len(modules) + 3:
        return False
    return all(
        shapes[name] == wanted if name in shapes else name in may_lack for name, wanted in _expected(modules, sizes)
    )


def _expected(modules: Mapping[str, Sizes], sizes: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    embedding = (sizes["vocab"], sizes["hidden"])
    yield from ((_EMBEDDING, embedding), (_HEAD, embedding), (_NORM, (sizes["hidden"],)))
    shape = {name: tuple(sizes[size] for size in wanted) for name, wanted in modules.items()}
    for layer in range(sizes["layers"]):
        for name, wanted in shape.items():
            yield f"model.layers.{layer}.{name}", wanted


def _sizes(config: JsonObject) -> dict[str, int] | None:
    given = [config.get(name) for name in _SIZE_FIELDS]
    if not all(type(size) is int and size > 0 for size in given):
        return None
    vocab, hidden, inner, layers, heads, key_heads = (int(str(size)) for size in given)
    head = config.get("head_dim", hidden // heads)
    if hidden % heads or not isinstance(head, int) or isinstance(head, bool) or head <= 0:
        return None
    queries, keys = heads * head, key_heads * head
    return {
        "vocab": vocab, "hidden": hidden, "inner": inner, "layers": layers, "head": head, "queries": queries,
        "keys": keys, "queries and keys and values": queries + 2 * keys, "gate and up": 2 * inner,
    }  # fmt: skip


def _is_understood(config: JsonObject, family: PlainDecoder) -> bool:
    flags = {"tie_word_embeddings", *family.optional_biases}
    known = NEUTRAL_FIELDS | _OTHER_FIELDS_THAT_COUNT | {*_SIZE_FIELDS} | flags
    return (
        config.keys() <= known
        and config.get("architectures") == [family.model_class]
        and all(isinstance(config.get(name, False), bool) for name in flags)
        and not (family.needs_head_dim and "head_dim" not in config)
    )


def _with_bias(config: JsonObject, family: PlainDecoder) -> tuple[str, ...]:
    chosen = (modules for name, modules in family.optional_biases.items() if config.get(name, False))
    return (*family.biases, *(module for modules in chosen for module in modules))
