"""The list of modules that stay in 16 bit: every name that a reader may use, and none of a quantized module."""

from __future__ import annotations

import pytest

from qformat.artifact.tensor_spec import TensorSpec
from qformat.converters.rules.rules import Decision, KeepReason, default_decisions
from qformat.converters.rules.skip_list import skip_modules
from qformat.errors import Reason, SourceError
from tests.converters.rules.header_tensors import LLAMA, llama, matrix


def test_the_skip_list_of_a_llama_is_its_head() -> None:
    assert skip_modules(default_decisions(llama(), LLAMA), LLAMA) == ["lm_head"]


def test_a_tied_head_is_listed_although_it_is_absent_on_disk() -> None:
    tensors = [tensor for tensor in llama() if tensor.name != "lm_head.weight"]
    config = {"model_type": "llama", "tie_word_embeddings": True}
    assert skip_modules(default_decisions(tensors, config), config) == ["lm_head"]


def test_a_head_of_another_name_is_listed_beside_lm_head() -> None:
    config = {"model_type": "gpt_neox"}
    decisions = default_decisions([matrix("embed_out.weight")], config)
    assert skip_modules(decisions, config) == ["embed_out", "lm_head"]


def test_kept_fused_weights_are_listed_under_their_own_and_their_fused_names() -> None:
    decisions = default_decisions(
        [TensorSpec(t.name, "I8" if ".1.self_attn.q_proj" in t.name else t.dtype, t.shape) for t in llama()],
        LLAMA,
    )
    assert skip_modules(decisions, LLAMA) == [
        "lm_head",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.qkv_proj",
        "model.layers.1.self_attn.v_proj",
    ]


def test_routers_and_experts_are_listed_under_both_names_of_a_mixtral() -> None:
    config = {"model_type": "mixtral", "tie_word_embeddings": False}
    layer = "model.layers.0.block_sparse_moe"
    names = [f"{layer}.gate.weight", *(f"{layer}.experts.{n}.w{w}.weight" for n in (0, 1) for w in (1, 2, 3))]
    assert skip_modules(default_decisions([matrix(name) for name in names], config), config) == [
        "lm_head",
        "model.layers.0.block_sparse_moe.experts",
        "model.layers.0.block_sparse_moe.gate",
        "model.layers.0.mlp.experts",
        "model.layers.0.mlp.gate",
    ]


def test_a_shared_block_is_listed_by_the_suffix_that_all_its_copies_have() -> None:
    config = {"model_type": "zamba"}
    decisions = default_decisions([matrix("model.layers.2.shared_transf.self_attn.o_proj.weight")], config)
    assert "shared_transf.self_attn.o_proj" in skip_modules(decisions, config)


def test_embeddings_norms_and_biases_are_not_listed() -> None:
    tensors = [
        *(matrix("model.embed_tokens.weight"), matrix("transformer.wpe.weight")),
        *(matrix("model.norm.weight", shape=(128,)), matrix("a.q_proj.bias", shape=(64,))),
        matrix("a.conv1d.weight", shape=(64, 1, 4)),
    ]
    assert skip_modules(default_decisions(tensors, LLAMA), LLAMA) == ["lm_head"]


def test_the_skip_list_does_not_depend_on_the_order_of_tensors() -> None:
    tensors = [*llama(), matrix("model.layers.0.mystery.weight"), matrix("model.vision_tower.x.weight")]
    forward = skip_modules(default_decisions(tensors, LLAMA), LLAMA)
    backward = skip_modules(default_decisions(tensors[::-1], LLAMA), LLAMA)
    assert forward == backward == sorted(forward)


@pytest.mark.parametrize(
    ("kept", "quantized"),
    [
        ("layers.0.mystery", "layers.0.mystery.q_proj"),  # prefix up to a module boundary
        ("q_proj_x", "a.xq_proj_x"),  # suffix
        ("a.b.c", "a.bxc"),  # a dot is any character
    ],
)
def test_an_entry_that_also_matches_a_quantized_module_is_rejected(kept: str, quantized: str) -> None:
    decisions = {
        f"{kept}.weight": Decision(quantize=False, reason=KeepReason.NOT_KNOWN_TO_BE_LINEAR, is_linear=True),
        f"{quantized}.weight": Decision(quantize=True, reason=None, is_linear=True),
    }
    with pytest.raises(SourceError, match=rf"skip=\('{quantized}',\)") as error:
        skip_modules(decisions, LLAMA)
    assert error.value.reason == Reason.SKIP_MODULES


def test_a_name_that_is_not_a_regular_expression_is_rejected() -> None:
    decisions = default_decisions([matrix("a(b.mystery.weight")], LLAMA)
    with pytest.raises(SourceError, match="not a regular expression"):
        skip_modules(decisions, LLAMA)
