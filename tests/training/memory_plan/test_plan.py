"""The plan against whole models that are run on tensors without memory, and where its numbers come from."""

from __future__ import annotations

import contextlib
import http.server
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qformat.artifact.components import PackedShape
from qformat.cli.default_conversion import as_converted
from qformat.codec.floats import FloatFormat
from qformat.errors import ArtifactError, SourceError, UsageError
from qformat.model.load import load_model
from qformat.model.nf4_linear import NF4Linear
from qformat.names import MANIFEST_NAME
from qformat.training.memory_plan.loss import Loss
from qformat.training.memory_plan.meter import Segment
from qformat.training.memory_plan.plan import MemoryPlan, MemoryPlanner, StatesPlan, plan_memory
from qformat.training.memory_plan.search import largest
from qformat.training.memory_plan.table import format_plan
from qformat.training.memory_plan.tensors import ModelTensors, read_model_tensors
from qformat.training.memory_plan.trace import FakeTraining
from qformat.training.optimizer.choice import make_optimizer
from qformat.training.optimizer.page_device import CUDA_RESERVE_NBYTES
from qformat.training.settings import TrainingSettings, page_budget_nbytes
from tests.small_models import header_bytes, llama_config, llama_tensors, write_checkpoint

GIB = 2**30

# What stays the same in every size of a family.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"vocab_size": 32000}),
    "qwen3": ("Qwen3", {"vocab_size": 151936, "tie_word_embeddings": False}),
    "mistral": ("Mistral", {"vocab_size": 32768, "sliding_window": None}),
    "gemma3": ("Gemma3", {"vocab_size": 262144, "sliding_window": 512}),
}
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "num_key_value_heads": 2},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 8},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
}


def make_config(family: str, size: str, n_layers: int) -> Any:
    name, fixed = FAMILIES[family]
    numbers = {**fixed, **SIZES[size], "head_dim": SIZES[size]["hidden_size"] // SIZES[size]["num_attention_heads"]}
    config_class = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    config = config_class(**numbers, num_hidden_layers=n_layers, max_position_embeddings=4096, dtype="bfloat16")
    config.architectures = [f"{name}ForCausalLM"]
    return config


def state_of(config: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])._from_config(config, dtype=torch.bfloat16)
    state: dict[str, Tensor] = model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def write_headers(folder: Path, config: Any) -> Path:
    """Write a checkpoint whose weights are a hole in the file."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    record: dict[str, object] = {}
    offset = 0
    for name, tensor in state_of(config).items():
        record[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    header = header_bytes(record)
    (folder / "model.safetensors").write_bytes(header)
    os.truncate(folder / "model.safetensors", len(header) + offset)
    return folder


# The oracle: another model, another LoRA node, another way to count.


class Live(TorchDispatchMode):
    """Bytes of the storages that exist, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return out

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            self.seen[storage] = True
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.forget, storage.nbytes())

    def forget(self, nbytes: int) -> None:
        self.now -= nbytes


class LoraNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, components: tuple[Any, ...], bias: Tensor | None) -> Tensor:
        inner = x @ a.to(x.dtype).t()
        ctx.save_for_backward(x, inner, a, b)
        ctx.components = components
        weight = torch.ops.qformat.dequantize_nf4(*components, x.dtype)
        y = nn.functional.linear(x, weight, bias)
        del weight
        return y + inner @ b.to(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, inner, a, b = ctx.saved_tensors
        grad = grads[0]
        weight = torch.ops.qformat.dequantize_nf4(*ctx.components, x.dtype)
        grad_x = grad @ weight
        del weight
        grad_inner = grad @ b.to(x.dtype)
        grad_a = (grad_inner.flatten(0, 1).t() @ x.flatten(0, 1)).to(a.dtype)
        grad_b = (grad.flatten(0, 1).t() @ inner.flatten(0, 1)).to(b.dtype)
        return grad_x.add_(grad_inner @ a.to(x.dtype)), grad_a, grad_b, None, None


class OracleLinear(nn.Module):
    def __init__(self, old: nn.Linear, rank: int) -> None:
        super().__init__()
        rows, columns = old.out_features, old.in_features
        n_blocks = math.ceil(rows * columns / 64)
        self.register_buffer("packed", torch.empty(math.ceil(rows * columns / 2), 1, dtype=torch.uint8))
        self.register_buffer("absmax", torch.empty(n_blocks, dtype=torch.uint8))
        self.register_buffer("nested", torch.empty(math.ceil(n_blocks / 256)))
        self.register_buffer("table", torch.empty(256))
        self.shape = (rows, columns)
        self.a, self.b = nn.Parameter(torch.empty(rank, columns)), nn.Parameter(torch.empty(rows, rank))
        self.bias = old.bias

    def forward(self, x: Tensor) -> Tensor:
        components = (self.packed, self.absmax, self.nested, self.table, 0.0, 64, *self.shape)
        y: Tensor = LoraNode.apply(x, self.a, self.b, components, self.bias)  # type: ignore[no-untyped-call]
        return y


def measured_peak(config: Any, rank: int, batch: int, seq_len: int, *, checkpointing: bool) -> int:
    """Run one step of AdamW of a whole model with transformers' own loss; return the most that was alive."""
    live = Live()
    # transformers makes masks that it would not make for values that it can see.
    as_if_seen = [
        mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None),
        mock.patch("transformers.masking_utils.is_tracing", return_value=False),
    ]
    with FakeTensorMode(), warnings.catch_warnings(), as_if_seen[0], as_if_seen[1]:
        warnings.simplefilter("ignore")
        config._attn_implementation = "sdpa"
        model = getattr(transformers, config.architectures[0])._from_config(config, dtype=torch.bfloat16)
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, OracleLinear(module, rank))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        ids = torch.zeros(batch, seq_len, dtype=torch.long)
        mask = torch.ones(batch, 1, seq_len, seq_len, dtype=torch.bool) if batch > 1 else None
        positions = torch.arange(seq_len)[None].expand(batch, -1)
        for tensor in [*model.parameters(), *model.buffers(), ids, positions, *([] if mask is None else [mask])]:
            live.count(tensor)
        with live:
            for _ in range(2):  # in the second one, the states are there
                loss = model(
                    input_ids=ids, attention_mask=mask, position_ids=positions, labels=ids, use_cache=False
                ).loss
                loss.backward()
                del loss
                optimizer.step()
                optimizer.zero_grad()
    return live.most


def planned(
    config: Any, folder: Path, rank: int, batch: int, seq_len: int, *, checkpointing: bool, loss: Loss = "logits"
) -> MemoryPlan:
    settings = TrainingSettings(
        rank=rank, batch_size=batch, seq_len=seq_len, gradient_checkpointing=checkpointing, grad_accum=1, optim="adamw"
    )
    return plan_memory(write_headers(folder, config), settings, conversion=as_converted, loss=loss)


def check(config: Any, folder: Path, rank: int, batch: int, seq_len: int, *, checkpointing: bool) -> None:
    plan = planned(config, folder, rank, batch, seq_len, checkpointing=checkpointing)
    measured = measured_peak(config, rank, batch, seq_len, checkpointing=checkpointing)
    if os.environ.get("PRINT_PLAN"):
        shape = f"{config.model_type} {config.hidden_size}x{config.num_hidden_layers} {batch}x{seq_len} r{rank}"
        sizes = f"{plan.peak / GIB:.3f} | {measured / GIB:.3f} | {plan.peak / measured - 1:+.2%}"
        print(f"| {shape} ckpt={checkpointing} | {sizes} |")
    assert plan.peak == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(
    ("family", "size", "n_layers", "rank", "batch", "seq_len", "checkpointing"),
    [
        ("llama", "tiny", 4, 8, 4, 512, True),
        ("llama", "7b", 4, 64, 1, 512, False),
        ("qwen3", "1b", 4, 8, 4, 512, False),
        ("mistral", "7b", 3, 8, 1, 2048, True),
        ("gemma3", "1b", 7, 64, 1, 2048, False),
    ],
)
def test_the_peak_is_that_of_the_whole_model(
    tmp_path: Path, family: str, size: str, n_layers: int, rank: int, batch: int, seq_len: int, checkpointing: bool
) -> None:
    check(make_config(family, size, n_layers), tmp_path / "m", rank, batch, seq_len, checkpointing=checkpointing)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("rank", "batch", "seq_len"), [(8, 1, 512), (64, 4, 512), (64, 1, 2048), (8, 4, 2048)])
