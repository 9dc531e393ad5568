"""The table of linear_names, proved against every model type that the installed transformers can build.

Each type is built on the meta device with two layers; its tensors get the names they have on disk from
transformers' own reverse mapping, and its Linear modules are replaced by transformers' own function.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping

import bitsandbytes
import pytest
import transformers
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from qformat.converters.rules.recipe import NF4Options, Recipe, Rule, apply
from qformat.converters.rules.rules import Decision, KeepReason, default_decisions
from qformat.converters.rules.skip_list import Verdict, skip_matcher, skip_modules
from tests.converters.rules.built_types import NOT_COMPARABLE, Built, build

# Types that this table deliberately leaves wholly in 16 bit, and why. `qformat convert` says so.
NOTHING_QUANTIZED = {
    "falcon": "FalconLinear is a subclass, which transformers' integration does not replace",
    "gpt2": "Conv1D, stored transposed",
    "gpt-sw3": "Conv1D, stored transposed",
    "openai-gpt": "Conv1D, stored transposed",
    "cpmant": "no names of its own in the table",
    "ctrl": "no names of its own in the table",
    "rwkv": "no names of its own in the table: rescales its weights in place",
    "xlm": "no names of its own in the table",
    "xlnet": "no names of its own in the table",
    "xlstm": "no names of its own in the table",
    "deepseek_v4": "no names of its own in the table",
    "inkling2_text": "no names of its own in the table",
    "inkling2": "no names of its own in the table",
    "inkling_mm_model": "no names of its own in the table",
    "molmo2": "fused on disk, cut while loading",
    "pix2struct": "no names of its own in the table",
    "udop": "no names of its own in the table",
}

# All Linear weights of these are quantized, but for the reasons that hold for every type.
_MAINSTREAM_NAMES = """
    apertus arcee bloom codegen cohere cohere2 cohere2_moe deepseek_v2 deepseek_v3 ernie4_5 ernie4_5_moe
    exaone4 flex_olmo gemma gemma2 gemma3 gemma3_text gemma4_text glm glm4 glm4_moe gpt_bigcode gpt_neo
    gpt_neox gpt_oss gptj granite granitemoe granitemoeshared helium hunyuan_v1_dense idefics3 internlm3
    internvl lfm2 llama llama4_text llava minicpm3 ministral3 mistral mistral3 mixtral mllama mpt
    nanochat nemotron olmo olmo2 olmo3 olmoe opt paligemma persimmon phi phi3 phimoe qwen2 qwen2_5_vl
    qwen2_moe qwen2_vl qwen3 qwen3_5_text qwen3_moe qwen3_next qwen3_vl seed_oss smollm3 smolvlm
    solar_open stablelm starcoder2 xglm
