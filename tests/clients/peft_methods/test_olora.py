"""OLoRA subtracts its start from the packed weights, which are then encoded as a conversion encodes them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qformat
from qformat.converters.convert import ConversionOptions, convert
from qformat.errors import UsageError
from qformat.model.nf4_linear import NF4Linear
from qformat.model.packed_parameter import Params4bit
from tests.clients.peft_methods.sides import IDS, packed
from tests.small_models import llama_config, llama_tensors, tensor_of, write_checkpoint

SIZES = {"hidden": 64, "intermediate": 96, "vocabulary": 50}
NAME = "model.layers.1.mlp.down_proj"
RANK = 4


def with_olora(model: Any) -> Any:
    config = peft.LoraConfig(r=RANK, target_modules=["down_proj"], init_lora_weights="olora", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def start(weight: Tensor, scaling: float) -> Tensor:
    """Return what OLoRA leaves of a weight (https://arxiv.org/abs/2406.01775, algorithm 1), as PEFT computes it."""
    q, r = torch.linalg.qr(weight)
    return weight - scaling * q[:, :RANK] @ r[:RANK]


@pytest.mark.parametrize("options", [ConversionOptions(), ConversionOptions(double_quant=False, block_size=128)])
def test_the_changed_weight_has_the_components_of_a_conversion(options: ConversionOptions, tmp_path: Path) -> None:
    tensors = llama_tensors(**SIZES)
    source = write_checkpoint(tmp_path / "source", tensors, config=llama_config(**SIZES))
    convert(source, tmp_path / "nf4", options)
    model = packed(tmp_path / "nf4")
    before = model.get_submodule(NAME).dequantize().float()
    layer = with_olora(model).base_model.model.get_submodule(NAME)
    remaining = start(before, layer.scaling["default"])

    tensors[f"{NAME}.weight"] = tensor_of(remaining.numpy(), "F32")
    changed = write_checkpoint(tmp_path / "changed", tensors, config=llama_config(**SIZES))
    convert(changed, tmp_path / "expected", options)
    expected = packed(tmp_path / "expected").get_submodule(NAME)
    found = layer.get_base_layer()
    assert found.nested_offset == expected.nested_offset
    own, others = found.state_dict(), expected.state_dict()
    records = [name for name in own if "quant_state" in name]
    assert own.keys() == others.keys()
    assert len(records) == 1
    assert all(torch.equal(own[name], others[name]) for name in own if name not in records)
    text, other_text = (bytes(state[records[0]].numpy()).rstrip() for state in (own, others))
    assert text == other_text.replace(b'"float32", "shape"', b'"bfloat16", "shape"'), "the dtype of the source stays"


def test_the_file_stays_as_it_is_and_a_saved_artifact_has_the_changed_weights(tiny_llama: Path, tmp_path: Path) -> None:
    files = {file.name: file.read_bytes() for file in tiny_llama.iterdir()}
    wrapped = with_olora(packed(tiny_llama))
    changed = wrapped.unload()
    changed.save_pretrained(tmp_path / "saved")
    assert {file.name: file.read_bytes() for file in tiny_llama.iterdir()} == files
    assert not torch.equal(changed(IDS).logits, packed(tiny_llama)(IDS).logits)

    assert qformat.verify(tmp_path / "saved").findings == ()
    assert torch.equal(packed(tmp_path / "saved")(IDS).logits, changed(IDS).logits)


def test_a_checkpoint_of_bitsandbytes_is_saved_in_its_own_layout(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    source = write_checkpoint(tmp_path / "source", llama_tensors(**SIZES), config=llama_config(**SIZES))
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=how, device_map="cpu").save_pretrained(
        tmp_path / "theirs"
    )
    changed = with_olora(packed(tmp_path / "theirs")).unload()
    changed.save_pretrained(tmp_path / "saved")
    assert torch.equal(packed(tmp_path / "saved")(IDS).logits, changed(IDS).logits)


def test_values_that_cannot_be_encoded_leave_the_layer_as_it_is(tiny_llama: Path) -> None:
    layer = packed(tiny_llama).get_submodule(NAME)
    before = layer.dequantize()
    with pytest.raises(UsageError, match="NaN or Inf"):
        layer.weight = Params4bit(torch.full((64, 96), torch.nan))
    with pytest.raises(UsageError, match="shape"):
        layer.weight = Params4bit(torch.zeros(96, 64))
    assert torch.equal(layer.dequantize(), before)


def test_peft_counts_the_weights_and_not_their_bytes(tiny_llama: Path, decoded_llama: Path) -> None:
    theirs = with_olora(AutoModelForCausalLM.from_pretrained(decoded_llama))
    assert with_olora(packed(tiny_llama)).get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("change", ["load", "assign", "half", "pickle", "deepcopy"])
def test_the_weight_keeps_its_class(change: str, tiny_llama: Path) -> None:
    layer = packed(tiny_llama).get_submodule(NAME)
    assert type(layer.weight) is Params4bit
    other: NF4Linear = copy.deepcopy(layer)
    if change in {"load", "assign"}:
        other.load_state_dict(layer.state_dict(), assign=change == "assign")
    elif change == "half":
        other = other.half()
    elif change == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    assert type(other.weight) is Params4bit
    assert torch.equal(other.weight, layer.weight)
