"""Comparison with bitsandbytes and transformers: same codes, same model, same components after saving."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import qformat

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]


def build_qwen2() -> PreTrainedModel:
    """Biases, an untied head, and sizes that leave partial blocks."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=307, hidden_size=88, intermediate_size=168, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=64,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).to(torch.float16)


def build_gpt_neox() -> PreTrainedModel:
    """Fused query_key_value, LayerNorms with biases, float32."""
    torch.manual_seed(1)
    config = GPTNeoXConfig(
        vocab_size=211, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


@pytest.fixture(scope="module", params=["SmolLM2", "Qwen2", "GPT-NeoX"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    builders: dict[str, Callable[[], PreTrainedModel]] = {"Qwen2": build_qwen2, "GPT-NeoX": build_gpt_neox}
    if request.param == "SmolLM2":
        path: Path = request.getfixturevalue("smollm2")
        return path
    folder = tmp_path_factory.mktemp(request.param) / "source"
    builders[request.param]().save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture(scope="module")
def artifact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / source.parent.name
    qformat.convert(source, out)
    return out


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def absmax_of(weight: torch.Tensor) -> torch.Tensor:
    """Return the absmax of each block of 64, float64."""
    flat = weight.double().abs().flatten()
    return nn.functional.pad(flat, (0, -flat.numel() % 64)).view(-1, 64).amax(1)


def packed_names(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name.removesuffix(".absmax") for name in tensors if name.endswith("weight.absmax")]


def own_quantization(source: Path, dtype: torch.dtype) -> PreTrainedModel:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=dtype)


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """Compute logits with gradients enabled: bitsandbytes' inference path on AVX512-BF16 CPUs rewrites the scales."""
    tokens = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.detach().float()


def test_packed_codes_equal_those_of_bitsandbytes_byte_for_byte(source: Path, artifact: Path) -> None:
    weights, stored = tensors_of(source), tensors_of(artifact)
    names = packed_names(stored)
    assert len(names) >= 12
    for name in names:
        packed, state = bnb.quantize_4bit(weights[name], blocksize=64, compress_statistics=True, quant_type="nf4")
        assert torch.equal(stored[name], packed), name
        assert torch.equal(stored[f"{name}.quant_map"], state.code)
        assert torch.equal(stored[f"{name}.nested_quant_map"], state.state2.code)
        # Its second level is searched approximately on CPUs with AVX-512: now and then a value of the map that lies
        # near, but farther from the scale than ours. Three roundings lie between a scale and what is searched for.
        codes, theirs, table = stored[f"{name}.absmax"], state.absmax, state.state2.code.double()
        assert (table[codes.int()] - table[theirs.int()]).abs().max() <= table.diff().max(), name
        searched = (absmax_of(weights[name]) - state.offset.double()) / state.state2.absmax.double().repeat_interleave(
            state.state2.blocksize
        )[: codes.numel()]
        ours_off, theirs_off = ((table[chosen.int()] - searched).abs() for chosen in (codes, theirs))
        assert bool((ours_off <= theirs_off + 3 * 2.0**-24).all()), name


def test_kept_tensors_are_the_source_bit_for_bit(source: Path, artifact: Path) -> None:
    weights, stored = tensors_of(source), tensors_of(artifact)
    packed = set(packed_names(stored))
    for name, weight in weights.items():
        if name not in packed:
            assert torch.equal(stored[name].view(torch.uint8), weight.view(torch.uint8)), name


def test_the_loaded_model_computes_what_bitsandbytes_own_quantization_computes(source: Path, artifact: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(artifact)
    own = own_quantization(source, loaded.dtype)
    ours, theirs = logits_of(loaded), logits_of(own)
    full = logits_of(AutoModelForCausalLM.from_pretrained(source, dtype=loaded.dtype))
    # Quantization itself is the yardstick: a neighbouring scale here and there moves the logits less than it does.
    assert (ours - theirs).square().mean() < (full - theirs).square().mean()
    # Nothing else differs: with their scales the logits are theirs, bit for bit.
    take_scales(own, loaded)
    assert torch.equal(logits_of(loaded), theirs)


def take_scales(one: PreTrainedModel, other: PreTrainedModel) -> None:
    """Give the packed layers of `other` the scales of `one`."""
    given = dict(one.named_modules())
    for name, module in other.named_modules():
        if isinstance(module, Linear4bit):
            module.weight.quant_state = given[name].weight.quant_state


def test_saving_the_loaded_model_gives_the_same_components_back(artifact: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(artifact)
    model.save_pretrained(tmp_path, save_original_format=False)
    stored, saved = tensors_of(artifact), tensors_of(tmp_path)
    assert len(saved) == len(stored)
    packed = [name for name in stored if any(name.startswith(weight) for weight in packed_names(stored))]
    for name in packed:
        tensor = stored[name]
        if "quant_state" in name:
            assert parse_state(saved[name]) == parse_state(tensor), name
        else:
            assert torch.equal(saved[name], tensor), name


def parse_state(tensor: torch.Tensor) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(bytes(tensor.tolist()))
    if "nested_offset" in state:
        state["nested_offset"] = torch.tensor(state["nested_offset"], dtype=torch.float32).item()
    return state


def test_the_quantization_config_is_the_one_that_transformers_writes(source: Path, artifact: Path) -> None:
    ours = json.loads((artifact / "config.json").read_text())
    theirs = json.loads(own_quantization(source, torch.bfloat16).config.to_json_string(use_diff=False))
    expected = copy.deepcopy(theirs["quantization_config"])
    found = ours["quantization_config"]
    assert found.keys() == expected.keys()
    for key in found.keys() - {"llm_int8_skip_modules", "bnb_4bit_compute_dtype"}:
        assert found[key] == expected[key], key
    assert "lm_head" in found["llm_int8_skip_modules"]
