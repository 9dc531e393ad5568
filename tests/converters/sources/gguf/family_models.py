"""A tiny GGUF file of every architecture: transformers' own parameters under the names of gguf-py's table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.converters.sources.gguf.gguf_models import matrix
from tests.small_models import SIDE_FILES

HIDDEN, INTERMEDIATE, VOCABULARY, CONTEXT = 64, 96, 48, 128

Value = float | int | str | bool | list[int] | list[bool]


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        model_type: Model type in transformers.
        settings: Settings of config.json that give a tiny model.
        metadata: Keys of a file, without the architecture's prefix, in addition to those of `write_family`.
        epsilon: Key of the norms' epsilon.
        kind: ggml type of the matrices.
    """

    model_type: str
    settings: Mapping[str, object] = field(default_factory=dict)
    metadata: Mapping[str, Value] = field(default_factory=dict)
    epsilon: str = "layer_norm_rms_epsilon"
    kind: str = "Q8_0"


# query_pre_attn_scalar is not in a file. transformers takes 256 for every model, which is right for heads of this size.
_GEMMA: dict[str, Value] = {"attention.key_length": 256, "attention.value_length": 256, "attention.sliding_window": 16}

FAMILIES = {
    "gemma2": Family("gemma2", {"head_dim": 256}, _GEMMA),
    "gemma3": Family("gemma3_text", {"head_dim": 256, "num_hidden_layers": 7}, {**_GEMMA, "block_count": 7}),
    "phi3": Family("phi3", {"pad_token_id": 0}, {"rope.scaling.original_context_length": 4096}),
    "lfm2": Family(
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "tie_word_embeddings": True},
        {"attention.head_count_kv": [0, 2], "shortconv.l_cache": 3},
        kind="BF16",  # transformers decodes blocks of this architecture in bfloat16, unlike ggml
    ),
    "starcoder2": Family("starcoder2", epsilon="layer_norm_epsilon"),
    # transformers reads the other key of the epsilon, which llama.cpp's files do not have, or its default (1e-5).
    "nemotron": Family("nemotron", {}, {"rope.dimension_count": 8}, epsilon="layer_norm_epsilon"),
    "stablelm": Family("stablelm", {"use_qkv_bias": True}, {"rope.dimension_count": 4}, epsilon="layer_norm_epsilon"),
}


def settings(family: Family) -> dict[str, Any]:
    """Return the settings of a tiny model."""
    return {
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "vocab_size": VOCABULARY, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, **family.settings,
    }  # fmt: skip


def parameters(family: Family) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of the model's parameters, keyed by its name in transformers."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.model_type, **settings(family)))
    found = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del found["lm_head.weight"]
    return found


def write_family(folder: Path, architecture: str, family: Family, *, split_max_tensors: int = 0) -> Path:
    """Write `model.gguf`, or its parts, with random values and tokenizer stubs into a folder and return the folder.

    Args:
        folder: Folder to create.
        architecture: Name of the architecture in GGUF.
        family: The architecture.
        split_max_tensors: Number of tensors per part, or 0 for one file.
    """
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in parameters(family).items():
        kind = family.kind if len(shape) == 2 else "F32"
        tensors[name] = matrix(tuple(size for size in shape if size != 1), kind, rng)
    return write_tensors(folder, architecture, family, tensors, split_max_tensors=split_max_tensors)


def write_tensors(
    folder: Path,
    architecture: str,
    family: Family,
    tensors: Mapping[str, np.ndarray],
    *,
    extra: Mapping[str, np.ndarray] | None = None,
    split_max_tensors: int = 0,
) -> Path:
    """Write `model.gguf`, or its parts, and tokenizer stubs into a folder and return the folder.

    Args:
        folder: Folder to create.
        architecture: Name of the architecture in GGUF.
        family: The architecture.
        tensors: Stored values, keyed by name in transformers. Bytes are blocks of the family's kind.
        extra: Stored values, keyed by name in GGUF.
        split_max_tensors: Number of tensors per part, or 0 for one file.
    """
    folder.mkdir()
    writer = gguf.GGUFWriter(str(folder / "model.gguf"), architecture, split_max_tensors=split_max_tensors)
    keys: dict[str, Value] = {
        "block_count": 2, "context_length": CONTEXT, "embedding_length": HIDDEN, "feed_forward_length": INTERMEDIATE,
        "attention.head_count": 4, "attention.head_count_kv": 2, f"attention.{family.epsilon}": 1e-5,
        "rope.freq_base": 10000.0, "vocab_size": VOCABULARY, **family.metadata,
    }  # fmt: skip
    add: dict[type, Any] = {
        float: writer.add_float32, int: writer.add_uint32, str: writer.add_string, list: writer.add_array,
    }  # fmt: skip
    for key, value in keys.items():
        add[type(value)](f"{architecture}.{key}", value)
    writer.add_token_list([f"token{number}" for number in range(VOCABULARY)])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, int(str(keys["block_count"])))
    stored = {names.get_name(name, try_suffixes=(".weight", ".bias")): values for name, values in tensors.items()}
    for stored_name, values in {**stored, **(extra or {})}.items():
        assert stored_name is not None
        kind = family.kind if values.dtype == np.uint8 else "F32"
        writer.add_tensor(stored_name, values, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, data in SIDE_FILES.items():
        (folder / name).write_bytes(data)
    return folder
