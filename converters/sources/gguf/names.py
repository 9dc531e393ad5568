"""Maps GGUF's metadata and tensor names to config.json and transformers' names, for the Llama and Qwen families.

Tested against gguf-py's table of names and against transformers' conversion of the same files. Unlike transformers,
this module carries the frequency factors of Llama 3 (the tensor `rope_freqs.weight`) and the scaling of rotary
positions over into the config, and writes numbers that GGUF keeps in float32 with the fewest digits that give the same
float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.manifest import JsonObject
from qformat.converters.sources.gguf.header import GgufArray, GgufHeader, GgufTensor, Scalar
from qformat.errors import Reason, SourceError

ROPE_FACTORS_NAME = "rope_freqs.weight"
EMBEDDING_NAME = "token_embd.weight"
OUTPUT_NAME = "output.weight"

_LARGEST_LAYER_COUNT = 10_000
_LARGEST_EXPERT_COUNT = 4096


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor of a layer: its name in transformers, and its shape in the letters of `_sizes`."""

    name: str
    shape: str
    required: bool = True


_OUTSIDE = {
    EMBEDDING_NAME: _Part("model.embed_tokens.weight", "vh"),
    "output_norm.weight": _Part("model.norm.weight", "h"),
    OUTPUT_NAME: _Part("lm_head.weight", "vh", required=False),
}
_ATTENTION = {
    "attn_norm.weight": _Part("input_layernorm.weight", "h"),
    "ffn_norm.weight": _Part("post_attention_layernorm.weight", "h"),
    "attn_q.weight": _Part("self_attn.q_proj.weight", "qh"),
    "attn_k.weight": _Part("self_attn.k_proj.weight", "kh"),
    "attn_v.weight": _Part("self_attn.v_proj.weight", "kh"),
    "attn_output.weight": _Part("self_attn.o_proj.weight", "hq"),
}
_ATTENTION_BIASES = {
    "attn_q.bias": _Part("self_attn.q_proj.bias", "q"),
    "attn_k.bias": _Part("self_attn.k_proj.bias", "k"),
    "attn_v.bias": _Part("self_attn.v_proj.bias", "k"),
}
_LLAMA_BIASES = {
    name: _Part(part.name, part.shape, required=False)
    for name, part in {**_ATTENTION_BIASES, "attn_output.bias": _Part("self_attn.o_proj.bias", "h")}.items()
}
_HEAD_NORMS = {
    "attn_q_norm.weight": _Part("self_attn.q_norm.weight", "d"),
    "attn_k_norm.weight": _Part("self_attn.k_norm.weight", "d"),
}
_MLP = {
    "ffn_gate.weight": _Part("mlp.gate_proj.weight", "fh"),
    "ffn_up.weight": _Part("mlp.up_proj.weight", "fh"),
    "ffn_down.weight": _Part("mlp.down_proj.weight", "hf"),
}
_EXPERTS = {
    "ffn_gate_inp.weight": _Part("mlp.gate.weight", "eh"),
    "ffn_gate_exps.weight": _Part("mlp.experts.{}.gate_proj.weight", "emh"),
    "ffn_up_exps.weight": _Part("mlp.experts.{}.up_proj.weight", "emh"),
    "ffn_down_exps.weight": _Part("mlp.experts.{}.down_proj.weight", "ehm"),
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp.weight": _Part("mlp.shared_expert_gate.weight", "h"),
    "ffn_gate_shexp.weight": _Part("mlp.shared_expert.gate_proj.weight", "sh"),
    "ffn_up_shexp.weight": _Part("mlp.shared_expert.up_proj.weight", "sh"),
    "ffn_down_shexp.weight": _Part("mlp.shared_expert.down_proj.weight", "hs"),
}


@dataclass(frozen=True, slots=True)
class _Architecture:
    """An architecture of llama.cpp: its model type and class in transformers, and the tensors of a layer."""

    model_type: str
    model_class: str
    parts: Mapping[str, _Part]
    permuted: bool = False


_ARCHITECTURES = {
    "llama": _Architecture("llama", "LlamaForCausalLM", {**_ATTENTION, **_LLAMA_BIASES, **_MLP}, permuted=True),
    "qwen2": _Architecture("qwen2", "Qwen2ForCausalLM", {**_ATTENTION, **_ATTENTION_BIASES, **_MLP}),
    "qwen3": _Architecture("qwen3", "Qwen3ForCausalLM", {**_ATTENTION, **_HEAD_NORMS, **_MLP}),
    "qwen2moe": _Architecture(
        "qwen2_moe", "Qwen2MoeForCausalLM", {**_ATTENTION, **_ATTENTION_BIASES, **_EXPERTS, **_SHARED_EXPERT}
    ),
    "qwen3moe": _Architecture("qwen3_moe", "Qwen3MoeForCausalLM", {**_ATTENTION, **_HEAD_NORMS, **_EXPERTS}),
}


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor of the model and its stored form.

    Attributes:
        name: Name in transformers.
        shape: Shape in transformers.
        stored: Tensor in the file.
        expert: Index of its matrix in `stored`, or None if it is all of `stored`.
        n_heads: Number of heads whose rows llama.cpp permuted. 0 if it did not.
    """

    name: str
    shape: tuple[int, ...]
    stored: GgufTensor
    expert: int | None
    n_heads: int


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A model as transformers describes it.

    Attributes:
        config: Contents of config.json without the dtype.
        tensors: All tensors of the model.
    """

    config: JsonObject
    tensors: tuple[NamedTensor, ...]


