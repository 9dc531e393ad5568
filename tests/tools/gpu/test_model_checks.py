"""The checks of models in `tools.gpu.check`, run on the CPU: they pass, and they find errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qformat
from qformat.model import load
from qformat.model.devices import host_layers
from qformat.model.devices.host_layers import attach_placed
from tests.model.devices.late_layers import LateLayers
from tests.small_models import llama_config, llama_tensors, write_checkpoint
from tests.tools.gpu.figures import DEVICE
from tools.gpu import check as gpu_check
from tools.gpu import model_checks as gpu_check_models
from tools.gpu.report import report, table
from tools.gpu.results import Result, Settings

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("gpu_check")
    sizes = {"n_layers": 6, "hidden": 64, "intermediate": 128, "vocabulary": 50}
    source = write_checkpoint(folder / "source", llama_tensors(**sizes), config=llama_config(**sizes))
    qformat.convert(source, folder / "artifact")
    return Settings(CPU, quick=True, artifact=folder / "artifact")


def verdicts(results: list[Result]) -> dict[tuple[str, str], bool]:
    return {(result.case, result.metric): result.passed for result in results if result.passed is not None}


@pytest.mark.parametrize("name", ["load", "memory", "training", "paging"])
def test_a_check_passes_on_a_cpu(settings: Settings, name: str) -> None:
    results = list(gpu_check_models.MODEL_CHECKS[name](settings))
    assert {result.check for result in results} == {name}
    assert all(verdicts(results).values()), [result for result in results if result.passed is False]
    assert verdicts(results)
    assert "passed" in table(report(results, device=DEVICE))


def on_the_cpu(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    """Let `load_model` decide for a GPU, but run on the CPU with an artificial device."""
    nbytes = sum(path.stat().st_size for path in settings.model.glob("*.safetensors"))

    def placed(*arguments: Any) -> Any:
        model, shards, names, _, placement = arguments
        return attach_placed(model, shards, names, CPU, placement, streamed_by=LateLayers())

    resident = load.load_model(settings.model, device="cpu")

    def loaded(path: Path, **options: Any) -> Any:
        if "device_map" not in options:
            return resident
        (budget,) = options.pop("max_memory").values()
        return load.load_model(path, max_memory={0: budget}, **options)

    monkeypatch.setattr(load, "chosen_device", lambda device: GPU)
    monkeypatch.setattr(load, "attach_placed", placed)
    monkeypatch.setattr(host_layers, "free_nbytes", lambda device: nbytes if device == GPU else 2**40)
    monkeypatch.setattr(gpu_check_models, "load_model", loaded)


def test_the_check_of_streamed_layers_passes_on_an_artificial_device(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    on_the_cpu(monkeypatch, settings)
    results = list(gpu_check_models.check_streaming(settings))
    assert list(verdicts(results).values()) == [True]
    assert {result.metric for result in results} >= {
        "time per token", "transfer rate", "time per token / resident model",
    }  # fmt: skip


def test_wrong_bytes_on_the_device_are_found(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    real = gpu_check_models.load_model
    calls: list[Any] = []

    def wrong_once(*arguments: Any, **options: Any) -> Any:
        model = real(*arguments, **options)
        calls.append(model)
        if len(calls) == 2:
            model.model.norm.weight.data[3] += 1
        return model

    monkeypatch.setattr(gpu_check_models, "load_model", wrong_once)
    assert next(gpu_check_models.check_load(settings)) == Result("load", "tensors", "wrong", 1, "", False)


def test_a_loss_that_does_not_fall_is_found(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    monkeypatch.setattr(gpu_check_models, "train_step", lambda *_: 2.0)
    found = verdicts(list(gpu_check_models.check_training(settings)))
    assert found == {
        ("plain", "last loss / first"): False,
        ("checkpointing", "last loss / first"): False,
        ("checkpointing", "relative difference of losses"): True,
    }


def test_differing_bits_of_paged_states_are_found(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    real = gpu_check_models.PagedAdamW

    def slower(params: Any, lr: float = 1e-3, **options: Any) -> Any:
        return real(params, lr=lr * 0.999, **options)

    monkeypatch.setattr(gpu_check_models, "PagedAdamW", slower)
    found = verdicts(list(gpu_check_models.check_paging(settings)))
    compared = [passed for (_, metric), passed in found.items() if metric == "differing parameters"]
    assert compared == [False] * 4


@pytest.mark.parametrize(("names", "made"), [(["copy"], False), (["copy", "memory"], True)])
def test_an_artifact_is_made_only_for_checks_of_models(
    monkeypatch: pytest.MonkeyPatch, names: list[str], made: bool
) -> None:
    layers: list[int] = []
    make: Callable[[Path, int], Path] = lambda folder, n_layers: (layers.append(n_layers), folder)[1]  # noqa: E731
    monkeypatch.setattr(gpu_check.bench_load, "make_artifact", make)
    with gpu_check.artifact_for(names, None, quick=True) as artifact:
        assert (artifact is not None) == made == (layers == [4])
    with gpu_check.artifact_for(names, Path("given"), quick=True) as artifact:
        assert artifact == Path("given")
    assert len(layers) == made