@pytest.mark.parametrize(("size", "n_layers"), [("tiny", 6), ("1b", 22), ("7b", 32)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_peak_is_that_of_the_whole_model_everywhere(
    tmp_path: Path, family: str, size: str, n_layers: int, rank: int, batch: int, seq_len: int, checkpointing: bool
) -> None:
    check(make_config(family, size, n_layers), tmp_path / "m", rank, batch, seq_len, checkpointing=checkpointing)


def small_settings(**changes: Any) -> TrainingSettings:
    return TrainingSettings(**{"rank": 8, "batch_size": 1, "seq_len": 256, "grad_accum": 1, **changes})


def planner_of(tmp_path: Path, config: Any, **changes: Any) -> MemoryPlanner:
    tensors = read_model_tensors(write_headers(tmp_path / "m", config), conversion=as_converted)
    return MemoryPlanner(tensors, small_settings(**changes))


@pytest.fixture(scope="module")
def tiny_planner(tmp_path_factory: pytest.TempPathFactory) -> MemoryPlanner:
    return planner_of(tmp_path_factory.mktemp("tiny"), make_config("llama", "tiny", 4))


@pytest.mark.parametrize(
    ("checkpointing", "batch", "packing"), [(True, 1, False), (False, 1, False), (False, 3, False), (True, 2, True)]
)
def test_layers_that_are_alike_are_run_once(tmp_path: Path, checkpointing: bool, batch: int, packing: bool) -> None:
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
    """Return the most that was alive in each segment."""
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


def test_the_tiled_loss_makes_no_logits(tmp_path: Path) -> None:
    config = make_config("qwen3", "tiny", 2)
    tiled = planned(config, tmp_path / "a", 8, 4, 2048, checkpointing=True, loss="tiled")
    logits = planned(config, tmp_path / "b", 8, 4, 2048, checkpointing=True, loss="logits")
    n = 4 * 2047
    # The tile, the rows that are scored, their gradient in float32 and bfloat16, seven numbers a row.
    assert tiled.loss == pytest.approx(4096 * 32768 * 2 + n * 256 * (2 + 4 + 2) + n * 7 * 4, rel=0.1)
    assert logits.loss > n * config.vocab_size * (2 + 4 + 4)


def test_a_mask_of_packed_rows_covers_all_of_them(tmp_path: Path) -> None:
    planner = planner_of(tmp_path, make_config("llama", "tiny", 2), packing=True)
    rows = 2 * 1024
    grown = planner.plan(batch_size=2, seq_len=1024).peak - planner.plan(batch_size=1, seq_len=1024).peak
    assert grown > (rows**2 - 1024**2) * (1 + 2)  # booleans, and what is added to the scores in bf16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_those_that_train_makes(tmp_path: Path, dtype: str) -> None:
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


def test_unknown_target_modules_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="target_modules nothing"):
        planner_of(tmp_path, make_config("llama", "tiny", 2), target_modules=("nothing",))


@pytest.mark.parametrize("budget", ["auto", "0", "9MB"])
@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_states_are_those_of_the_optimizer(tmp_path: Path, optim: Any, budget: str) -> None:
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


def test_pages_stay_on_the_device_as_far_as_it_has_room(tmp_path: Path) -> None:
    planner = planner_of(tmp_path, make_config("llama", "tiny", 4), rank=256)
    bare = planner.plan(device_nbytes=0)
    assert (bare.states.on_device, bare.fits) == (0, False)
    some = planner.plan(device_nbytes=bare.peak + CUDA_RESERVE_NBYTES + 9 * 2**20)
    assert 0 < some.states.on_device < some.states.total
    assert some.fits
    assert planner.plan().states.saved == 0


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw"])
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


@pytest.mark.parametrize("most", [1, 2, 7, 1000])
@pytest.mark.parametrize("limit", [0, 1, 2, 3, 6, 7, 8, 500, 5000])
@pytest.mark.parametrize("power", [0.5, 1, 2])
@pytest.mark.parametrize("start", [1, 2, 300])
def test_the_search_finds_where_the_room_ends(most: int, limit: int, power: float, start: int) -> None:
    asked = []

    def room(n: int) -> int:
        asked.append(n)
        return int(1000 * ((limit + 0.5) ** power - n**power))

    assert largest(room, most, start=start) == min(limit, most)
    assert len(asked) < 30


@pytest.mark.parametrize(("batch", "seq_len"), [(-1, 8), (1, 1)])
def test_sizes_that_make_no_sense_are_refused(tiny_planner: MemoryPlanner, batch: int, seq_len: int) -> None:
    with pytest.raises(UsageError, match="at least 1 row of 2 tokens"):
        tiny_planner.plan(batch_size=batch, seq_len=seq_len)


def test_the_table_is_aligned_and_names_the_sizes(tiny_planner: MemoryPlanner) -> None:
    text = format_plan(tiny_planner.plan(device_nbytes=8 * GIB), largest_batch=7, largest_sequence=4096)
    lines = text.splitlines()
    sizes = [re.match(r"[a-z ]+  +[0-9.]+ ([KMG]?i?B)(  |$)", line) for line in lines[:10]]
    assert len({match.end(1) for match in sizes if match is not None}) == 1
    assert sum(match is not None for match in sizes) == 9
    assert "fits, with 512 MiB kept free" in text
    assert [line.split()[2] for line in lines[-2:]] == ["7", "4096"]


# Where the tensors come from.


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


def test_weights_kept_in_float32_are_there_twice(tmp_path: Path) -> None:
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


def test_other_quantizations_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path / "m", config={**llama_config(), "quantization_config": {"quant_method": "gptq"}}
    )
    with pytest.raises(SourceError, match="is quantized already"):
        plan_memory(folder, small_settings(), conversion=as_converted)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such folder"):
        plan_memory(tmp_path / "none", small_settings())