def name_model(header: GgufHeader, path: Path, rope_factors: NDArray[np.float32] | None) -> GgufModel:
    """Map a GGUF file to a transformers model.

    Args:
        header: Header of the file.
        path: Path of the file, for messages.
        rope_factors: Values of `rope_freqs.weight`, or None if the file does not have it.

    Raises:
        SourceError: The architecture, a tensor, a shape or the metadata is not supported.
    """
    metadata = _Metadata(header.metadata, path)
    name = metadata.text("general.architecture")
    if name not in _ARCHITECTURES:
        raise SourceError(
            Reason.UNSUPPORTED_SOURCE, path, f"{name!r} is not supported (supported: {', '.join(_ARCHITECTURES)})",
            field="general.architecture", next_step="Convert the original 16-bit checkpoint",
        )  # fmt: skip
    if "split.count" in header.metadata and metadata.integer("split.count", 1, 2**16) > 1:
        raise SourceError(
            Reason.UNSUPPORTED_SOURCE, path, "is one part of a split model",
            next_step="Join the parts with `llama-gguf-split --merge`",
        )  # fmt: skip
    architecture = _ARCHITECTURES[name]
    metadata.prefix = name
    sizes = _sizes(metadata, header, architecture)
    n_layers = metadata.integer("block_count", 1, _LARGEST_LAYER_COUNT)
    tensors = _tensors(header, path, architecture, sizes, n_layers)
    config = _config(metadata, header, architecture, sizes, n_layers, rope_factors)
    return GgufModel(config, tensors)


def _tensors(
    header: GgufHeader, path: Path, architecture: _Architecture, sizes: Mapping[str, int], n_layers: int
) -> tuple[NamedTensor, ...]:
    expected = dict(_OUTSIDE)
    for layer in range(n_layers):
        for name, part in architecture.parts.items():
            expected[f"blk.{layer}.{name}"] = _Part(f"model.layers.{layer}.{part.name}", part.shape, part.required)
    for name, part in expected.items():
        if part.required and name not in header.tensors:
            raise SourceError(Reason.MISSING_COMPONENT, path, "is missing", tensor=name)
    found: list[NamedTensor] = []
    for name, stored in header.tensors.items():
        if name == ROPE_FACTORS_NAME:
            continue
        if name not in expected:
            raise SourceError(
                Reason.UNKNOWN_TENSOR, path,
                f"is not part of a {architecture.model_type} model with {n_layers} layers", tensor=name,
            )  # fmt: skip
        part = expected[name]
        shape = tuple(sizes[letter] for letter in part.shape)
        if stored.shape != shape:
            problem = f"shape {list(stored.shape)}, expected {list(shape)}"
            raise SourceError(Reason.COMPONENT_SHAPE, path, problem, tensor=name)
        found += _named(stored, part, sizes, architecture)
    return tuple(found)


def _named(stored: GgufTensor, part: _Part, sizes: Mapping[str, int], architecture: _Architecture) -> list[NamedTensor]:
    if "{}" in part.name:
        shape = stored.shape[1:]
        return [NamedTensor(part.name.format(e), shape, stored, e, 0) for e in range(stored.shape[0])]
    n_heads = {"q": sizes["n"], "k": sizes["g"]}.get(part.shape[0], 0) if architecture.permuted else 0
    if ".v_proj." in part.name:
        n_heads = 0
    shape = (1, *stored.shape) if part.name.endswith("shared_expert_gate.weight") else stored.shape
    return [NamedTensor(part.name, shape, stored, None, n_heads)]


