"""The default table: what is quantized, and what is kept and why."""

from __future__ import annotations

import pytest

from qformat.artifact.tensor_spec import TensorSpec
from qformat.converters.rules.rules import (
    Decision,
    KeepReason,
    couple,
    coupled_groups,
    default_decisions,
    model_types,
)
from tests.converters.rules.header_tensors import LLAMA, llama, matrix


def decide(
    name: str,
    model_type: str = "llama",
    dtype: str = "BF16",
    shape: tuple[int, ...] = (64, 128),
) -> Decision:
    return default_decisions([matrix(name, dtype, shape)], {"model_type": model_type})[name]


def test_a_llama_is_quantized_but_for_its_embeddings_and_norms() -> None:
    decisions = default_decisions(llama(), LLAMA)
    kept = {name: decision.reason for name, decision in decisions.items() if not decision.quantize}
    assert kept == {
        "model.embed_tokens.weight": KeepReason.EMBEDDING,
        "lm_head.weight": KeepReason.OUTPUT_EMBEDDING,
        "model.layers.0.input_layernorm.weight": KeepReason.NOT_A_MATRIX,
        "model.layers.1.input_layernorm.weight": KeepReason.NOT_A_MATRIX,
    }


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.layers.0.self_attn.q_proj.bias", KeepReason.NOT_A_WEIGHT),
        ("model.layers.0.mixer.A_log", KeepReason.NOT_A_WEIGHT),
        ("transformer.wte.weight", KeepReason.TIED_EMBEDDING),
        ("transformer.wpe.weight", KeepReason.EMBEDDING),
        ("score.weight", KeepReason.OUTPUT_EMBEDDING),
        ("classifier.dense.weight", KeepReason.OUTPUT_EMBEDDING),
        ("model.layers.61.shared_head.head.weight", KeepReason.OUTPUT_EMBEDDING),
        ("model.layers.0.mlp.gate.weight", KeepReason.ROUTER),
        ("model.layers.0.block_sparse_moe.gate.weight", KeepReason.ROUTER),
        ("model.layers.0.feed_forward.router.weight", KeepReason.ROUTER),
        ("model.layers.0.mlp.router.classifier.weight", KeepReason.ROUTER),
        ("model.layers.0.mlp.shared_expert_gate.weight", KeepReason.ROUTER),
        ("model.layers.0.self_attn.indexer.wq_b.weight", KeepReason.ROUTER),
        ("model.layers.0.mlp.experts.7.gate_proj.weight", KeepReason.EXPERT),
        ("model.layers.0.block_sparse_moe.experts.0.w1.weight", KeepReason.EXPERT),
        ("backbone.layers.0.mixer.out_proj.weight", KeepReason.MAMBA_KERNEL),
        ("model.layers.0.mamba.out_proj.weight", KeepReason.MAMBA_KERNEL),
        ("model.layers.0.mamba.dt_proj.weight", KeepReason.MAMBA_KERNEL),
        ("model.layers.0.linear_attn.in_proj_ba.weight", KeepReason.RECURRENT_GATE),
        ("vision_tower.encoder.layers.0.self_attn.q_proj.weight", KeepReason.VISION_OR_AUDIO),
        ("model.visual.blocks.0.mlp.gate_proj.weight", KeepReason.VISION_OR_AUDIO),
        ("audio_tower.layers.0.fc1.weight", KeepReason.VISION_OR_AUDIO),
        ("multi_modal_projector.linear_1.weight", KeepReason.PROJECTOR),
        ("model.connector.modality_projection.proj.weight", KeepReason.PROJECTOR),
        ("qformer.encoder.layer.0.attention.output.dense.weight", KeepReason.PROJECTOR),
        ("model.layers.2.shared_transf.self_attn.q_proj.weight", KeepReason.SHARED_BLOCK),
        ("model.layers.0.mystery.weight", KeepReason.NOT_KNOWN_TO_BE_LINEAR),
        ("transformer.h.0.attn.c_attn.weight", KeepReason.NOT_KNOWN_TO_BE_LINEAR),
    ],
)
def test_a_weight_that_may_not_be_a_linear_is_kept_with_a_reason(name: str, reason: KeepReason) -> None:
    assert decide(name).reason == reason


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.shared_expert.gate_proj.weight",
        "model.layers.0.mlp.shared_experts.down_proj.weight",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.0.self_attn.kv_b_proj.weight",
        "model.layers.0.linear_attn.in_proj_qkvz.weight",
        "model.layers.0.linear_attn.out_proj.weight",
        "model.decoder.layers.0.self_attn.out_proj.weight",
        "model.decoder.layers.0.fc1.weight",
        "gpt_neox.layers.0.attention.query_key_value.weight",
        "transformer.blocks.0.attn.Wqkv.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mamba.in_proj.weight",
    ],
)
def test_a_known_linear_is_quantized(name: str) -> None:
    assert decide(name).quantize


def test_gpt2_keeps_its_transposed_conv1d() -> None:
    for leaf in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        decision = decide(f"transformer.h.0.{leaf}.weight", "gpt2")
        assert decision == Decision(quantize=False, reason=KeepReason.TRANSPOSED_CONV1D, is_linear=True)


def test_the_same_names_are_linear_in_starcoder() -> None:
    assert decide("transformer.h.0.attn.c_attn.weight", "gpt_bigcode").quantize
    assert decide("model.layers.0.mlp.c_fc.weight", "starcoder2").quantize


def test_falcon_keeps_its_subclass_of_linear() -> None:
    decision = decide("transformer.h.0.self_attention.query_key_value.weight", "falcon")
    assert decision.reason == KeepReason.LINEAR_SUBCLASS


