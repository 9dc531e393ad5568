"""Micro-batches that run out of memory at any allocation run again and give the same result."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qformat.errors import DeviceMemoryError
from qformat.model.load import load_model
from qformat.model.nf4_linear import NF4Linear
from qformat.training.adapter.lora_linear import NF4LoraLinear
from qformat.training.optimizer.page_layout import PAGE_GRAIN_NBYTES
from qformat.training.optimizer.paged_adamw import PagedAdamW
from qformat.training.paging_retry import run_with_paging_retry
from tests.training.optimizer.artificial_device import ArtificialDevice

PAGE = PAGE_GRAIN_NBYTES


class Memory(TorchDispatchMode):
    """Simulates the memory of a device. `budget_nbytes` must hold the pages and everything that torch allocates.

    `failing` is the number of an allocation, counted from 0, that fails regardless of the free memory.
    """

    def __init__(self, device: ArtificialDevice, *, budget_nbytes: int = 2**40, failing: int = -1) -> None:
        super().__init__()
        self.n_allocations = self.live_nbytes = self.peak_nbytes = 0
        self._device = device
        self._budget_nbytes = budget_nbytes
        self._failing = failing
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs)):  # exclude tensors that existed before
            if isinstance(leaf, Tensor):
                self._known.add(leaf.untyped_storage())
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage() not in self._known:
                self._allocated(leaf.untyped_storage())
        return out

    def _allocated(self, storage: Any) -> None:
        number, self.n_allocations = self.n_allocations, self.n_allocations + 1
        nbytes = storage.nbytes()
        if number == self._failing or self.live_nbytes + nbytes + self._device.used_nbytes > self._budget_nbytes:
            raise torch.OutOfMemoryError(f"allocation {number} of {nbytes} bytes")
        self._known.add(storage)
        self.live_nbytes += nbytes
        self.peak_nbytes = max(self.peak_nbytes, self.live_nbytes)
        weakref.finalize(storage, self._freed, nbytes)

    def _freed(self, nbytes: int) -> None:
        self.live_nbytes -= nbytes


class Setting:
    """A model with adapters and dropout, its optimizer after a step, and the gradients of a first micro-batch."""

    def __init__(self, artifact: Path, *, checkpointing: bool) -> None:
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM")
        config._register_custom_module({NF4Linear: NF4LoraLinear})
        self.model: Any = get_peft_model(load_model(artifact, device="cpu"), config).train()
        if checkpointing:
            self.model.enable_input_require_grads()
            self.model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.device = ArtificialDevice()
        self.optimizer = PagedAdamW(self.trained, page_nbytes=PAGE, device=self.device)
        self.micro_batch()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.micro_batch()
        self._gradients = [None if p.grad is None else p.grad.clone() for p in self.trained]
        self._random_state = torch.get_rng_state()

    def rewind(self) -> None:
        """Restore gradients and random state. Parameters and optimizer states have not changed."""
        for parameter, gradient in zip(self.trained, self._gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        torch.set_rng_state(self._random_state)

    def micro_batch(self) -> Tensor:
        tokens = torch.arange(40).reshape(2, 20)
        loss: Tensor = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def outcome(self, memory: Memory) -> tuple[list[bytes], bytes]:
        """Return the gradients after another micro-batch in `memory`, and the state of the random generator."""

        def in_memory() -> Tensor:
            with memory:
                return self.micro_batch()

        run_with_paging_retry(self.optimizer, in_memory)
        return [as_bytes(p.grad) for p in self.trained if p.grad is not None], as_bytes(torch.get_rng_state())


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("every", [89, pytest.param(1, marks=pytest.mark.slow)])
def test_gradients_and_random_state_are_the_same_whichever_allocation_fails(
    artifact: Path, checkpointing: bool, every: int
) -> None:
    setting = Setting(artifact, checkpointing=checkpointing)
    undisturbed = Memory(setting.device)
    expected = setting.outcome(undisturbed)
    assert undisturbed.n_allocations > 200
    for failing in range(0, undisturbed.n_allocations, every):
        setting.rewind()
        memory = Memory(setting.device, failing=failing)
        assert setting.outcome(memory) == expected, failing
        assert memory.n_allocations == failing + 1 + undisturbed.n_allocations
        assert setting.optimizer.paging_statistics().resident == 0


def test_a_device_too_small_for_the_states_runs_without_them(artifact: Path) -> None:
    setting = Setting(artifact, checkpointing=False)
    states_nbytes = setting.device.used_nbytes
    undisturbed = Memory(setting.device)
    expected = setting.outcome(undisturbed)
    assert states_nbytes > PAGE
    setting.rewind()
    tight = Memory(setting.device, budget_nbytes=undisturbed.peak_nbytes + states_nbytes - 1)
    assert setting.outcome(tight) == expected
    assert (setting.device.used_nbytes, setting.device.n_caches_emptied) == (0, 1)
    setting.optimizer.step()  # brings the states back to the device
    assert setting.device.used_nbytes == states_nbytes


def test_a_device_too_small_even_without_the_states_raises(artifact: Path) -> None:
    setting = Setting(artifact, checkpointing=False)
    before = [as_bytes(p.grad) for p in setting.trained if p.grad is not None]
    with pytest.raises(DeviceMemoryError, match="Lower the batch size or the sequence length"):
        setting.outcome(Memory(setting.device, budget_nbytes=10_000))
    assert [as_bytes(p.grad) for p in setting.trained if p.grad is not None] == before


def _micro_batch(model: nn.Module, x: Tensor, failures: list[bool]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        if failures and failures.pop():
            raise torch.OutOfMemoryError("says the test")
        return loss.detach()

    return run


@pytest.mark.parametrize("accumulated", [False, True])
def test_a_retried_micro_batch_gives_the_same_gradients(accumulated: bool) -> None:
    gradients = []
    for failures in ([], [True]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4))
        device = ArtificialDevice()
        optimizer = PagedAdamW(model.parameters(), page_nbytes=PAGE, device=device)
        _micro_batch(model, torch.ones(4, 8), [])()
        optimizer.step()
        if not accumulated:
            optimizer.zero_grad()
        was_there = dict(model.named_parameters())["0.weight"].grad
        run_with_paging_retry(optimizer, _micro_batch(model, torch.randn(4, 8), failures))
        gradients.append([as_bytes(p.grad) for p in model.parameters() if p.grad is not None])
        if accumulated:
            assert dict(model.named_parameters())["0.weight"].grad is was_there
        assert device.n_caches_emptied == (optimizer.paging_statistics().resident == 0)
    assert gradients[0] == gradients[1]


def test_running_out_of_memory_twice_raises_an_error_that_says_what_to_lower() -> None:
    model = nn.Linear(8, 4)
    optimizer = PagedAdamW(model.parameters(), page_nbytes=PAGE)
    with pytest.raises(DeviceMemoryError, match="Lower the batch size or the sequence length"):
        run_with_paging_retry(optimizer, _micro_batch(model, torch.ones(2, 8), [True, True]))
    assert all(param.grad is None for param in model.parameters())
