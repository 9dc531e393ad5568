"""The tensors of a plan: from manifests, checkpoints and bitsandbytes folders, and the sources that are rejected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qformat.artifact.components import PackedShape
from qformat.cli.default_conversion import as_converted
from qformat.codec.floats import FloatFormat
from qformat.errors import ArtifactError, SourceError, UsageError
from qformat.model.load import load_model
from qformat.model.nf4_linear import NF4Linear
from qformat.names import MANIFEST_NAME
from qformat.training.memory_plan.plan import MemoryPlanner, plan_memory
from qformat.training.memory_plan.tensors import ModelTensors, read_model_tensors
from tests.small_models import llama_config, llama_tensors, write_checkpoint
from tests.training.memory_plan.plans import make_config, small_settings, write_headers


def test_an_artifact_is_planned_from_its_manifest(artifact: Path, tmp_path: Path) -> None:
    for name in ("qformat.json", "config.json"):
        shutil.copy(artifact / name, tmp_path / name)
    plan = plan_memory(tmp_path, small_settings())
    model = load_model(artifact, device="cpu", dtype=torch.bfloat16)
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    assert plan.packed == sum(layer.weight.nbytes for layer in layers)
    assert plan.constants == sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
    everything = [*model.parameters(), *model.buffers()]
    assert plan.weights == sum({t.data_ptr(): t.nbytes for t in everything}.values())


def test_a_checkpoint_is_planned_as_its_conversion(artifact: Path) -> None:
    source = artifact.parent / "source"
    assert plan_memory(source, small_settings(), conversion=as_converted) == plan_memory(artifact, small_settings())


def test_a_bitsandbytes_folder_is_planned_from_its_headers(artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact, tmp_path / "bnb"))
    (folder / MANIFEST_NAME).unlink()
    assert plan_memory(folder, small_settings()) == plan_memory(artifact, small_settings())


def test_weights_kept_in_float32_count_twice(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden": 64, "intermediate": 128, "vocabulary": 320, "n_layers": 2}
    plans = [
        plan_memory(
            write_checkpoint(tmp_path / dtype, llama_tensors(**sizes, dtype=dtype), config=llama_config(**sizes)),
            small_settings(),
            conversion=as_converted,
        )
        for dtype in ("BF16", "F32")
    ]
    n = 2 * 320 * 64 + 5 * 64
    assert plans[1].kept - plans[0].kept == n * (4 + 2) - n * 2


def test_a_packed_output_layer_is_decoded(tmp_path: Path) -> None:
    folder = write_headers(tmp_path / "m", make_config("llama", "tiny", 2))
    tensors = read_model_tensors(folder, conversion=as_converted)
    head = PackedShape((32000, 256), FloatFormat.BF16, 64, True).components("lm_head.weight")
    kept = {name: new for name, new in tensors.kept.items() if name != "lm_head.weight"}
    packed = ModelTensors(folder, {**tensors.packed, "lm_head.weight": head}, kept)
    plans = [MemoryPlanner(t, small_settings(target_modules=("q_proj",))).plan() for t in (tensors, packed)]
    assert plans[0].kept == plans[1].kept
    assert plans[1].packed - plans[0].packed == 32000 * 128


def test_a_16_bit_checkpoint_needs_a_conversion(artifact: Path) -> None:
    with pytest.raises(UsageError, match=r"is not quantized.*Convert it first"):
        plan_memory(artifact.parent / "source", small_settings())


def test_other_quantizations_are_rejected(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path / "m", config={**llama_config(), "quantization_config": {"quant_method": "gptq"}}
    )
    with pytest.raises(SourceError, match="is already quantized in a format other than"):
        plan_memory(folder, small_settings(), conversion=as_converted)


def test_a_missing_directory_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="directory does not exist"):
        plan_memory(tmp_path / "none", small_settings())


def test_weights_that_do_not_fit_the_config_are_rejected(artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 192}))
    with pytest.raises(ArtifactError, match=r"bytes of packed codes and .* blocks do not fit the model's shape"):
        plan_memory(folder, small_settings())
