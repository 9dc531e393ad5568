"""The table of llama.cpp's architectures that are read: the tensors of a layer and their names in transformers.

It has architectures that transformers has, too, and whose tensors become the checkpoint's by renaming, reordering of
rows and an offset of the norms. The names are those of gguf-py's table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

EMBEDDING_NAME = "token_embd.weight"
OUTPUT_NAME = "output.weight"
ROPE_FACTORS_NAME = "rope_freqs.weight"
LONG_FACTORS_NAME = "rope_factors_long.weight"
SHORT_FACTORS_NAME = "rope_factors_short.weight"


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of a layer.

    Attributes:
        name: Its name in transformers. `{}` stands for the number of an expert.
        shape: Its shape in the letters of `sizes.read_sizes`.
        required: Whether every file has it.
        new_axis: Place of the dimension of size 1 that transformers has and GGUF does not.
    """

    name: str
    shape: str
    required: bool = True
    new_axis: int | None = None


_Parts = Mapping[str, Part]


def _optional(parts: _Parts) -> _Parts:
    return {name: Part(part.name, part.shape, required=False) for name, part in parts.items()}


def _biases(parts: _Parts, *names: str) -> _Parts:
    """Return the biases of the given layers, which have one value per row of the weight."""
    found = {name: parts[f"{name}.weight"] for name in names}
    return {
        f"{name}.bias": Part(part.name.removesuffix("weight") + "bias", part.shape[0]) for name, part in found.items()
    }


_TIED_EMBEDDING: _Parts = {EMBEDDING_NAME: Part("model.embed_tokens.weight", "vh")}
_EMBEDDING: _Parts = {**_TIED_EMBEDDING, OUTPUT_NAME: Part("lm_head.weight", "vh", required=False)}
_OUTPUT_NORM: _Parts = {"output_norm.weight": Part("model.norm.weight", "h")}
OUTSIDE: _Parts = {**_EMBEDDING, **_OUTPUT_NORM}
_OUTSIDE_WITH_BIAS: _Parts = {**OUTSIDE, **_biases(OUTSIDE, "output_norm")}

