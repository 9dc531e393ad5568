"""Tensors that a model and its files do not share: what is read over, what is computed and what is rejected."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from qformat.cli.default_conversion import as_converted
from qformat.converters.convert import convert
from qformat.errors import ArtifactError, Reason
from qformat.model.load import load_model
from qformat.model.transformers_quantizer import METHOD, register
from qformat.training.memory_plan.plan import MemoryPlanner
from qformat.training.memory_plan.tensors import read_model_tensors
from qformat.training.settings import TrainingSettings
from tests.model.architectures.tiny_types import tiny_model
from tests.small_models import Tensor, contents, llama_config, llama_tensors, weight, write_checkpoint

SIZES = {"hidden": 64, "intermediate": 96, "vocabulary": 32}


def artifact(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    source = write_checkpoint(folder / "source", tensors, config={**llama_config(**SIZES), **config})
    convert(source, folder / "artifact")
    return folder / "artifact"


def qwen_with_more_layers(folder: Path) -> Path:
    """Write Qwen 3.5 with layers for predicting several tokens, as on the Hub. transformers has no place for them."""
    model = tiny_model("qwen3_5_text")
    assert model is not None
    model.save_pretrained(folder / "source")
    file = folder / "source" / "model.safetensors"
    extra = {f"mtp.layers.0.mlp.{name}_proj.weight": torch.ones(96, 64).bfloat16() for name in ("gate", "up")}
    save_file(load_file(file) | extra, file, {"format": "pt"})
    convert(folder / "source", folder / "artifact")
    return folder / "artifact"


def test_a_head_of_its_own_is_kept_in_an_artifact_whose_config_says_tied(tmp_path: Path) -> None:
    path = artifact(tmp_path, llama_tensors(**SIZES), tie_word_embeddings=True)
    ours = load_model(path, device="cpu")
    peer = transformers.AutoModelForCausalLM.from_pretrained(path)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(ours.state_dict()[name], peer.state_dict()[name])
    assert not torch.equal(ours.state_dict()["lm_head.weight"], ours.state_dict()["model.embed_tokens.weight"])


@pytest.mark.parametrize("extra", ["v_head.summary.weight", "model.layers.0.self_attn.rotary_emb.cos_cached", "pooler"])
def test_a_kept_tensor_without_a_place_is_read_over_with_a_warning(
    extra: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = artifact(tmp_path, llama_tensors(**SIZES) | {extra: weight((64,))})
    with caplog.at_level(logging.WARNING, "qformat"):
        model = load_model(path, device="cpu")
    assert extra not in model.state_dict()
    assert [record.getMessage() for record in caplog.records if extra in record.getMessage()]


def test_old_rotary_frequencies_are_read_over_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    path = artifact(tmp_path, llama_tensors(**SIZES) | {name: weight((16,))})
    with caplog.at_level(logging.WARNING, "qformat"):
        load_model(path, device="cpu")
    assert not caplog.records


def test_packed_weights_that_transformers_ignores_are_read_over_and_saved_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more_layers = qwen_with_more_layers(tmp_path)
    with caplog.at_level(logging.WARNING, "qformat"):
        loaded = load_model(more_layers, device="cpu")
    assert not caplog.records
    loaded.save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(more_layers)


def test_a_memory_plan_reads_over_packed_weights_that_transformers_ignores(tmp_path: Path) -> None:
    tensors = read_model_tensors(str(qwen_with_more_layers(tmp_path)), conversion=as_converted)
    settings = TrainingSettings(seq_len=32, device="cpu")
    assert MemoryPlanner(tensors, settings, trust_remote_code=False).plan(device_nbytes=None).peak > 0


def test_from_pretrained_reads_over_packed_weights_that_transformers_ignores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, METHOD, AUTO_QUANTIZER_MAPPING[METHOD])
    register()
    model = transformers.AutoModelForCausalLM.from_pretrained(qwen_with_more_layers(tmp_path))
    assert not [name for name in model.state_dict() if "mtp" in name]


def test_a_tensor_that_transformers_does_not_expect_is_initialized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keys_to_ignore_on_load_missing", [r"model\.norm\.weight"])
    tensors = llama_tensors(**SIZES)
    del tensors["model.norm.weight"]
    path = artifact(tmp_path, tensors)
    assert torch.equal(load_model(path, device="cpu").state_dict()["model.norm.weight"], torch.ones(64).bfloat16())


def test_a_packed_weight_without_a_layer_is_rejected(tmp_path: Path) -> None:
    path = artifact(tmp_path, llama_tensors(**SIZES, n_layers=3))
    with pytest.raises(ArtifactError, match="has no such layer") as caught:
        load_model(path, device="cpu")
    assert caught.value.reason is Reason.CONFIG_FIELD


@pytest.mark.parametrize("dtype", ["F16", "F32", "BF16"])
def test_the_tensors_decide_the_dtype_if_the_config_does_not(dtype: str, tmp_path: Path) -> None:
    config = {name: value for name, value in llama_config(**SIZES).items() if name != "torch_dtype"}
    source = write_checkpoint(tmp_path / "source", llama_tensors(**SIZES, dtype=dtype), config=config)
    convert(source, tmp_path / "artifact")
    expected = {"F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16}[dtype]
    model = load_model(tmp_path / "artifact", device="cpu")
    assert model.dtype == expected
    assert model.state_dict()["model.norm.weight"].dtype == expected
