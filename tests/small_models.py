"""Tiny safetensors checkpoints, written without any of the code under test."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ELEMENT_NBYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "F32": 4,
    "I64": 8,
}

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def weight(shape: Sequence[int], dtype: str = "BF16", *, seed: int = 0, scale: float = 0.05) -> Tensor:
    """Return normally distributed weights. bfloat16 weights are truncated float32."""
    values = np.random.default_rng(seed).normal(0, scale, tuple(shape)).astype(np.float32)
    return tensor_of(values, dtype)


def tensor_of(values: np.ndarray, dtype: str) -> Tensor:
    """Return float32 values as a tensor of a float dtype."""
    values = np.asarray(values, np.float32)
    if dtype == "BF16":
        data = (values.view(np.uint32) >> np.uint32(16)).astype("<u2").tobytes()
    elif dtype == "F16":
        data = values.astype("<f2").tobytes()
    else:
        assert dtype == "F32"
        data = values.astype("<f4").tobytes()
    return Tensor(dtype, values.shape, data)


def raw_tensor(dtype: str, shape: Sequence[int], *, seed: int = 0) -> Tensor:
    """Return a tensor of any dtype with random bytes (0 or 1 for BOOL)."""
    count = int(np.prod(tuple(shape), dtype=np.int64))
    high = 2 if dtype == "BOOL" else 256
    data = np.random.default_rng(seed).integers(0, high, count * ELEMENT_NBYTES[dtype], np.uint8)
    return Tensor(dtype, tuple(shape), data.tobytes())


def header_bytes(record: object, *, alignment: int = 8) -> bytes:
    """Return the length prefix and padded JSON of a header given as an object."""
    text = json.dumps(record, separators=(",", ":")).encode("utf-8")
    text = text.ljust(-(-(8 + len(text)) // alignment) * alignment - 8, b" ")
    return struct.pack("<Q", len(text)) + text


def safetensors_bytes(tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a safetensors file as the library writes it: wide dtypes first, so that all tensors are aligned."""
    record: dict[str, object] = {"__metadata__": {"format": "pt"} if metadata is None else dict(metadata)}
    ordered = sorted(tensors.items(), key=lambda item: (-ELEMENT_NBYTES[item[1].dtype], item[0]))
    offset = 0
    for name, tensor in ordered:
        stop = offset + len(tensor.data)
        record[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    return header_bytes(record) + b"".join(tensor.data for _, tensor in ordered)


LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "model_type": "llama",
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

SIDE_FILES = {
    "LICENSE": b"Permission is granted.\n",
    "generation_config.json": b'{"do_sample": false}\n',
    "tokenizer.json": b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}\n',
    "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}\n',
}


def llama_config(
    *, n_layers: int = 2, hidden: int = 32, intermediate: int = 48, vocabulary: int = 24
) -> dict[str, object]:
    return {
        **LLAMA_CONFIG,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": 2,
        "num_hidden_layers": n_layers,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
    }


def llama_tensors(
    *,
    n_layers: int = 2,
    hidden: int = 32,
    intermediate: int = 48,
    vocabulary: int = 24,
    dtype: str = "BF16",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the tensors of a small Llama."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(n_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.k_proj.weight": (hidden, hidden),
            prefix + "self_attn.v_proj.weight": (hidden, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (intermediate, hidden),
            prefix + "mlp.up_proj.weight": (intermediate, hidden),
            prefix + "mlp.down_proj.weight": (hidden, intermediate),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    return {name: weight(shape, dtype, seed=seed + number) for number, (name, shape) in enumerate(shapes.items())}


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    n_shards: int = 1,
    config: Mapping[str, object] | None = None,
    side_files: Mapping[str, bytes] = SIDE_FILES,
) -> Path:
    """Write a checkpoint: `model.safetensors`, or several shards and their index, config.json and side files."""
    tensors = llama_tensors() if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(llama_config() if config is None else config, indent=2))
    for name, data in side_files.items():
        (folder / name).write_bytes(data)
    if n_shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return folder
    names = list(tensors)
    shards = {f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors": names[i::n_shards] for i in range(n_shards)}
    for shard, members in shards.items():
        (folder / shard).write_bytes(safetensors_bytes({name: tensors[name] for name in members}))
    write_index(folder, {name: shard for shard, members in shards.items() for name in members})
    return folder


def write_llama(folder: Path, *, n_shards: int = 1, n_layers: int = 2, dtype: str = "BF16") -> Path:
    """Write a small Llama with tokenizer stubs and a licence."""
    config = llama_config(n_layers=n_layers)
    return write_checkpoint(folder, llama_tensors(n_layers=n_layers, dtype=dtype), n_shards=n_shards, config=config)


def write_index(folder: Path, weight_map: Mapping[str, object]) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}
    (folder / INDEX).write_text(json.dumps(index))


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a directory, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names_beside(path: Path) -> set[str]:
    """Return the names in the directory that contains `path`."""
    return {entry.name for entry in path.parent.iterdir()}


def tiny_tensors() -> dict[str, Tensor]:
    """Return one packed weight of each float format, one kept matrix, a bias and a norm: a few hundred bytes each."""
    return {
        "model.layers.0.self_attn.o_proj.weight": weight((8, 40), "BF16", seed=1),
        "model.layers.0.mlp.down_proj.weight": weight((9, 7), "F16", seed=2),
        "model.layers.0.mlp.down_proj.bias": weight((9,), "F32", seed=3),
        "lm_head.weight": weight((3, 8), "BF16", seed=4),
        "model.norm.weight": weight((8,), "BF16", seed=5),
    }


def write_tiny(folder: Path, *, n_shards: int = 1, side_files: Iterable[str] = ("LICENSE",)) -> Path:
    """Write the checkpoint of `tiny_tensors`, with a three-line config of a class that nobody knows."""
    return write_checkpoint(
        folder,
        tiny_tensors(),
        n_shards=n_shards,
        config={"architectures": ["TinyForCausalLM"], "model_type": "llama", "tie_word_embeddings": False},
        side_files={name: SIDE_FILES[name] for name in side_files},
    )