_NORMS: _Parts = {
    "attn_norm.weight": Part("input_layernorm.weight", "h"),
    "ffn_norm.weight": Part("post_attention_layernorm.weight", "h"),
}
_GEMMA_NORMS: _Parts = {
    "attn_norm.weight": Part("input_layernorm.weight", "h"),
    "post_attention_norm.weight": Part("post_attention_layernorm.weight", "h"),
    "ffn_norm.weight": Part("pre_feedforward_layernorm.weight", "h"),
    "post_ffw_norm.weight": Part("post_feedforward_layernorm.weight", "h"),
}
_PROJECTIONS: _Parts = {
    "attn_q.weight": Part("self_attn.q_proj.weight", "qh"),
    "attn_k.weight": Part("self_attn.k_proj.weight", "kh"),
    "attn_v.weight": Part("self_attn.v_proj.weight", "kh"),
    "attn_output.weight": Part("self_attn.o_proj.weight", "hq"),
}
_ATTENTION: _Parts = {**_NORMS, **_PROJECTIONS}
_ATTENTION_BIASES = _biases(_ATTENTION, "attn_q", "attn_k", "attn_v")
_ALL_ATTENTION_BIASES = _biases(_ATTENTION, "attn_q", "attn_k", "attn_v", "attn_output")
_NORM_BIASES = _biases(_NORMS, "attn_norm", "ffn_norm")
_HEAD_NORMS: _Parts = {
    "attn_q_norm.weight": Part("self_attn.q_norm.weight", "d"),
    "attn_k_norm.weight": Part("self_attn.k_norm.weight", "d"),
}
_MLP: _Parts = {
    "ffn_gate.weight": Part("mlp.gate_proj.weight", "fh"),
    "ffn_up.weight": Part("mlp.up_proj.weight", "fh"),
    "ffn_down.weight": Part("mlp.down_proj.weight", "hf"),
}
_UNGATED_MLP: _Parts = {name: part for name, part in _MLP.items() if name != "ffn_gate.weight"}
_EXPERTS: _Parts = {
    "ffn_gate_inp.weight": Part("mlp.gate.weight", "eh"),
    "ffn_gate_exps.weight": Part("mlp.experts.{}.gate_proj.weight", "emh"),
    "ffn_up_exps.weight": Part("mlp.experts.{}.up_proj.weight", "emh"),
    "ffn_down_exps.weight": Part("mlp.experts.{}.down_proj.weight", "ehm"),
}
_SHARED_EXPERT: _Parts = {
    "ffn_gate_inp_shexp.weight": Part("mlp.shared_expert_gate.weight", "h", new_axis=0),
    "ffn_gate_shexp.weight": Part("mlp.shared_expert.gate_proj.weight", "sh"),
    "ffn_up_shexp.weight": Part("mlp.shared_expert.up_proj.weight", "sh"),
    "ffn_down_shexp.weight": Part("mlp.shared_expert.down_proj.weight", "hs"),
}
_PHI3: _Parts = {
    **_NORMS,
    "attn_qkv.weight": Part("self_attn.qkv_proj.weight", "Qh"),
    "attn_output.weight": Part("self_attn.o_proj.weight", "hq"),
    "ffn_up.weight": Part("mlp.gate_up_proj.weight", "Fh"),
    "ffn_down.weight": Part("mlp.down_proj.weight", "hf"),
}
_OLMO2: _Parts = {
    **_PROJECTIONS,
    "attn_q_norm.weight": Part("self_attn.q_norm.weight", "q"),
    "attn_k_norm.weight": Part("self_attn.k_norm.weight", "k"),
    "post_attention_norm.weight": Part("post_attention_layernorm.weight", "h"),
    "post_ffw_norm.weight": Part("post_feedforward_layernorm.weight", "h"),
}
_STARCODER2_MLP: _Parts = {
    "ffn_up.weight": Part("mlp.c_fc.weight", "fh"),
    "ffn_down.weight": Part("mlp.c_proj.weight", "hf"),
}
_LFM2: _Parts = {
    "attn_norm.weight": Part("operator_norm.weight", "h"),
    "ffn_norm.weight": Part("ffn_norm.weight", "h"),
    "ffn_gate.weight": Part("feed_forward.w1.weight", "fh"),
    "ffn_up.weight": Part("feed_forward.w3.weight", "fh"),
    "ffn_down.weight": Part("feed_forward.w2.weight", "hf"),
}
_LFM2_ATTENTION: _Parts = {
    **{name: part for name, part in _PROJECTIONS.items() if name != "attn_output.weight"},
    "attn_output.weight": Part("self_attn.out_proj.weight", "hq"),
    "attn_q_norm.weight": Part("self_attn.q_layernorm.weight", "d"),
    "attn_k_norm.weight": Part("self_attn.k_layernorm.weight", "d"),
}
_LFM2_CONVOLUTION: _Parts = {
    "shortconv.conv.weight": Part("conv.conv.weight", "hc", new_axis=1),
    "shortconv.in_proj.weight": Part("conv.in_proj.weight", "th"),
    "shortconv.out_proj.weight": Part("conv.out_proj.weight", "hh"),
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes:
        model_type: Model type in transformers.
        model_class: Class in transformers.
        parts: Tensors of every layer.
        outside: Tensors outside of the layers.
        attention: Additional tensors of a layer with attention.
        convolution: Additional tensors of a layer without attention (whose number of key heads is 0).
        permuted: Whether llama.cpp interleaves the two halves of each head's rows of query and key.
        norm_offset: What llama.cpp adds to the weights of norms.
        epsilon: Key of the norms' epsilon in GGUF, after `attention.`, and its name in config.json.
        activation: Name and value of the activation function in config.json.
        partly_rotated: Whether only a part of a head's dimensions may be rotated.
        read_by_transformers: Whether transformers reads such files itself.
    """

    model_type: str
    model_class: str
    parts: _Parts
    outside: _Parts = field(default_factory=lambda: OUTSIDE)
    attention: _Parts = field(default_factory=dict)
    convolution: _Parts = field(default_factory=dict)
    permuted: bool = False
    norm_offset: float = 0.0
    epsilon: tuple[str, str] = ("layer_norm_rms_epsilon", "rms_norm_eps")
    activation: tuple[str, str] = ("hidden_act", "silu")
    partly_rotated: bool = False
    read_by_transformers: bool = True


_PARALLEL = _optional({name: part for name, part in {**_NORMS, **_NORM_BIASES}.items() if name.startswith("ffn_norm")})
_GELU = "gelu_pytorch_tanh"

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", {**_ATTENTION, **_optional(_ALL_ATTENTION_BIASES), **_MLP}, permuted=True
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", {**_ATTENTION, **_ATTENTION_BIASES, **_MLP}),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", {**_ATTENTION, **_HEAD_NORMS, **_MLP}),
    "qwen2moe": Architecture(
        "qwen2_moe", "Qwen2MoeForCausalLM", {**_ATTENTION, **_ATTENTION_BIASES, **_EXPERTS, **_SHARED_EXPERT}
    ),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM", {**_ATTENTION, **_HEAD_NORMS, **_EXPERTS}),
    "smollm3": Architecture(
        "smollm3", "SmolLM3ForCausalLM", {**_ATTENTION, **_MLP}, permuted=True, read_by_transformers=False
    ),
    "granite": Architecture(
        "granite", "GraniteForCausalLM", {**_ATTENTION, **_optional(_ALL_ATTENTION_BIASES), **_MLP},
        permuted=True, read_by_transformers=False,
    ),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", {**_OLMO2, **_MLP}, read_by_transformers=False),
    "gemma": Architecture(
        "gemma", "GemmaForCausalLM", {**_ATTENTION, **_MLP},
        outside={**_TIED_EMBEDDING, **_OUTPUT_NORM}, norm_offset=1.0, activation=("hidden_act", _GELU),
        read_by_transformers=False,
    ),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", {**_GEMMA_NORMS, **_PROJECTIONS, **_MLP},
        outside={**_TIED_EMBEDDING, **_OUTPUT_NORM}, norm_offset=1.0, activation=("hidden_activation", _GELU),
    ),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", {**_GEMMA_NORMS, **_PROJECTIONS, **_HEAD_NORMS, **_MLP},
        norm_offset=1.0, activation=("hidden_activation", _GELU),
    ),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", _PHI3, partly_rotated=True),
    "lfm2": Architecture(
        "lfm2", "Lfm2ForCausalLM", _LFM2,
        outside={**_EMBEDDING, "token_embd_norm.weight": Part("model.embedding_norm.weight", "h")},
        attention=_LFM2_ATTENTION, convolution=_LFM2_CONVOLUTION, epsilon=("layer_norm_rms_epsilon", "norm_eps"),
    ),
    "starcoder2": Architecture(
        "starcoder2", "Starcoder2ForCausalLM",
        {
            **_ATTENTION, **_NORM_BIASES, **_ALL_ATTENTION_BIASES,
            **_STARCODER2_MLP, **_biases(_STARCODER2_MLP, "ffn_up", "ffn_down"),
        },
        outside=_OUTSIDE_WITH_BIAS, epsilon=("layer_norm_epsilon", "norm_epsilon"), activation=("hidden_act", _GELU),
    ),
    "nemotron": Architecture(
        "nemotron", "NemotronForCausalLM", {**_ATTENTION, **_NORM_BIASES, **_UNGATED_MLP},
        outside=_OUTSIDE_WITH_BIAS, norm_offset=1.0, epsilon=("layer_norm_epsilon", "norm_eps"),
        activation=("hidden_act", "relu2"), partly_rotated=True,
    ),
    "stablelm": Architecture(
        "stablelm", "StableLmForCausalLM",
        {**_ATTENTION, **_NORM_BIASES, **_PARALLEL, **_optional(_ATTENTION_BIASES), **_MLP},
        outside=_OUTSIDE_WITH_BIAS, epsilon=("layer_norm_epsilon", "layer_norm_eps"), partly_rotated=True,
    ),
}  # fmt: skip
"""Architectures by their name in a file (`general.architecture`)."""
