"""Checks of `tools.gpu.check` that run a model: loading, memory, training, paging, layers in host memory.

They also run on the CPU, so that a test can check them; figures of GPU memory are 0 there.
"""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from qformat.artifact.reading.structure import check_structure
from qformat.model.load import load_model
from qformat.training.optimizer.page_device import PageDevice, page_device
from qformat.training.optimizer.paged_adamw import PagedAdamW
from qformat.training.paging_retry import run_with_paging_retry
from tools.gpu.results import Result, Settings

PAGE_NBYTES = 2**20


def check_load(settings: Settings) -> Iterator[Result]:
    """Load with and without digests, compare the tensors with the files, and time it against reading the files."""
    nbytes = sum(check_structure(settings.model).shard_nbytes.values())
    expected = load_model(settings.model, device="cpu").state_dict()
    model = load_model(settings.model, device=settings.device)
    wrong = sum(not same_bits(tensor.cpu(), expected[name]) for name, tensor in model.state_dict().items())
    yield Result("load", "tensors", "wrong", wrong, "", wrong == 0)
    del model
    for kind, prepare in (("warm", lambda: None), ("cold", lambda: forget_cache(settings.model))):
        reading = seconds(lambda: read_all(settings.model), settings, prepare)
        yield Result("load", f"read, {kind}", "rate", nbytes / reading / 1e9, "GB/s")
        for verify in ("structure", "full"):
            load = partial(load_model, settings.model, device=settings.device, verify=verify)
            loading = seconds(load, settings, prepare)
            yield Result("load", f"{verify}, {kind}", "time", loading * 1e3, "ms")
            yield Result("load", f"{verify}, {kind}", "speed relative to reading", reading / loading, "")


def check_memory(settings: Settings) -> Iterator[Result]:
    """Measure the peak device memory of loading, of a prompt and of one token, relative to the size of the shards."""
    nbytes = sum(check_structure(settings.model).shard_nbytes.values())
    free_memory(settings.device)
    before = peak(settings.device)
    model = load_model(settings.model, device=settings.device)
    loaded = peak(settings.device) - before
    # The allocator rounds each shard up to 2 MiB; rotary buffers and similar tensors are small.
    yield Result("memory", "load", "peak / size of shards", loaded / nbytes, "", loaded <= 1.02 * nbytes + 64 * 2**20)
    with torch.inference_mode():
        for name, n_tokens in (("prompt of 256", 256), ("one token", 1)):
            model(torch.arange(n_tokens, device=settings.device)[None] % model.config.vocab_size)
            yield Result("memory", name, "peak", (peak(settings.device) - before) / 1e6, "MB")


def check_training(settings: Settings) -> Iterator[Result]:
    """Train LoRA on one batch with and without gradient checkpointing: the loss must fall and must be the same."""
    losses: dict[bool, list[float]] = {}
    for checkpointing in (False, True):
        free_memory(settings.device)
        model = trainable(settings, checkpointing=checkpointing)
        ids = torch.arange(64 if settings.quick else 512, device=settings.device)[None] % model.config.vocab_size
        optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
        times: list[float] = []
        losses[checkpointing] = []
        for _ in range(5):
            started = now(settings.device)
            losses[checkpointing].append(train_step(model, ids, optimizer))
            times.append(now(settings.device) - started)
        case = "checkpointing" if checkpointing else "plain"
        found = losses[checkpointing]
        yield Result("training", case, "last loss / first", found[-1] / found[0], "", found[-1] < found[0])
        yield Result("training", case, "throughput", ids.numel() / statistics.median(times[1:]), "tokens/s")
        yield Result("training", case, "peak", peak(settings.device) / 1e6, "MB")
        del model, optimizer
    distance = max(abs(a - b) / abs(a) for a, b in zip(*losses.values(), strict=True))
    yield Result("training", "checkpointing", "relative difference of losses", distance, "", distance < 1e-2)


def check_paging(settings: Settings) -> Iterator[Result]:
    """Compare PagedAdamW with torch's fused AdamW bit by bit, under memory budgets and failing allocations."""
    expected = adamw_bits(settings, partial(torch.optim.AdamW, lr=1e-2, fused=True))
    for name, budget, largest in (
        ("all resident", 2**40, None),
        ("a quarter resident", 4 * PAGE_NBYTES, None),
        ("none resident", 0, None),
        ("large allocations fail", 2**40, 3 * PAGE_NBYTES),
    ):
        device = FailingPages(page_device(settings.device), largest)
        options: dict[str, Any] = {"page_budget": budget, "page_nbytes": PAGE_NBYTES, "device": device}
        found = adamw_bits(settings, partial(PagedAdamW, lr=1e-2, **options))
        wrong = sum(not same_bits(*pair) for pair in zip(found, expected, strict=True))
        yield Result("paging", name, "differing parameters", wrong, "", wrong == 0)
        if largest is not None:
            yield Result("paging", name, "failed allocations", device.n_failed, "", device.n_failed > 0)
    yield from check_retry(settings)


