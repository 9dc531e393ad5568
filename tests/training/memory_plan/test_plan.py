"""The plan against complete models that run on fake tensors, and the origin of its numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qformat.cli.default_conversion import as_converted
from qformat.errors import UsageError
from qformat.training.memory_plan.meter import Segment
from qformat.training.memory_plan.plan import MemoryPlanner, StatesPlan, plan_memory
from qformat.training.memory_plan.table import format_plan
from qformat.training.memory_plan.tensors import read_model_tensors
from qformat.training.memory_plan.trace import FakeTraining
from qformat.training.optimizer.make_optimizer import make_optimizer
from qformat.training.optimizer.page_device import CUDA_RESERVE_NBYTES
from qformat.training.settings import page_budget_nbytes
from tests.training.memory_plan.plans import GIB, make_config, planned, planner_of, small_settings, write_headers


@pytest.fixture(scope="module")
def tiny_planner(tmp_path_factory: pytest.TempPathFactory) -> MemoryPlanner:
    return planner_of(tmp_path_factory.mktemp("tiny"), make_config("llama", "tiny", 4))


@pytest.mark.parametrize(
    ("checkpointing", "batch", "packing"),
    [
        (False, 3, False),
        (True, 2, True),
        pytest.param(True, 1, False, marks=pytest.mark.slow),
        pytest.param(False, 1, False, marks=pytest.mark.slow),
    ],
)
def test_identical_layers_run_once(tmp_path: Path, checkpointing: bool, batch: int, packing: bool) -> None:
    tensors = read_model_tensors(
        write_headers(tmp_path / "m", make_config("gemma3", "tiny", 9)), conversion=as_converted
    )
    settings = small_settings(gradient_checkpointing=checkpointing, packing=packing)
    training = FakeTraining(tensors, settings)
    assert len(training._representatives()) < 6
    found = training.micro_batch(settings, batch_size=batch, seq_len=640)
    whole = training.micro_batch(settings, batch_size=batch, seq_len=640, every_layer=True)
    assert curve(found) == curve(whole)


def curve(segments: list[Segment]) -> list[int]:
    """Return the peak of each segment."""
    live, most = 0, []
    for segment in segments:
        most.append(live + segment.peak)
        live += segment.delta
    return most


def test_gradients_of_earlier_micro_batches_are_counted(tmp_path: Path) -> None:
    config = make_config("llama", "tiny", 4)
    folder = write_headers(tmp_path / "m", config)
    one, many = (plan_memory(folder, small_settings(grad_accum=n, rank=256), conversion=as_converted) for n in (1, 8))
    assert many.loss_peak - one.loss_peak == one.gradients == one.adapters


def test_the_tiled_loss_allocates_no_logits(tmp_path: Path) -> None:
    config = make_config("qwen3", "tiny", 2)
    tiled = planned(config, tmp_path / "a", 8, 4, 2048, checkpointing=True, loss="tiled")
    logits = planned(config, tmp_path / "b", 8, 4, 2048, checkpointing=True, loss="logits")
    n = 4 * 2047
    # The scored rows and their float32 gradient exist at the same time as the tile. The bfloat16 gradient and seven
    # numbers per row come on top, each rounded up to 512 bytes by the allocator.
    tile, row = 4096 * 32768 * 2, 256
    assert tile + n * row * (2 + 4) <= tiled.loss <= tile + n * row * (2 + 4 + 2) + n * 7 * 4 + 512 * 11
    assert logits.loss > n * config.vocab_size * (2 + 4 + 4)


def test_the_mask_of_packed_rows_covers_all_rows(tmp_path: Path) -> None:
    planner = planner_of(tmp_path, make_config("llama", "tiny", 2), packing=True)
    rows = 2 * 1024
    grown = planner.plan(batch_size=2, seq_len=1024).peak - planner.plan(batch_size=1, seq_len=1024).peak
    assert grown > (rows**2 - 1024**2) * (1 + 2)  # the boolean mask, and the bf16 mask that is added to the scores


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_adapters_match_those_of_train(tmp_path: Path, dtype: str) -> None:
    config = make_config("llama", "tiny", 3)
    plan = planner_of(
        tmp_path,
        config,
        rank=5,
        target_modules=("q_proj", "down_proj"),
        adapter_dtype=dtype,
        modules_to_save=("lm_head",),
    ).plan()
    n = 3 * (5 * (256 + 256) + 5 * (688 + 256)) + 32000 * 256
    assert plan.adapters == plan.gradients == n * (4 if dtype == "float32" else 2)


def test_unknown_target_modules_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="target_modules nothing"):
        planner_of(tmp_path, make_config("llama", "tiny", 2), target_modules=("nothing",))


@pytest.mark.parametrize("budget", ["auto", "0", "9MB"])
@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_planned_states_match_those_of_the_optimizer(tmp_path: Path, optim: Any, budget: str) -> None:
    planner = planner_of(tmp_path, make_config("llama", "tiny", 4), optim=optim, page_budget=budget, rank=96)
    states = planner.plan().states
    trained = [nn.Parameter(torch.zeros(p.shape)) for p in planner._trained]
    optimizer = make_optimizer(
        optim, trained, lr=1e-4, page_budget="auto" if budget == "auto" else page_budget_nbytes(budget) or 0
    )
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    statistics = optimizer.paging_statistics()  # type: ignore[attr-defined]
    assert states.total == statistics.pages * statistics.page_nbytes
    assert states.on_device == statistics.resident * statistics.page_nbytes
    assert states.saved == states.total - states.on_device
    ring = min(3, statistics.pages - statistics.resident) * statistics.page_nbytes
    assert ring <= states.step <= ring + 2**24


def test_unpaged_states_take_twice_the_adapters(tmp_path: Path) -> None:
    plan = planner_of(tmp_path, make_config("llama", "tiny", 2), optim="adamw").plan()
    assert plan.states == StatesPlan(2 * plan.adapters, 2 * plan.adapters, 0)


def test_as_many_pages_as_fit_stay_on_the_device(tmp_path: Path) -> None:
    planner = planner_of(tmp_path, make_config("llama", "tiny", 4), rank=256)
    bare = planner.plan(device_nbytes=0)
    assert (bare.states.on_device, bare.fits) == (0, False)
    some = planner.plan(device_nbytes=bare.peak + CUDA_RESERVE_NBYTES + 9 * 2**20)
    assert 0 < some.states.on_device < some.states.total
    assert some.fits
    assert planner.plan().states.saved == 0


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", pytest.param("adamw", marks=pytest.mark.slow)])
def test_the_largest_batch_fits_and_one_more_does_not(tmp_path: Path, optim: str) -> None:
    planner = planner_of(tmp_path, make_config("llama", "tiny", 4), optim=optim)
    device = planner.plan(batch_size=1).peak + CUDA_RESERVE_NBYTES + 500 * 2**20
    largest = planner.largest_batch(device)
    assert planner.plan(batch_size=largest, device_nbytes=device).fits
    assert not planner.plan(batch_size=largest + 1, device_nbytes=device).fits
    longest = planner.largest_sequence(device)
    assert longest % 64 == 0
    assert planner.plan(seq_len=longest, device_nbytes=device).fits
    assert not planner.plan(seq_len=longest + 64, device_nbytes=device).fits


def test_nothing_fits_a_device_without_memory(tiny_planner: MemoryPlanner) -> None:
    assert tiny_planner.largest_batch(2**20) == tiny_planner.largest_sequence(2**20) == 0


@pytest.mark.parametrize(("batch", "seq_len"), [(-1, 8), (1, 1)])
def test_invalid_sizes_are_rejected(tiny_planner: MemoryPlanner, batch: int, seq_len: int) -> None:
    with pytest.raises(UsageError, match="at least 1 row of 2 tokens"):
        tiny_planner.plan(batch_size=batch, seq_len=seq_len)


def test_the_table_is_aligned_and_lists_the_sizes(tiny_planner: MemoryPlanner) -> None:
    text = format_plan(tiny_planner.plan(device_nbytes=8 * GIB), largest_batch=7, largest_sequence=4096)
    lines = text.splitlines()
    sizes = [re.match(r"[a-z ]+  +[0-9.]+ ([KMG]?i?B)(  |$)", line) for line in lines[:10]]
    assert len({match.end(1) for match in sizes if match is not None}) == 1
    assert sum(match is not None for match in sizes) == 9
    assert "fits, with 512 MiB reserved for CUDA" in text
    assert [line.split()[2] for line in lines[-2:]] == ["7", "4096"]


def test_a_model_that_does_not_run_is_rejected_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    planner = planner_of(tmp_path, make_config("llama", "tiny", 2))
    planner._training.base.config.num_attention_heads = 3
    for layer in planner._training._layers:
        layer.self_attn.head_dim = 7
    with pytest.raises(UsageError, match="cannot be planned, because the model does not run on fake tensors: "):
        planner.plan()
    assert "Traceback" not in capfd.readouterr().err
