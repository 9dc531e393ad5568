"""A config.json without `architectures` gets the language model of its `model_type`, or is rejected."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import transformers

from qformat.artifact.reading.verify import verify_integrity
from qformat.converters.convert import convert, plan
from qformat.converters.rules.architectures import with_architectures
from qformat.errors import Reason, SourceError
from tests.small_models import llama_config, write_checkpoint


def write(folder: Path, **changes: object) -> Path:
    """Write a checkpoint; a value None leaves a field out."""
    config = {**llama_config(), "architectures": None, **changes}
    return write_checkpoint(folder, config={name: value for name, value in config.items() if value is not None})


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral", "smollm3", "gemma2"])
@pytest.mark.parametrize("given", [None, []])
def test_the_artifact_names_the_class_that_transformers_would_load(
    model_type: str, given: object, tmp_path: Path
) -> None:
    source = write(tmp_path / "source", model_type=model_type, architectures=given)
    summary = convert(source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    mapping = transformers.AutoModelForCausalLM._model_mapping
    expected = mapping[type(transformers.AutoConfig.for_model(model_type))].__name__
    assert written["architectures"] == [expected]
    assert any(expected in note and model_type in note for note in summary.plan.notes)
    assert verify_integrity(tmp_path / "out").passed


@pytest.mark.parametrize("model_type", ["a_model_of_mine", "clip", None, 5])
def test_a_model_type_without_a_language_model_is_rejected_with_what_to_add(model_type: object, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        plan(write(tmp_path / "source", model_type=model_type))
    assert caught.value.reason is Reason.CONFIG_FIELD
    assert caught.value.field == "architectures"
    assert repr(model_type) in str(caught.value)
    assert '"architectures": ["LlamaForCausalLM"]' in str(caught.value.next_step)


CLASSES: dict[str, tuple[str, list[str], str]] = {
    "a base model of BERT": ("bert", ["encoder.layer.0.attention.self.query.weight"], "BertModel"),
    "BERT with a head": ("bert", ["bert.encoder.layer.0.attention.self.query.weight"], "BertForMaskedLM"),
    "a masked model without a causal one": (
        "distilbert",
        ["distilbert.transformer.layer.0.x"],
        "DistilBertForMaskedLM",
    ),
    "a base model of Llama": ("llama", ["layers.0.self_attn.q_proj.weight", "norm.weight"], "LlamaModel"),
    "GPT-NeoX": ("gpt_neox", ["gpt_neox.layers.0.attention.dense.weight", "embed_out.weight"], "GPTNeoXForCausalLM"),
}


@pytest.mark.parametrize("case", CLASSES)
def test_the_names_of_the_tensors_tell_a_base_model_from_one_with_a_head(case: str) -> None:
    model_type, names, expected = CLASSES[case]
    described, note = with_architectures({"model_type": model_type}, names, Path("source"))
    assert described["architectures"] == [expected]
    assert hasattr(transformers, expected)
    assert expected in str(note)
    assert ("base model" in str(note)) == expected.endswith("Model")


def test_without_transformers_the_error_says_what_to_install_or_to_add(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SourceError, match="models"):
        plan(write(tmp_path / "source"))


@pytest.mark.parametrize(
    "named", [{"architectures": ["MineForCausalLM"]}, {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}]
)
def test_a_config_that_names_its_class_is_carried_over_unmodified(named: dict[str, object], tmp_path: Path) -> None:
    source = write(tmp_path / "source", **named)
    summary = convert(source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    del written["quantization_config"]
    assert written == json.loads((source / "config.json").read_text())
    assert not summary.plan.notes