"""
MAINSTREAM = frozenset(_MAINSTREAM_NAMES.split())

REASONS_FOR_EVERY_TYPE = frozenset(
    {
        KeepReason.OUTPUT_EMBEDDING,
        KeepReason.TIED_EMBEDDING,
        KeepReason.ROUTER,
        KeepReason.RECURRENT_GATE,
        KeepReason.VISION_OR_AUDIO,
        KeepReason.PROJECTOR,
    }
)


@pytest.fixture(scope="module")
def causal() -> list[Built]:
    built = (build(name, transformers.AutoModelForCausalLM) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return [one for one in built if one is not None and one.name not in NOT_COMPARABLE]


@pytest.fixture(scope="module")
def multimodal() -> list[Built]:
    built = (
        build(name, transformers.AutoModelForImageTextToText) for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    )
    return [one for one in built if one is not None and one.name not in NOT_COMPARABLE]


@pytest.fixture(scope="module")
def types(causal: list[Built], multimodal: list[Built]) -> list[Built]:
    return causal + multimodal


def layers_as_n(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".N", name)


def everything_kept(one: Built) -> dict[str, Decision]:
    return {
        name: Decision(quantize=False, reason=KeepReason.SKIPPED_BY_RECIPE, is_linear=True)
        if decision.quantize
        else decision
        for name, decision in default_decisions(one.tensors, one.config).items()
    }


def disagreements(one: Built, verdicts: Mapping[str, Verdict]) -> Iterator[str]:
    """Compare what is quantized and skipped with what transformers would replace; yield what differs."""
    skip = skip_modules(verdicts, one.config)
    not_converted = HfQuantizer.get_modules_to_not_convert(one.model, skip, one.model._keep_in_fp32_modules)
    quantized = {one.module_of(name) for name, verdict in verdicts.items() if verdict.quantize}
    replaced = {m for m in one.linear_modules() if should_convert_module(m, not_converted)}
    for module in sorted(quantized - replaced):
        yield f"{one.name}: quantized, but not replaced on load: {layers_as_n(module)}"
    for module in sorted(replaced - quantized):
        yield f"{one.name}: kept, but not on the skip list: {layers_as_n(module)}"


def test_more_than_150_causal_types_are_built(causal: list[Built]) -> None:
    assert len(causal) > 150
    assert len({one.name for one in causal} - NOTHING_QUANTIZED.keys()) > 150


def test_more_than_70_image_and_text_types_are_built(multimodal: list[Built]) -> None:
    assert len(multimodal) > 70


def test_transformers_replaces_exactly_what_is_quantized(types: list[Built]) -> None:
    found = [text for one in types for text in disagreements(one, default_decisions(one.tensors, one.config))]
    assert "\n".join(sorted(set(found))) == ""


def test_a_recipe_may_keep_every_weight_of_every_type(types: list[Built]) -> None:
    found = [text for one in types for text in disagreements(one, everything_kept(one))]
    assert "\n".join(sorted(set(found))) == ""


def test_a_recipe_may_keep_one_layer_of_every_type(types: list[Built]) -> None:
    found: list[str] = []
    n_recipes = 0
    for one in types:
        rule = Rule("*.1.*", "keep")
        if any(rule.matches(tensor.name) for tensor in one.tensors):
            n_recipes += 1
            choices = apply(Recipe(NF4Options(), (rule,)), one.tensors, one.config)
            found += disagreements(one, choices)
    assert n_recipes > 200
    assert "\n".join(sorted(set(found))) == ""


def test_nothing_that_is_converted_while_loading_is_quantized(types: list[Built]) -> None:
    found = {
        f"{one.name}: {layers_as_n(name)}"
        for one in types
        for name, decision in default_decisions(one.tensors, one.config).items()
        if decision.quantize and name in one.converted
    }
    assert found == set()


def test_nothing_that_is_tied_is_quantized(types: list[Built]) -> None:
    found = set()
    for one in types:
        pairs = one.model.all_tied_weights_keys.items()
        tied = {key for pair in pairs for key in pair}
        for name, decision in default_decisions(one.tensors, one.config).items():
            if decision.quantize and one.memory_name[name] in tied:
                found.add(f"{one.name}: {layers_as_n(name)}")
    assert found == set()


def test_every_other_linear_is_quantized_in_the_mainstream_types(types: list[Built]) -> None:
    assert MAINSTREAM - {one.name for one in types} == set()
    kept = set()
    for one in types:
        if one.name not in MAINSTREAM:
            continue
        linear = one.linear_modules()
        decisions = default_decisions(one.tensors, one.config)
        assert any(decision.quantize for decision in decisions.values()), one.name
        for name, decision in decisions.items():
            if one.module_of(name) in linear and decision.reason not in REASONS_FOR_EVERY_TYPE | {None}:
                kept.add(f"{one.name}: {decision.reason}: {layers_as_n(name)}")
    assert kept == set()


def test_most_linear_weights_of_most_types_are_quantized(types: list[Built]) -> None:
    """Experts and the reasons that hold for every type are left out of the count."""
    fractions = []
    for one in types:
        linear = one.linear_modules()
        counted = [
            decision.quantize
            for name, decision in default_decisions(one.tensors, one.config).items()
            if one.module_of(name) in linear and decision.reason not in REASONS_FOR_EVERY_TYPE
        ]
        if counted:
            fractions.append(sum(counted) / len(counted))
    n_whole = sum(fraction == 1 for fraction in fractions)
    mean = sum(fractions) / len(fractions)
    print(f"{len(fractions)} types: {n_whole} wholly quantized, {mean:.3f} of the Linear weights on average")
    assert n_whole > 190
    assert mean > 0.87


def test_the_types_without_any_quantized_weight_are_listed(types: list[Built]) -> None:
    names = {one.name for one in types}
    quantized = {
        one.name
        for one in types
        if any(decision.quantize for decision in default_decisions(one.tensors, one.config).values())
    }
    assert names - quantized == NOTHING_QUANTIZED.keys() & names


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3", "gpt_neox", "nemotron_h", "gpt2"])
def test_the_integration_itself_makes_4_bit_modules_of_exactly_the_quantized_weights(
    name: str, types: list[Built]
) -> None:
    one = next(one for one in types if one.name == name)
    decisions = default_decisions(one.tensors, one.config)
    model = replace_with_bnb_linear(
        copy.deepcopy(one.model),
        modules_to_not_convert=skip_modules(decisions, one.config),
        quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        pre_quantized=True,
    )
    four_bit = {path for path, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert four_bit == {one.module_of(key) for key, decision in decisions.items() if decision.quantize}


@pytest.mark.parametrize(
    "entry",
    [
        "lm_head",
        "model.layers.1",
        "model.layers.1.mlp.gate",
        "mlp.gate",
        "layers.*",
        "fc1",
        "model.",
        "a|b.c",
    ],
)
def test_the_matcher_is_that_of_transformers(entry: str) -> None:
    modules = [
        *("lm_head", "lm_head.dense", "my_lm_head", "model.layers.1", "model.layers.1.mlp.gate_proj"),
        *(
            "model.layers.1.mlp.gate",
            "model.layers.11.mlp",
            "layers.1.fc1",
            "layers",
            "xfc1",
            "fc1x",
            "b.c",
            "a",
        ),
    ]
    matches = skip_matcher(entry)
    assert {m for m in modules if matches(m)} == {m for m in modules if not should_convert_module(m, [entry])}