def check_retry(settings: Settings) -> Iterator[Result]:
    """Let a micro-batch run out of memory: the optimizer's states must leave the device, and the batch must rerun."""
    param = torch.nn.Parameter(torch.ones(2**20, device=settings.device))
    optimizer = PagedAdamW([param], page_budget=2**30, page_nbytes=PAGE_NBYTES)
    param.grad = torch.ones_like(param)
    optimizer.step()
    attempts: list[int] = []

    def micro_batch() -> float:
        attempts.append(1)
        if len(attempts) == 1:
            exhaust(settings.device)
        return float((param.detach() * 2).sum())

    value = run_with_paging_retry(optimizer, micro_batch)
    good = len(attempts) == 2 and value == float((param.detach() * 2).sum())
    yield Result("paging", "out of memory", "attempts", len(attempts), "", good)


def check_streaming(settings: Settings) -> Iterator[Result]:
    """Keep layers in host memory: compare the logits with a resident model, and measure memory and transfer rate."""
    device = settings.device
    ids = torch.arange(32, device=device)[None]
    free_memory(device)
    with torch.inference_mode():
        resident = load_model(settings.model, device=device)
        expected = resident(ids).logits.cpu()
        fast = seconds(partial(resident, ids[:, :1]), settings)
        whole = peak(device)
        del resident
        free_memory(device)
        nbytes = sum(check_structure(settings.model).shard_nbytes.values())
        model: Any = load_model(
            settings.model, device=device, device_map="auto", max_memory={str(device): int(0.6 * nbytes)}
        )
        same = same_bits(model(ids).logits.cpu(), expected)
        n_streamed = len(model.layer_stream.names)
        yield Result("streaming", f"{n_streamed} layers", "same bits", float(same), "", same)
        token = seconds(partial(model, ids[:, :1]), settings)
    streamed = model.layer_stream.pass_nbytes
    yield Result("streaming", f"{n_streamed} layers", "time per token", token * 1e3, "ms")
    yield Result("streaming", f"{n_streamed} layers", "time per token / resident model", token / fast, "x")
    yield Result("streaming", f"{n_streamed} layers", "transfer rate", streamed / token / 1e9, "GB/s")
    yield Result("streaming", f"{n_streamed} layers", "peak / resident model", peak(device) / max(1, whole), "x")


MODEL_CHECKS: dict[str, Callable[[Settings], Iterator[Result]]] = {
    "load": check_load,
    "memory": check_memory,
    "training": check_training,
    "paging": check_paging,
    "streaming": check_streaming,
}


class FailingPages:
    """A device of pages on which allocations above a size fail; with None, none fail."""

    def __init__(self, device: PageDevice, largest_nbytes: int | None) -> None:
        self._device = device
        self._largest_nbytes = largest_nbytes
        self.n_failed = 0

    def allocate(self, nbytes: int) -> Tensor:
        if self._largest_nbytes is not None and nbytes > self._largest_nbytes:
            self.n_failed += 1
            raise torch.OutOfMemoryError(f"allocation of {nbytes} bytes fails on purpose")
        return self._device.allocate(nbytes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)


def trainable(settings: Settings, *, checkpointing: bool) -> Any:
    """Return a model with LoRA on all linear layers, with the same initial values each time."""
    from peft import LoraConfig, get_peft_model

    model = load_model(settings.model, device=settings.device)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).train()


def train_step(model: Any, ids: Tensor, optimizer: torch.optim.Optimizer) -> float:
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def adamw_bits(settings: Settings, optimizer_of: Callable[[Any], torch.optim.Optimizer]) -> list[Tensor]:
    """Return the parameters after four steps: 8 MiB in tensors of many sizes."""
    generator = torch.Generator().manual_seed(0)
    sizes = [2**20, 300_007, 5, 2**19, 1]
    drawn = [torch.randn(size, generator=generator) for size in sizes]
    params = [torch.nn.Parameter(values.to(settings.device)) for values in drawn]
    optimizer = optimizer_of(params)
    for _ in range(4):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(settings.device)
        optimizer.step()
    return [param.detach().cpu() for param in params]


def exhaust(device: torch.device) -> None:
    """Allocate more memory than the device has. Raises torch.OutOfMemoryError."""
    if device.type != "cuda":
        raise torch.OutOfMemoryError("simulated")
    torch.empty(torch.cuda.get_device_properties(device).total_memory, dtype=torch.uint8, device=device)


def same_bits(one: Tensor, other: Tensor) -> bool:
    raw = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and torch.equal(*raw)


def read_all(artifact: Path) -> None:
    """Read every shard through a buffer, as loading does."""
    buffer = memoryview(bytearray(16 * 2**20))
    for name in check_structure(artifact).shard_nbytes:
        with (artifact / name).open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def forget_cache(artifact: Path) -> None:
    """Let the kernel evict the shards from the page cache. This needs no privileges and only affects clean pages."""
    for name in check_structure(artifact).shard_nbytes:
        with (artifact / name).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(call: Callable[[], object], settings: Settings, prepare: Callable[[], None] = lambda: None) -> float:
    """Return the median time of a call in seconds, without the first call."""
    found = []
    for _ in range(4 if settings.quick else 8):
        prepare()
        started = now(settings.device)
        call()
        found.append(now(settings.device) - started)
    return statistics.median(found[1:])


def now(device: torch.device) -> float:
    """Wait until the device has finished all queued work, and return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def peak(device: torch.device) -> int:
    """Return the peak of allocated bytes on a GPU since `free_memory`, or 0 for a CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0


def free_memory(device: torch.device) -> None:
    """Free unused memory and reset the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
