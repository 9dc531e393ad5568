"""Tables of the plan stage: the module names that certainly belong to an `nn.Linear`, and how readers rename them.

This file holds only data for `rules`; `tests/converters/rules/test_rules_against_transformers.py` checks it against
every causal-LM type that transformers registers. A name is written as `leaf` ("q_proj") if it means a Linear wherever
it occurs, and as `parent.leaf` ("attention.dense") if the leaf alone is ambiguous.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

# A Linear in every model type that has it, whatever its parent modules are.
LINEAR_LEAVES: Final = frozenset(
    {
        # attention: Llama's names and those of models that adopted them; fused forms; multi-head latent attention
        "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "Wqkv",
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
        # feed-forward
        "gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "fc_in", "fc_out",
        "dense_h_to_4h", "dense_4h_to_h",
        # gated delta net (Qwen3-Next, Qwen3.5)
        "in_proj_qkv", "in_proj_z", "in_proj_qkvz",
        # per-layer inputs of Gemma 3n and Gemma 4
        "per_layer_input_gate", "per_layer_projection", "per_layer_model_projection",
    }
)  # fmt: skip

LINEAR_WITH_PARENT: Final = frozenset(
    {
        "attn.out_proj", "attention.out_proj", "self_attn.out_proj", "cross_attn.out_proj",
        "encoder_attn.out_proj", "linear_attn.out_proj", "conv.out_proj", "conv.in_proj",
        "mamba.in_proj", "mixer.in_proj",
        "attention.dense", "self_attention.dense", "self_attn.dense",
        "self.query", "self.key", "self.value", "intermediate.dense", "output.dense",
        "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
        "shared_mlp.input_linear", "shared_mlp.output_linear",
        "linear_attn.g_proj", "self_attn.g_proj", "self_attention.kv_proj",
        "attn.Wo", "mlp.Wi", "mlp.Wo",
    }
)  # fmt: skip

# In the GPT-2 family the same leaf is transposed (`Conv1D`): it is a Linear only in these model types.
LINEAR_BY_TYPE: Final[dict[str, frozenset[str]]] = {
    "gpt_bigcode": frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    "gpt_neo": frozenset({"mlp.c_fc", "mlp.c_proj"}),
    "starcoder2": frozenset({"mlp.c_fc", "mlp.c_proj"}),
    "recurrent_gemma": frozenset({"temporal_block.linear_x", "temporal_block.linear_y", "temporal_block.linear_out"}),
}

CONV1D_TYPES: Final = frozenset(
    {"gpt2", "gpt-sw3", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "gpt2-double-heads"}
)
CONV1D_NAMES: Final = frozenset(
    {"attn.c_attn", "attn.c_proj", "attn.q_attn", "crossattention.c_attn", "crossattention.c_proj",
     "crossattention.q_attn", "mlp.c_fc", "mlp.c_proj"}
)  # fmt: skip

# Falcon's matrices belong to a subclass of Linear, which transformers' bitsandbytes integration does not replace
# (it checks `type(module) is nn.Linear`): a 4-bit file would not load.
LINEAR_SUBCLASS_TYPES: Final = frozenset({"falcon"})

# transformers splits or joins these tensors while it loads them, which is impossible with packed codes.
REWRITTEN_BY_TYPE: Final[dict[str, frozenset[str]]] = {
    "hrm_text": frozenset({"mlp.gate_up_proj", "attn.gqkv_proj"}),
    "minimax_m3_vl": frozenset({"shared_experts.gate_proj", "shared_experts.up_proj"}),
    "molmo2": frozenset({"self_attn.att_proj", "mlp.ff_proj"}),
}

# The output embedding may be tied to one of these.
TOKEN_EMBEDDING_LEAVES: Final = frozenset(
    {
        "embed_tokens", "embed_in", "embed", "embeddings", "input_embedding", "word_embedding",
        "word_embeddings", "tokens_embed", "tok_embeddings", "token_embedding", "wte", "shared",
    }
)  # fmt: skip
EMBEDDING_LEAVES: Final = TOKEN_EMBEDDING_LEAVES | frozenset(
    {
        "embed_tokens_per_layer", "embed_positions", "segment_embedding", "position_embedding",
        "position_embeddings", "positions_embed", "token_type_embeddings", "ngram_embeddings",
        "shape_embed", "pronunciation_embed", "encoder_hash_tok_embedding", "wpe",
    }
)  # fmt: skip

# A path with one of these components belongs to a module that maps hidden states to labels or tokens.
OUTPUT_COMPONENTS: Final = frozenset(
    {
        "lm_head", "lm_heads", "embed_out", "generator_lm_head", "generator_predictions", "output_projection",
        "lm_loss", "pred_layer", "cls", "unembed", "score", "classifier", "qa_outputs", "classification_head",
    }
)  # fmt: skip
# These are output embeddings only if they are the whole path or, for `head`, its last component.
OUTPUT_ROOTS: Final = frozenset({"head", "output", "decoder", "proj_out"})
OUTPUT_LEAVES: Final = frozenset({"head"})

# Model types whose output embedding is not `lm_head`. A tied one is absent on disk but must be listed all the same.
OUTPUT_MODULE_BY_TYPE: Final[dict[str, str]] = {
    "bert": "cls.predictions.decoder",
    "big_bird": "cls.predictions.decoder",
    "biogpt": "output_projection",
    "blip": "text_decoder.cls.predictions.decoder",
    "electra": "generator_lm_head",
    "ernie": "cls.predictions.decoder",
    "git": "output",
    "gpt_neox": "embed_out",
    "gpt_neox_japanese": "embed_out",
    "megatron-bert": "cls.predictions.decoder",
    "modernbert-decoder": "decoder",
    "rembert": "cls.predictions.decoder",
    "roc_bert": "cls.predictions.decoder",
    "roformer": "cls.predictions.decoder",
    "rwkv": "head",
    "trocr": "output_projection",
    "whisper": "proj_out",
    "xlm": "pred_layer.proj",
    "xlnet": "lm_loss",
}

# A path with one of these components chooses experts, or the keys that attention may see.
ROUTER_COMPONENTS: Final = frozenset(
    {"gate", "router", "router_mlp", "shared_expert_gate", "indexer", "wg", "block_sparse_moe_gate"}
)

# The kernels of a Mamba mixer read these weights directly instead of calling the module's forward.
MAMBA_COMPONENTS: Final = frozenset({"mamba", "mamba2", "mixer", "ssm"})
MAMBA_KERNEL_LEAVES: Final = frozenset({"out_proj", "x_proj", "dt_proj"})

# Decay and write gates of linear attention, with one row per head.
RECURRENT_GATE_NAMES: Final = frozenset(
    {"linear_attn.in_proj_a", "linear_attn.in_proj_b", "linear_attn.in_proj_ba", "linear_attn.a_proj",
     "linear_attn.b_proj", "self_attn.b_proj", "attention.b_proj"}
)  # fmt: skip

# Zamba runs one block at several depths: there is one copy on disk, and a tied one at every depth in memory.
SHARED_BLOCK_COMPONENTS: Final = frozenset({"shared_transf", "shared_transformer"})

PROJECTOR_PATTERN: Final = re.compile(
    r"(?:^|_)(?:projector|merger|resampler|connector|aligner|qformer)(?:_|$)"
    r"|^(?:visual|modality|multimodal)_projection$"
)
VISION_OR_AUDIO_PATTERN: Final = re.compile(
    r"(?:^|_)(?:vision|visual|vit|image|img|audio|speech|video)(?:_|$)|^(?:vpm|apm)$"
)
EXPERT_COMPONENTS: Final = frozenset({"experts"})
MOE_PATTERN: Final = re.compile(r"(?:^|_)moe(?:_|$)|^(?:input_linear|output_linear)$")


# Towers and projectors that transformers moves to these paths in memory while it loads them.
# None of their weights is ever quantized.
TOWERS_IN_MEMORY_BY_TYPE: Final[dict[str, tuple[str, ...]]] = {
    "cosmos3_edge": ("model.visual",),
    "cosmos3_omni": ("model.visual",),
    "dots3_note": ("model.vision_tower", "model.audio_tower"),
    "ernie4_5_vl_moe": ("model.vision_tower", "model.resampler_model"),
    "hyperclovax_vision_v2": ("model.projector",),
    "inkling2": ("model.vision_tower",),
    "inkling_mm_model": ("model.vision_tower",),
    "kimi_k25": ("model.vision_tower", "model.mm_projector"),
    "lfm3_vl": ("model.vision_tower",),
    "minimax_m3_vl": ("model.vision_tower", "model.multi_modal_projector"),
    "mistral_large4": ("model.vision_tower", "model.multi_modal_projector"),
    "molmo2": ("model.vision_tower", "model.multi_modal_projector"),
    "nemotron_h_omni": ("vision_model", "multi_modal_projector"),
    "paddleocr_vl": ("model.projector",),
    "pi0": ("model.vlm.vision_tower", "model.vlm.multi_modal_projector"),
    "qianfan_ocr": ("model.vision_tower", "model.multi_modal_projector"),
    "step3p7": ("model.vision_model", "model.multi_modal_projector"),
    "unlimited_ocr": ("model.vision_tower", "model.multi_modal_projector"),
}


@dataclass(frozen=True, slots=True)
class Fusion:
    """Sibling modules that vLLM computes as one product.

    Attributes:
        parts: Names of the sibling modules, in the order of the fused product.
        fused: vLLM's name of the fused module.
    """

    parts: tuple[str, ...]
    fused: str


FUSIONS: Final = (
    Fusion(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    Fusion(("query", "key", "value"), "qkv_proj"),
    Fusion(("gate_proj", "up_proj"), "gate_up_proj"),
    Fusion(("w1", "w3"), "w1"),
    Fusion(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
    Fusion(("in_proj_qkv", "in_proj_z"), "in_proj_qkvz"),
    Fusion(("in_proj_b", "in_proj_a"), "in_proj_ba"),
)


@dataclass(frozen=True, slots=True)
class Renaming:
    """A renaming that transformers 5 applies while it loads a checkpoint.

    Attributes:
        model_types: Model types that it applies to. None means every type.
        pattern: Regular expression for the module's path on disk.
        targets: Replacements: the paths of the module or modules in memory.
    """

    model_types: frozenset[str] | None
    pattern: re.Pattern[str]
    targets: tuple[str, ...]


def _renaming(model_types: str, pattern: str, *targets: str) -> Renaming:
    return Renaming(frozenset(model_types.split()) if model_types else None, re.compile(pattern), targets)


# Applied in order, each to the names left by the ones before; checked against transformers' own renaming.
RENAMINGS: Final = (
    _renaming("", r"\.block_sparse_moe\.", ".mlp."),
    _renaming("", r"^language_model\.lm_head", "lm_head"),
    _renaming("", r"^language_model\.model\.", "model.language_model."),
    _renaming("", r"^.*\.(shared_transf(?:ormer)?\.)", r"\1"),
    _renaming("nemotron_h", r"^(language_model\.)?backbone\.", r"\1model."),
    _renaming("laguna", r"\.shared_expert\.", ".shared_experts."),
    _renaming("hy_v3", r"\.shared_mlp\.", ".shared_experts."),
    _renaming("hy_v4", r"\.linear_gate$", ".gate_proj"),
    _renaming("lfm3", r"\.self_attn\.gate_proj$", ".self_attn.g_proj"),
    _renaming("kimi_linear glm5_next glm5_next_text", r"\.self_attn\.(f_[ab]_proj)$", r".self_attn.forget_gate.\1"),
    _renaming("bailing_hybrid", r"\.attention\.dense$", ".self_attn.o_proj"),
    _renaming("bailing_hybrid", r"\.attention\.f_proj$", ".self_attn.forget_gate.f_proj"),
    _renaming("bailing_hybrid", r"\.attention\.", ".self_attn."),
    _renaming("axk2", r"\.self_attn\.q_b_proj$", ".self_attn.q_b_proj", ".self_attn.q_gate_proj"),
    _renaming("axk2", r"layernorm\.W_down$", "layernorm.mlp.fc1"),
    _renaming("axk2", r"layernorm\.W_up$", "layernorm.mlp.fc2"),
    _renaming("hrm_text", r"\.mlp\.gate_up_proj$", ".mlp.gate_proj", ".mlp.up_proj"),
    _renaming(
        "hrm_text",
        r"\.attn\.gqkv_proj$",
        ".attn.gate_proj",
        ".attn.q_proj",
        ".attn.k_proj",
        ".attn.v_proj",
    ),
    _renaming("hrm_text", r"\.attn\.", ".self_attn."),
    _renaming("inkling2 inkling2_text", r"^model\.llm\.", "model."),
    _renaming("inkling_mm_model", r"^model\.llm\.", "model.language_model."),
    _renaming("inkling2 inkling2_text inkling_mm_model", r"\.attn\.gate_attn$", ".self_attn.gate_proj"),
    _renaming("inkling2 inkling2_text inkling_mm_model", r"\.attn\.w([qkvor])_(?:du|dv|ud)$", r".self_attn.\1_proj"),
    _renaming("inkling2 inkling2_text inkling_mm_model", r"\.attn\.attn_sink_proj$", ".self_attn.sink_proj"),
    _renaming("deepseek_v4", r"\.attn\.indexer\.weights_proj$", ".attn.indexer.scorer.weights_proj"),
    _renaming("deepseek_v4", r"\.attn\.indexer\.(?:compressor\.)?", ".attn.compressor.indexer."),
    _renaming("deepseek_v4", r"\.wgate$", ".gate_proj"),
    _renaming("deepseek_v4", r"\.w(kv|q_a|q_b|o_a|o_b)$", r".\1_proj"),
    _renaming("deepseek_v4", r"\.attn\.", ".self_attn."),
    _renaming("deepseek_v4", r"\.shared_experts\.w1$", ".shared_experts.gate_proj"),
    _renaming("deepseek_v4", r"\.shared_experts\.w2$", ".shared_experts.down_proj"),
    _renaming("deepseek_v4", r"\.shared_experts\.w3$", ".shared_experts.up_proj"),
    _renaming("deepseek_v4", r"\.ffn\.", ".mlp."),
    _renaming("pi0", r"^paligemma_with_expert\.gemma_expert\.model\.", "model.dit."),
    _renaming(
        "pi0",
        r"^paligemma_with_expert\.\w+\.model\.language_model\.model\.",
        "model.vlm.language_model.",
    ),
    _renaming("qianfan_ocr", r"^(model\.language_model)\.encoder\.", r"\1."),
    _renaming("t5gemma2", r"^model\.encoder\.layers\.", "model.encoder.text_model.layers."),
    _renaming("kimi_k25", r"^(model\.language_model)\.blocks\.", r"\1.layers."),
    _renaming("cosmos3_edge cosmos3_omni", r"\.self_attn\.to_([qkv])$", r".self_attn.\1_proj"),
    _renaming("cosmos3_edge cosmos3_omni", r"\.self_attn\.to_out$", ".self_attn.o_proj"),
    _renaming("cosmos3_edge", r"\.mlp\.up_proj$", ".mlp.fc1"),
    _renaming("cosmos3_edge", r"\.mlp\.down_proj$", ".mlp.fc2"),
    _renaming("mistral_large4", r"\.attention\.wkv_a_with_mqa$", ".self_attn.kv_a_proj_with_mqa"),
    _renaming("mistral_large4", r"\.attention\.wkv_b$", ".self_attn.kv_b_proj"),
    _renaming("mistral_large4", r"\.attention\.w([qo])(_a|_b)?$", r".self_attn.\1\2_proj"),
    _renaming("mistral_large4", r"\.attention\.", ".self_attn."),
    _renaming("mistral_large4", r"\.shared_experts\.", ".mlp.shared_experts."),
    _renaming("mistral_large4", r"\.feed_forward\.", ".mlp."),
    _renaming("mistral_large4", r"\.w1$", ".gate_proj"),
    _renaming("mistral_large4", r"\.w2$", ".down_proj"),
    _renaming("mistral_large4", r"\.w3$", ".up_proj"),
    _renaming("molmo2", r"^model\.transformer\.blocks\.", "model.language_model.layers."),
    _renaming("molmo2", r"\.mlp\.ff_out$", ".mlp.down_proj"),
    _renaming("molmo2", r"\.mlp\.ff_proj$", ".mlp.gate_proj", ".mlp.up_proj"),
    _renaming("molmo2", r"\.attn_out$", ".o_proj"),
    _renaming("molmo2", r"\.att_proj$", ".q_proj", ".k_proj", ".v_proj"),
)
