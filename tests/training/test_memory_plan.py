"""The plan against whole models that are run on tensors without memory, and where its numbers come from."""

from __future__ import annotations

import contextlib
import gc
import http.server
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qformat.artifact.components import PackedShape
from qformat.artifact.header import NewTensor
from qformat.artifact.manifest import MANIFEST_NAME
from qformat.codec.floats import FloatFormat
from qformat.converters import recipe
from qformat.converters.rules import TensorInfo
from qformat.errors import ArtifactError, SourceError, UsageError
from qformat.model.load import load_model
from qformat.model.nf4_linear import NF4Linear
from qformat.training.memory_plan import MemoryPlan, MemoryPlanner, StatesPlan, _largest, format_plan, plan_memory
from qformat.training.memory_plan_tensors import ModelTensors, read_model_tensors
from qformat.training.memory_plan_trace import Loss
from qformat.training.optimizers import make_optimizer
from qformat.training.page_device import CUDA_RESERVE_NBYTES
from qformat.training.settings import TrainingSettings
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


def as_converted(tensors: list[NewTensor], config: Mapping[str, object]) -> dict[str, PackedShape]:
    """What the command line passes: the default recipe of a conversion."""
    infos = [TensorInfo(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    choices = recipe.apply(recipe.load_recipe(None), infos, config)
    return {
        info.name: PackedShape(info.shape, FloatFormat(info.dtype), options.block_size, options.double_quant)
        for info in infos
        if (options := choices[info.name].options) is not None
    }


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
    with FakeTensorMode(), warnings.catch_warnings():
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
        for tensor in [*model.parameters(), *model.buffers()]:
            live.count(tensor)
        ids = torch.zeros(batch, seq_len, dtype=torch.long)
        mask = torch.ones(batch, 1, seq_len, seq_len, dtype=torch.bool) if batch > 1 else None
        positions = torch.arange(seq_len)[None].expand(batch, -1)
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
        print(
            f"| {shape} ckpt={checkpointing} | {plan.peak / GIB:.3f} | {measured / GIB:.3f} | {plan.peak / measured - 1:+.2%} |"
        )
    assert plan.peak == pytest.approx(measured, rel=0.1)


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
