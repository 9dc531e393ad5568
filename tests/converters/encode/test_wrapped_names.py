"""Names of wrappers, unmerged adapters and weights without elements, which no reader of the artifact could use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qformat
from qformat.artifact.reading.verify import verify_integrity
from qformat.cli.main import run
from qformat.converters.compare.compare import compare
from qformat.converters.convert import ConversionOptions, convert, plan
from qformat.converters.sources.wrapped.wrappers import without, wrapper_parts
from qformat.errors import Reason, SourceError
from tests.converters.faulty_disk import interrupt
from tests.converters.refused_source import refusal
from tests.converters.sources.decoded_kinds import fp8_source
from tests.small_models import contents, write_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")

STRIP = ConversionOptions(strip_wrappers=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a tiny model. Not to be changed."""
    return write_llama(tmp_path_factory.mktemp("plain") / "source")


@pytest.fixture(scope="module")
def model(plain: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(plain)


def with_tensors(plain: Path, folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Return a copy of the checkpoint with other tensors."""
    shutil.copytree(plain, folder)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def inside(name: str, part: str) -> str:
    return name.replace("layers.0.", f"layers.0.{part}.").replace("layers.1.", f"layers.1.{part}.")


WRAPPERS: dict[str, Callable[[torch.nn.Module], Mapping[str, torch.Tensor]]] = {
    "_orig_mod": lambda model: torch.compile(model, backend="eager").state_dict(),
    "module": lambda model: torch.nn.DataParallel(model).state_dict(),
    "module and _orig_mod": lambda model: torch.nn.DataParallel(torch.compile(model, backend="eager")).state_dict(),
    "_orig_mod and module": lambda model: torch.compile(torch.nn.DataParallel(model), backend="eager").state_dict(),
    "_fsdp_wrapped_module": lambda model: {
        inside(f"_fsdp_wrapped_module.{name}", "_fsdp_wrapped_module._checkpoint_wrapped_module"): tensor
        for name, tensor in model.state_dict().items()
    },
    "_forward_module": lambda model: {f"_forward_module.{name}": value for name, value in model.state_dict().items()},
}
"""States of wrapped models: torch's own for torch.compile and DataParallel, whose names are those of DDP."""


@pytest.mark.parametrize("kind", WRAPPERS)
def test_names_of_wrappers_are_rejected_and_stripped_on_demand(
    kind: str, plain: Path, model: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    source = with_tensors(plain, tmp_path / "source", WRAPPERS[kind](model))
    error = refusal(source)
    assert error.reason is Reason.UNKNOWN_TENSOR
    assert error.tensor in load_file(source / "model.safetensors")
    assert all(repr(part) in error.problem for part in kind.split(" and "))
    assert "strip_wrappers=True" in str(error)

    summary = convert(source, tmp_path / "stripped", STRIP)
    convert(plain, tmp_path / "expected")
    shard = "model-00001-of-00001.safetensors"
    assert (tmp_path / "stripped" / shard).read_bytes() == (tmp_path / "expected" / shard).read_bytes()
    assert set(kind.split(" and ")) <= set(summary.plan.source["stripped"])
    assert verify_integrity(tmp_path / "stripped").passed
    assert compare(tmp_path / "stripped", source).passed


def test_an_interrupted_conversion_with_stripped_names_resumes_to_the_same_bytes(
    plain: Path, model: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    source = with_tensors(plain, tmp_path / "source", WRAPPERS["module"](model))
    convert(source, tmp_path / "at once", STRIP)
    interrupt(source, tmp_path / "in two runs", n_done=5, options=STRIP)
    convert(source, tmp_path / "in two runs", STRIP)
    assert contents(tmp_path / "in two runs") == contents(tmp_path / "at once")


def test_a_model_of_stripped_names_runs(plain: Path, model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    source = with_tensors(plain, tmp_path / "source", WRAPPERS["_orig_mod"](model))
    convert(source, tmp_path / "stripped", STRIP)
    convert(plain, tmp_path / "expected")
    ids = torch.arange(8)[None]
    found, expected = (qformat.load_model(tmp_path / name)(input_ids=ids).logits for name in ("stripped", "expected"))
    assert torch.equal(found, expected)


def test_names_of_decoded_weights_are_stripped(tmp_path: Path) -> None:
    source = fp8_source(tmp_path / "source")
    convert(source, tmp_path / "expected")
    path = source / "model.safetensors"
    save_file({f"module.{name}": tensor for name, tensor in load_file(path).items()}, path)
    convert(source, tmp_path / "stripped", STRIP)
    shard = "model-00001-of-00001.safetensors"
    assert (tmp_path / "stripped" / shard).read_bytes() == (tmp_path / "expected" / shard).read_bytes()


def test_stripping_a_checkpoint_without_wrappers_changes_nothing(plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "stripped", STRIP)
    convert(plain, tmp_path / "expected")
    assert contents(tmp_path / "stripped") == contents(tmp_path / "expected")


def test_two_tensors_that_would_get_one_name_are_rejected(plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    twice = {**tensors, "_orig_mod.model.norm.weight": tensors["model.norm.weight"]}
    error = refusal(with_tensors(plain, tmp_path / "source", twice), STRIP)
    assert error.reason is Reason.DUPLICATE_TENSOR
    assert "model.norm.weight" in error.problem


@pytest.mark.parametrize(
    "names", [["module.a.weight", "lm_head.weight"], ["a._orig_module.b"], ["my_orig_mod.a"], ["a.module.b"], []]
)
def test_other_names_are_not_taken_for_those_of_wrappers(names: list[str]) -> None:
    assert wrapper_parts(names) == []
    assert [without(name, []) for name in names] == names


# Adapters that are not merged


def adapted(model: transformers.PreTrainedModel, **settings: Any) -> peft.PeftModel:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_a_model_with_an_unmerged_adapter_is_rejected(settings: dict[str, Any], plain: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(plain)
    state = adapted(model, **settings).state_dict()
    for name, tensors in {
        "whole": state,
        "base": {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()},
    }.items():
        error = refusal(with_tensors(plain, tmp_path / name / "source", tensors), STRIP)
        assert error.reason is Reason.UNKNOWN_TENSOR
        assert "adapter is not merged" in error.problem
        assert "merge_and_unload" in str(error.next_step)


def test_a_merged_adapter_is_converted(plain: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(plain)
    merged = adapted(model).merge_and_unload()  # type: ignore[operator]
    source = with_tensors(plain, tmp_path / "source", merged.state_dict())
    convert(source, tmp_path / "out")


def test_an_architecture_with_adapters_of_its_own_is_converted(plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.base_layer.weight"] = tensors.pop(f"{name}.weight")
    tensors |= {f"{name}.lora_{x}.speech.weight": torch.ones(4, 32, dtype=torch.bfloat16) for x in "AB"}
    source = with_tensors(plain, tmp_path / "source", tensors)
    assert "not merged" in str(refusal(source))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "speech_lora": {"r": 4}}))  # as Phi-4 multimodal
    convert(source, tmp_path / "converted")


# Weights without elements


@pytest.mark.parametrize("left", [0, 1, 14])
def test_empty_weights_of_zero3_are_rejected(left: int, plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    empty = {name: tensor if i < left else tensor.new_empty(0) for i, (name, tensor) in enumerate(tensors.items())}
    error = refusal(with_tensors(plain, tmp_path / "source", empty))
    assert error.reason is Reason.COMPONENT_SHAPE
    assert f"{len(tensors) - left} of {len(tensors)} tensors" in error.problem
    assert "zero_to_fp32.py" in str(error.next_step)


def test_a_checkpoint_of_matrices_without_rows_is_rejected_but_one_such_matrix_is_not(
    plain: Path, tmp_path: Path
) -> None:
    tensors = load_file(plain / "model.safetensors")
    none = with_tensors(plain, tmp_path / "none", {name: torch.empty(0, 32) for name in tensors})
    with pytest.raises(SourceError, match="is empty"):
        plan(none)
    one = with_tensors(plain, tmp_path / "one", {**tensors, "model.unused": torch.empty(0, 32)})
    convert(one, tmp_path / "out")


def test_the_command_line_strips(plain: Path, model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    source = with_tensors(plain, tmp_path / "source", WRAPPERS["module"](model))
    assert run(["convert", str(source), str(tmp_path / "out"), "--strip-wrappers"]) == 0
    assert run(["verify", str(tmp_path / "out"), "--source", str(source)]) == 0