def _sizes(metadata: _Metadata, header: GgufHeader, architecture: _Architecture) -> dict[str, int]:
    """Return the sizes that the letters in shapes stand for."""
    largest = 2**24
    hidden = metadata.integer("embedding_length", 1, largest)
    n_heads = metadata.integer("attention.head_count", 1, 2**16)
    n_groups = metadata.integer("attention.head_count_kv", 1, 2**16, default=n_heads)
    head = metadata.integer("attention.key_length", 1, 2**16, default=hidden // n_heads)
    embedding = header.tensors.get(EMBEDDING_NAME)
    sizes = {
        "h": hidden,
        "v": embedding.shape[0] if embedding is not None else 0,
        "n": n_heads,
        "g": n_groups,
        "d": head,
        "q": n_heads * head,
        "k": n_groups * head,
        "f": metadata.integer("feed_forward_length", 1, largest, default=0),
    }
    if n_heads % n_groups or head % 2:
        raise metadata.refuse(
            "attention.head_count", f"{n_heads} heads of {head} dimensions in {n_groups} groups are not supported"
        )
    if (rotated := metadata.integer("rope.dimension_count", 1, 2**16, default=head)) != head:
        raise metadata.refuse(
            "rope.dimension_count", f"{rotated}, expected {head}: every dimension of a head must be rotated"
        )
    if "ffn_gate_exps.weight" in architecture.parts:
        sizes["e"] = metadata.integer("expert_count", 1, _LARGEST_EXPERT_COUNT)
        sizes["m"] = metadata.integer("expert_feed_forward_length", 1, largest)
        sizes["s"] = metadata.integer("expert_shared_feed_forward_length", 1, largest, default=sizes["f"])
    return sizes


def _config(
    metadata: _Metadata,
    header: GgufHeader,
    architecture: _Architecture,
    sizes: Mapping[str, int],
    n_layers: int,
    rope_factors: NDArray[np.float32] | None,
) -> JsonObject:
    context = metadata.integer("context_length", 1, 2**31)
    theta = metadata.number("rope.freq_base", default=10000.0)
    config: JsonObject = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        "hidden_act": "silu",
        "hidden_size": sizes["h"],
        "intermediate_size": sizes["f"],
        "num_hidden_layers": n_layers,
        "num_attention_heads": sizes["n"],
        "num_key_value_heads": sizes["g"],
        "head_dim": sizes["d"],
        "max_position_embeddings": context,
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "tie_word_embeddings": OUTPUT_NAME not in header.tensors,
        "vocab_size": sizes["v"],
    }
    if (scaling := _rope_scaling(metadata, context, theta, sizes["d"], rope_factors)) is not None:
        config["rope_scaling"] = scaling
    if architecture.model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    if "e" in sizes:
        config |= {
            "num_experts": sizes["e"],
            "num_experts_per_tok": metadata.integer("expert_used_count", 1, sizes["e"]),
            "moe_intermediate_size": sizes["m"],
            "norm_topk_prob": architecture.model_type == "qwen3_moe",  # as llama.cpp runs them
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if architecture.model_type == "qwen2_moe":
        config["shared_expert_intermediate_size"] = sizes["s"]
    for token in ("bos", "eos", "padding", "unknown"):
        identifier = header.metadata.get(f"tokenizer.ggml.{token}_token_id")
        if isinstance(identifier, int):
            config[{"padding": "pad", "unknown": "unk"}.get(token, token) + "_token_id"] = identifier
    return config


def _rope_scaling(
    metadata: _Metadata, context: int, theta: float, head: int, factors: NDArray[np.float32] | None
) -> JsonObject | None:
    kind = metadata.text("rope.scaling.type", default="none")
    if factors is not None and (factors != 1).any():
        return _llama3_scaling(metadata, theta, head, factors)
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": metadata.number("rope.scaling.factor")}
    if kind == "yarn":
        original = metadata.integer("rope.scaling.original_context_length", 1, 2**31, default=context)
        factor = metadata.number("rope.scaling.factor")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise metadata.refuse("rope.scaling.type", f"{kind!r}, expected none, linear or yarn")


def _llama3_scaling(metadata: _Metadata, theta: float, head: int, factors: NDArray[np.float32]) -> JsonObject:
    """Return the scaling of Llama 3.1 to 3.3, whose factors the file contains. Other factors are rejected."""
    low, high, original = 1.0, 4.0, 8192
    factor = float(factors.max())
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head, 2) / head)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if factors.shape != smooth.shape or not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise metadata.refuse(ROPE_FACTORS_NAME, "has factors other than those of Llama 3, which cannot be converted")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


class _Metadata:
    """The key-value pairs of a file, with type checks. `prefix` is put before keys that lack a section."""

    def __init__(self, values: Mapping[str, Scalar | GgufArray], path: Path) -> None:
        self.prefix = ""
        self._values = values
        self._path = path

    def refuse(self, key: str, problem: str) -> SourceError:
        """Return the error about a key."""
        return SourceError(Reason.CONFIG_FIELD, self._path, problem, field=self._full(key))

    def text(self, key: str, *, default: str | None = None) -> str:
        """Return a string."""
        value = self._values.get(self._full(key), default)
        if not isinstance(value, str):
            raise self.refuse(key, "is missing" if value is None else f"{value!r}, expected a string")
        return value

    def integer(self, key: str, smallest: int, largest: int, *, default: int | None = None) -> int:
        """Return an integer, or the default (which may be outside the bounds) if the key is missing."""
        value = self._values.get(self._full(key))
        if value is None and default is not None:
            return default
        if type(value) is not int or not smallest <= value <= largest:
            shown = "is missing" if value is None else f"{value!r}"
            raise self.refuse(key, f"{shown}, expected an integer from {smallest} to {largest}")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        """Return a positive finite number, rounded to the shortest decimal that gives the same float32."""
        value = self._values.get(self._full(key), default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.refuse(key, "is missing" if value is None else f"{value!r}, expected a positive number")
        return float(str(np.float32(value)))

    def _full(self, key: str) -> str:
        return f"{self.prefix}.{key}" if self.prefix else key
