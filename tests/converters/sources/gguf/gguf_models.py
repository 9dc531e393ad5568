"""Small GGUF files, written with gguf-py's own writer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from tests.small_models import SIDE_FILES

HIDDEN, INTERMEDIATE, VOCABULARY, N_HEADS, N_GROUPS, HEAD = 256, 512, 64, 4, 2, 64

QUANTIZED = (
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4",
    "BF16", "F16", "F32",
)  # fmt: skip

_SCALES_AT = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
"""Where a block of a type that gguf-py cannot encode has its float16 scales."""


@dataclass(frozen=True)
class Sizes:
    """Sizes that differ between architectures."""

    head: int = HEAD
    tied: bool = False
    n_experts: int = 0
    expert: int = 0
    shared_expert: int = 0
    n_layers: int = 2


def matrix(shape: tuple[int, ...], kind: str, rng: np.random.Generator) -> np.ndarray:
    """Return a matrix as ggml stores it; types that gguf-py cannot encode of random codes and small scales."""
    quantization = gguf.GGMLQuantizationType[kind]
    if kind not in _SCALES_AT:
        stored: np.ndarray = gguf.quantize(rng.normal(0, 0.05, shape).astype(np.float32), quantization)
        return stored
    block_size, block_nbytes = gguf.GGML_QUANT_SIZES[quantization]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // block_size, block_nbytes), np.uint8)
    for place in _SCALES_AT[kind]:
        scales = rng.uniform(1e-4, 1e-3, blocks.shape[:-1]).astype(np.float16)
        blocks[..., place : place + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def tensor_shapes(architecture: str, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor, keyed by its name in GGUF."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCABULARY, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    if not sizes.tied:
        shapes["output.weight"] = (VOCABULARY, HIDDEN)
    q, k = N_HEADS * sizes.head, N_GROUPS * sizes.head
    for layer in range(sizes.n_layers):
        part: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (HIDDEN,), "ffn_norm.weight": (HIDDEN,), "attn_q.weight": (q, HIDDEN),
            "attn_k.weight": (k, HIDDEN), "attn_v.weight": (k, HIDDEN), "attn_output.weight": (HIDDEN, q),
        }  # fmt: skip
        if architecture.startswith("qwen2"):
            part |= {"attn_q.bias": (q,), "attn_k.bias": (k,), "attn_v.bias": (k,)}
        if architecture.startswith("qwen3"):
            part |= {"attn_q_norm.weight": (sizes.head,), "attn_k_norm.weight": (sizes.head,)}
        if sizes.n_experts:
            part |= {
                "ffn_gate_inp.weight": (sizes.n_experts, HIDDEN),
                "ffn_gate_exps.weight": (sizes.n_experts, sizes.expert, HIDDEN),
                "ffn_up_exps.weight": (sizes.n_experts, sizes.expert, HIDDEN),
                "ffn_down_exps.weight": (sizes.n_experts, HIDDEN, sizes.expert),
            }
            if architecture == "qwen2moe":
                part |= {
                    "ffn_gate_inp_shexp.weight": (HIDDEN,), "ffn_gate_shexp.weight": (sizes.shared_expert, HIDDEN),
                    "ffn_up_shexp.weight": (sizes.shared_expert, HIDDEN),
                    "ffn_down_shexp.weight": (HIDDEN, sizes.shared_expert),
                }  # fmt: skip
        else:
            part |= {
                "ffn_gate.weight": (INTERMEDIATE, HIDDEN), "ffn_up.weight": (INTERMEDIATE, HIDDEN),
                "ffn_down.weight": (HIDDEN, INTERMEDIATE),
            }  # fmt: skip
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in part.items()}
    return shapes


def write_gguf(
    folder: Path,
    architecture: str = "llama",
    kind: str = "Q8_0",
    sizes: Sizes = Sizes(),
    *,
    metadata: dict[str, float | int | str] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write `model.gguf` and tokenizer stubs into a folder and return the folder."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(folder / "model.gguf"), architecture)
    writer.add_block_count(sizes.n_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_GROUPS)
    writer.add_key_length(sizes.head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    if "llama.rope.dimension_count" not in (metadata or {}):
        writer.add_rope_dimension_count(sizes.head)
    writer.add_vocab_size(VOCABULARY)
    writer.add_bos_token_id(1)
    if sizes.n_experts:
        writer.add_expert_count(sizes.n_experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(sizes.expert)
    if sizes.shared_expert:
        writer.add_expert_shared_feed_forward_length(sizes.shared_expert)
    for key, value in (metadata or {}).items():
        add = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(key, value)
    for name, shape in tensor_shapes(architecture, sizes).items():
        full = len(shape) == 1 or "ffn_gate_inp" in name
        raw = "F32" if full else kind
        writer.add_tensor(name, matrix(shape, raw, rng), raw_dtype=gguf.GGMLQuantizationType[raw])
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, data in SIDE_FILES.items():
        (folder / name).write_bytes(data)
    return folder
