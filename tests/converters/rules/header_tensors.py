"""Tensors as headers describe them, for tests of the rules: those of a Llama, and single matrices."""

from __future__ import annotations

from qformat.artifact.tensor_spec import TensorSpec

LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def matrix(name: str, dtype: str = "BF16", shape: tuple[int, ...] = (64, 128)) -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def llama(n_layers: int = 2) -> list[TensorSpec]:
    tensors = [matrix("model.embed_tokens.weight"), matrix("lm_head.weight")]
    for layer in range(n_layers):
        tensors += [matrix(f"model.layers.{layer}.self_attn.{leaf}.weight") for leaf in ATTENTION]
        tensors += [matrix(f"model.layers.{layer}.mlp.{leaf}.weight") for leaf in MLP]
        tensors.append(TensorSpec(f"model.layers.{layer}.input_layernorm.weight", "BF16", (128,)))
    return tensors