def test_a_weight_that_transformers_splits_while_loading_is_kept() -> None:
    assert decide("model.layers.0.mlp.gate_up_proj.weight", "phi3").quantize
    decision = decide("model.H_module.layers.0.mlp.gate_up_proj.weight", "hrm_text")
    assert decision.reason == KeepReason.REWRITTEN_ON_LOAD


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((), KeepReason.NOT_A_MATRIX),
        ((128,), KeepReason.NOT_A_MATRIX),
        ((64, 1, 4), KeepReason.NOT_A_MATRIX),
        ((0, 128), KeepReason.EMPTY),
        ((64, 0), KeepReason.EMPTY),
        ((1, 1), None),
        ((1, 128), None),
    ],
)
def test_only_a_matrix_with_elements_is_quantized(shape: tuple[int, ...], reason: KeepReason | None) -> None:
    assert decide("model.layers.0.self_attn.q_proj.weight", shape=shape).reason == reason


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_three_float_dtypes_are_quantized(dtype: str) -> None:
    assert decide("model.layers.0.self_attn.q_proj.weight", dtype=dtype).quantize


@pytest.mark.parametrize("dtype", ["F64", "F8_E4M3", "U8", "I32", "BOOL"])
def test_other_dtypes_are_kept(dtype: str) -> None:
    decision = decide("model.layers.0.self_attn.q_proj.weight", dtype=dtype)
    assert decision == Decision(quantize=False, reason=KeepReason.NOT_FLOAT, is_linear=True)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.block_sparse_moe.input_linear.weight",
        "model.layers.0.moe.gate_proj.weight",
    ],
)
def test_fused_experts_are_kept_as_experts(name: str) -> None:
    assert decide(name, shape=(4, 64, 128)).reason == KeepReason.EXPERT


def test_tied_and_untied_outputs_are_distinguished() -> None:
    for tied, embedding, output in (
        (True, KeepReason.TIED_EMBEDDING, KeepReason.TIED_EMBEDDING),
        (False, KeepReason.EMBEDDING, KeepReason.OUTPUT_EMBEDDING),
    ):
        config = {"model_type": "llama", "tie_word_embeddings": tied}
        decisions = default_decisions(llama(), config)
        assert decisions["model.embed_tokens.weight"].reason == embedding
        assert decisions["lm_head.weight"].reason == output


def test_the_text_config_says_whether_embeddings_are_tied() -> None:
    config = {"model_type": "gemma3", "text_config": {"tie_word_embeddings": False}}
    assert default_decisions(llama(), config)["lm_head.weight"].reason == KeepReason.OUTPUT_EMBEDDING


def test_an_output_that_is_absent_on_disk_counts_as_tied() -> None:
    tensors = [tensor for tensor in llama() if tensor.name != "lm_head.weight"]
    decisions = default_decisions(tensors, {"model_type": "llama"})
    assert decisions["model.embed_tokens.weight"].reason == KeepReason.TIED_EMBEDDING


def test_nested_configs_count_for_the_model_type() -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "starcoder2"}, "vision_config": None}
    assert model_types(config) == {"llava", "starcoder2"}
    name = "language_model.model.layers.0.mlp.c_fc.weight"
    assert default_decisions([matrix(name)], config)[name].quantize


def test_a_config_without_a_model_type_is_decided_by_names_alone() -> None:
    assert default_decisions(llama(), {})["model.layers.0.mlp.up_proj.weight"].quantize


@pytest.mark.parametrize(
    ("kept", "partners"),
    [
        ("self_attn.k_proj", ("self_attn.q_proj", "self_attn.v_proj")),
        ("mlp.up_proj", ("mlp.gate_proj",)),
    ],
)
def test_one_kept_weight_keeps_those_fused_with_it(kept: str, partners: tuple[str, ...]) -> None:
    tensors = [
        TensorSpec(tensor.name, "I8", tensor.shape) if tensor.name == f"model.layers.0.{kept}.weight" else tensor
        for tensor in llama()
    ]
    decisions = default_decisions(tensors, LLAMA)
    coupled = {name for name, decision in decisions.items() if decision.reason == KeepReason.COUPLED}
    assert coupled == {f"model.layers.0.{partner}.weight" for partner in partners}
    assert all(decisions[name].is_linear for name in coupled)


@pytest.mark.parametrize(
    ("leaves", "fused"),
    [
        (("q_proj", "k_proj", "v_proj"), "qkv_proj"),
        (("query", "key", "value"), "qkv_proj"),
        (("gate_proj", "up_proj"), "gate_up_proj"),
        (("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
        (("in_proj_qkv", "in_proj_z"), "in_proj_qkvz"),
        (("w1", "w3"), "w1"),
    ],
)
def test_weights_that_vllm_fuses_form_one_group(leaves: tuple[str, ...], fused: str) -> None:
    (group,) = coupled_groups([f"a.0.{leaf}.weight" for leaf in reversed(leaves)] + ["a.1.q_proj.weight"])
    assert group.tensors == tuple(f"a.0.{leaf}.weight" for leaf in leaves)
    assert group.fused_module == f"a.0.{fused}"


def test_weights_of_different_layers_are_not_coupled() -> None:
    assert coupled_groups(["a.0.q_proj.weight", "a.1.k_proj.weight", "a.1.k_proj.bias", "a.2.up_proj"]) == []


def test_coupling_twice_changes_nothing_more() -> None:
    decisions = default_decisions([*llama(1), matrix("x.q_proj.weight", "I8"), matrix("x.k_proj.weight")], LLAMA)
    assert couple(decisions) == decisions


def test_every_reason_has_a_phrase() -> None:
    phrases = [reason.phrase for reason in KeepReason]
    assert len(set(phrases)) == len(phrases)