def test_weights_that_do_not_fit_the_config_are_refused(artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 192}))
    with pytest.raises(ArtifactError, match=r"bytes of codes in .* blocks, but the model has"):
        plan_memory(folder, small_settings())


def test_without_network_a_repository_is_refused_in_words() -> None:
    with pytest.raises(UsageError, match="nobody/nothing: is no folder here, and cannot be read from the Hub"):
        plan_memory("nobody/nothing", small_settings())


class _Hub(http.server.BaseHTTPRequestHandler):
    """What a client needs of the Hub: `/REPOSITORY/resolve/REVISION/FILE`, with ranges."""

    folder: Path
    ranges: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.folder / self.path.rpartition("/")[2]
        if not self.path.startswith("/some/model/resolve/") or not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, status = path.read_bytes(), 200
        if (wanted := self.headers.get("Range")) and body:
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            self.ranges.append(path.name)
            data, status = data[first : last + 1], 206
        elif body and path.suffix == ".safetensors":
            self.ranges.append("everything")
        self.send_response(status)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{path.name}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def hub_of(folder: Path) -> Iterator[tuple[str, list[str]]]:
    ranges: list[str] = []
    handler = type("Hub", (_Hub,), {"folder": folder, "ranges": ranges})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", ranges
        finally:
            server.shutdown()
            thread.join()


def read_from_hub(endpoint: str, home: Path, repository: str) -> str:
    """Print what is read in a process of its own: the Hub's client takes its address when it is imported."""
    script = (
        "import sys; from qformat.training.memory_plan.tensors import read_model_tensors as read\n"
        "from qformat.errors import QformatError\n"
        "try:\n"
        "    t = read(sys.argv[1], conversion=lambda tensors, config: {})\n"
        "    print(t.folder.joinpath('config.json').is_file(), len(t.packed), len(t.kept), 'torch' in sys.modules)\n"
        "except QformatError as problem: print(type(problem).__name__, problem)"
    )
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        environment |= {name: "", name.lower(): ""}
    command = [sys.executable, "-c", script, repository]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("kind", ["nf4", "source"])
def test_of_a_repository_on_the_hub_only_headers_are_read(artifact: Path, tmp_path: Path, kind: str) -> None:
    folder = artifact.parent / kind
    here = read_model_tensors(folder, conversion=lambda tensors, config: {})
    with hub_of(folder) as (endpoint, ranges):
        said = read_from_hub(endpoint, tmp_path / "home", "some/model")
        assert said.split() == ["True", str(len(here.packed)), str(len(here.kept)), "False"]
        assert ranges
        assert "everything" not in ranges
        assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_repository_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "config.json").write_text("{}")
    with hub_of(tmp_path / "files") as (endpoint, _):
        assert "is not a safetensors repo" in read_from_hub(endpoint, tmp_path / "home", "some/model")
        assert "UsageError some/other: is no folder here" in read_from_hub(endpoint, tmp_path / "home", "some/other")


def test_a_model_that_does_not_run_is_refused_in_a_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    planner = planner_of(tmp_path, make_config("llama", "tiny", 2))
    planner._training.base.config.num_attention_heads = 3
    for layer in planner._training._layers:
        layer.self_attn.head_dim = 7
    with pytest.raises(UsageError, match="cannot be planned, since it does not run unloaded: "):
        planner.plan()
    assert "Traceback" not in capfd.readouterr().err
