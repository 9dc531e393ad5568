"""Plans the device memory of a training from headers, config.json and settings, before anything is loaded.

    static       weights, adapters, optimizer states that stay on the device
    changing     activations saved for backward, temporary memory of the loss and of a layer, gradients

The changing part is measured by running the model on fake tensors (`trace`). Optimizer states are laid out in pages as
in `PagedAdamW`. Fragmentation and the memory of CUDA itself are not planned; a reserve is left free for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qformat.artifact.components import Component
from qformat.errors import UsageError
from qformat.model.nf4_linear import NF4Linear
from qformat.training.memory_plan.loss import Loss
from qformat.training.memory_plan.meter import Segment
from qformat.training.memory_plan.search import largest
from qformat.training.memory_plan.tensors import Conversion, ModelTensors, read_model_tensors
from qformat.training.memory_plan.trace import FakeTraining
from qformat.training.optimizer.eight_bit_update import MIN_BLOCK_STATES_SIZE, EightBitUpdate
from qformat.training.optimizer.page_device import CUDA_RESERVE_NBYTES
from qformat.training.optimizer.page_layout import PageLayout, page_nbytes_near
from qformat.training.optimizer.page_store import RING_PAGES
from qformat.training.optimizer.paged_adamw import PAGE_NBYTES
from qformat.training.optimizer.state_formats import BlockStates, FloatStates
from qformat.training.settings import TrainingSettings, page_budget_nbytes

MAX_BATCH_SIZE = 4096
MAX_SEQ_LEN = 2**20
SEQ_LEN_STEP = 64
"""Search limits of `largest_batch` and `largest_sequence`, and the step of the latter."""

_LINEAR_FROM = 8192
"""Number of tokens beyond which memory grows linearly, except for masks, because the loss has its largest tile."""


@dataclass(frozen=True, slots=True)
class StatesPlan:
    """Bytes of the optimizer states.

    Attributes:
        total: Bytes of all states.
        on_device: Bytes that stay on the device between steps.
        step: Additional bytes on the device during a step.
    """

    total: int
    on_device: int
    step: int

    @property
    def saved(self) -> int:
        """Bytes that paging keeps off the device."""
        return self.total - self.on_device


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Device memory that a training needs, in bytes.

    Attributes:
        batch_size: Rows of a micro-batch.
        seq_len: Tokens of a row.
        packed: Packed codes of the 4-bit weights.
        constants: Scales and codebooks of the 4-bit weights.
        kept: All other weights.
        adapters: Weights of the adapters.
        gradients: Gradients of the adapters.
        states: Optimizer states.
        activations: Activations saved for backward, at the end of the forward pass.
        loss: Largest temporary memory of the loss.
        layer: Largest temporary memory of a layer in backward: recomputed activations, gradients, decoded weights.
        decoded: The largest weight decoded to bf16, included in `layer`.
        forward: Peak of the forward pass, everything included.
        loss_peak: Peak of the loss, everything included.
        backward: Peak of the backward pass, everything included.
        step_peak: Peak of the optimizer step, everything included.
        device: Memory of the device, or None if unknown.
    """

    batch_size: int
    seq_len: int
    packed: int
    constants: int
    kept: int
    adapters: int
    gradients: int
    states: StatesPlan
    activations: int
    loss: int
    layer: int
    decoded: int
    forward: int
    loss_peak: int
    backward: int
    step_peak: int
    device: int | None = None

    @property
    def weights(self) -> int:
        """Bytes of the base model."""
        return self.packed + self.constants + self.kept

    @property
    def peak(self) -> int:
        """Peak of the whole training in bytes."""
        return max(self.forward, self.loss_peak, self.backward, self.step_peak)

    @property
    def fits(self) -> bool | None:
        """Whether the device is large enough, with `CUDA_RESERVE_NBYTES` left free. None if its size is unknown."""
        return None if self.device is None else self.peak + CUDA_RESERVE_NBYTES <= self.device


class MemoryPlanner:
    """Plans the memory of one model under one set of settings, for any batch size and sequence length."""

    def __init__(
        self,
        tensors: ModelTensors,
        settings: TrainingSettings,
        *,
        loss: Loss = "tiled",
        trust_remote_code: bool = False,
    ) -> None:
        """Build the model on fake tensors.

        Args:
            tensors: Tensors of the model.
            settings: Settings of the training.
            loss: "tiled" for the loss that `train` uses, "logits" for that of transformers.
            trust_remote_code: Whether to run model code that comes with the artifact.

        Raises:
            ArtifactError: The tensors and config.json do not fit together.
            UsageError: The settings do not fit the model.
        """
        self._settings = settings
        self._loss: Loss = loss
        self._training = FakeTraining(tensors, settings, trust_remote_code=trust_remote_code)
        parts = [(part, new.nbytes) for found in tensors.packed.values() for part, new in found.items()]
        self._packed = sum(nbytes for part, nbytes in parts if part is Component.PACKED)
        self._constants = sum(nbytes for part, nbytes in parts if part is not Component.PACKED)
        self._kept = self._kept_nbytes(tensors)
        self._decoded = max((2 * m.in_features * m.out_features for m in self._packed_layers()), default=0)
        self._trained: list[Tensor] = [p for p in self._training.model.parameters() if p.requires_grad]
        self._adapters = sum(p.nbytes for p in self._trained)
        self._segments: dict[tuple[int, int], list[Segment]] = {}

    def plan(
        self, *, batch_size: int | None = None, seq_len: int | None = None, device_nbytes: int | None = None
    ) -> MemoryPlan:
        """Return the plan for a batch size and a sequence length.

        Args:
            batch_size: Rows of a micro-batch. Defaults to the settings.
            seq_len: Tokens of a row. Defaults to the settings.
            device_nbytes: Memory of the device in bytes, or None if unknown.

        Returns:
            The plan.

        Raises:
            UsageError: The sizes are too small, or the model cannot be run on fake tensors.
        """
        batch_size, seq_len = batch_size or self._settings.batch_size, seq_len or self._settings.seq_len
        segments = self._run(batch_size, seq_len)
        gradients = sum(p.nbytes for p in self._trained)
        static = self._packed + self._constants + self._kept + self._adapters
        accumulated = gradients if self._settings.grad_accum > 1 else 0
        live = static + accumulated
        peaks: dict[str, int] = dict.fromkeys(("embedding", "forward", "loss", "backward"), live)
        beside: dict[str, int] = dict.fromkeys(peaks, 0)
        activations = 0
        for segment in segments:
            if segment.phase in {"embedding", "forward"}:
                activations += segment.delta
            peaks[segment.phase] = max(peaks[segment.phase], live + segment.peak)
            beside[segment.phase] = max(beside[segment.phase], segment.peak)
            live += segment.delta
        states = self._states(max(peaks.values()), static + gradients, device_nbytes)
        return MemoryPlan(
            batch_size=batch_size,
            seq_len=seq_len,
            packed=self._packed,
            constants=self._constants,
            kept=self._kept,
            adapters=self._adapters,
            gradients=gradients,
            states=states,
            activations=activations,
            loss=beside["loss"],
            layer=beside["backward"],
            decoded=self._decoded,
            forward=max(peaks["embedding"], peaks["forward"]) + states.on_device,
            loss_peak=peaks["loss"] + states.on_device,
            backward=peaks["backward"] + states.on_device,
            step_peak=static + gradients + states.on_device + states.step,
            device=device_nbytes,
        )

    def largest_batch(self, device_nbytes: int, *, seq_len: int | None = None) -> int:
        """Return the largest number of rows in a micro-batch that fits, or 0 if none does.

        Args:
            device_nbytes: Memory of the device in bytes.
            seq_len: Tokens of a row. Defaults to the settings.

        Raises:
            UsageError: The model cannot be run on fake tensors.
        """

        def room(rows: int) -> int:
            return self._room(self.plan(batch_size=rows, seq_len=seq_len, device_nbytes=device_nbytes))

        return largest(room, MAX_BATCH_SIZE, start=-(-_LINEAR_FROM // (seq_len or self._settings.seq_len)))

    def largest_sequence(self, device_nbytes: int, *, batch_size: int | None = None) -> int:
        """Return the largest number of tokens in a row that fits, a multiple of 64, or 0 if none does.

        Args:
            device_nbytes: Memory of the device in bytes.
            batch_size: Rows of a micro-batch. Defaults to the settings.

        Raises:
            UsageError: The model cannot be run on fake tensors.
        """

        def room(steps: int) -> int:
            plan = self.plan(batch_size=batch_size, seq_len=steps * SEQ_LEN_STEP, device_nbytes=device_nbytes)
            return self._room(plan)

        start = -(-_LINEAR_FROM // ((batch_size or self._settings.batch_size) * SEQ_LEN_STEP))
        return SEQ_LEN_STEP * largest(room, MAX_SEQ_LEN // SEQ_LEN_STEP, start=start)

    def _room(self, plan: MemoryPlan) -> int:
        """Return the bytes left free when the states are paged out as far as possible. Negative if it does not fit."""
        assert plan.device is not None
        movable = plan.states.on_device if self._settings.page_budget == "auto" and self._is_paged else 0
        room = plan.device - CUDA_RESERVE_NBYTES - (plan.peak - movable)
        return room if plan.fits else min(room, -1)

    @property
    def _is_paged(self) -> bool:
        return self._settings.optim != "adamw"

    def _run(self, batch_size: int, seq_len: int) -> list[Segment]:
        if batch_size < 1 or seq_len < 2:
            raise UsageError(f"batch size {batch_size}, sequence length {seq_len}: expected at least 1 row of 2 tokens")
        key = (batch_size, seq_len)
        if key not in self._segments:
            self._segments[key] = self._training.micro_batch(
                self._settings, batch_size=batch_size, seq_len=seq_len, loss=self._loss
            )
        return self._segments[key]

    def _packed_layers(self) -> list[NF4Linear]:
        return [module for module in self._training.model.modules() if isinstance(module, NF4Linear)]

    def _kept_nbytes(self, tensors: ModelTensors) -> int:
        """Return the bytes of all weights and buffers besides the packed ones.

        Loading keeps the shards in memory and adds a bf16 copy of each kept tensor that has another dtype.
        """
        kept = tensors.kept.values()
        nbytes: int = sum(new.nbytes for new in kept)
        nbytes += sum(2 * math.prod(new.shape) for new in kept if new.dtype in {"F16", "F32"})
        base = self._training.base
        in_files = base.state_dict().keys()
        others = [(name, module) for name, module in base.named_modules() if not isinstance(module, NF4Linear)]
        computed = {
            f"{name}.{key}": buffer
            for name, module in others
            for key, buffer in module._buffers.items()
            if buffer is not None
        }
        nbytes += sum(buffer.nbytes for name, buffer in computed.items() if name not in in_files)
        if self._training.decodes_output:
            nbytes += int(base.get_output_embeddings().weight.nbytes)  # type: ignore[no-untyped-call]
        return nbytes

    def _states(self, moving_peak: int, at_step: int, device_nbytes: int | None) -> StatesPlan:
        """Return the plan of the states, given the bytes of everything else at the peak and during a step."""
        if not self._is_paged:
            total = sum(2 * p.nbytes for p in self._trained)
            return StatesPlan(total, total, 0)
        eight_bit = self._settings.optim == "paged_adamw_8bit"
        page_nbytes = page_nbytes_near(PAGE_NBYTES)
        layout = PageLayout(page_nbytes)
        formats = [_state_format(p, eight_bit) for p in self._trained]
        layout.place([(p.numel(), f.unit_size, f.unit_nbytes) for p, f in zip(self._trained, formats, strict=True)])
        workspace = EightBitUpdate().workspace_nbytes(set()) if eight_bit else 0
        budget = page_budget_nbytes(self._settings.page_budget)
        if budget is None and device_nbytes is not None:
            ring = min(RING_PAGES, layout.n_pages) * page_nbytes
            budget = max(0, device_nbytes - CUDA_RESERVE_NBYTES - max(moving_peak, at_step + ring + workspace))
        resident = layout.n_pages if budget is None else min(layout.n_pages, budget // page_nbytes)
        ring = min(RING_PAGES, layout.n_pages - resident) * page_nbytes
        return StatesPlan(layout.n_pages * page_nbytes, resident * page_nbytes, ring + workspace)


def plan_memory(
    source: Path | str,
    settings: TrainingSettings,
    *,
    device_nbytes: int | None = None,
    conversion: Conversion | None = None,
    revision: str | None = None,
    loss: Loss = "tiled",
    trust_remote_code: bool = False,
) -> MemoryPlan:
    """Plan the memory of a training.

    Args:
        source: Folder, or id of a repository on the Hub (see `read_model_tensors`).
        settings: Settings of the training.
        device_nbytes: Memory of the device in bytes, or None if unknown.
        conversion: Decides which weights of a 16-bit checkpoint a conversion would pack.
        revision: Revision of the repository, or None for the default.
        loss: "tiled" for the loss that `train` uses, "logits" for that of transformers.
        trust_remote_code: Whether to run model code that comes with the model.

    Returns:
        The plan.

    Raises:
        ArtifactError: A file of the artifact is damaged, or the tensors and config.json do not fit together.
        SourceError: A file of the checkpoint is damaged or not supported.
        UsageError: The source does not exist, or the settings do not fit the model.
    """
    tensors = read_model_tensors(source, conversion=conversion, revision=revision)
    planner = MemoryPlanner(tensors, settings, loss=loss, trust_remote_code=trust_remote_code)
    return planner.plan(device_nbytes=device_nbytes)


def _state_format(param: Tensor, eight_bit: bool) -> FloatStates | BlockStates:
    """Return the format that `PagedAdamW` chooses for a parameter."""
    if not eight_bit:
        return FloatStates(param.dtype)
    return BlockStates() if param.numel() >= MIN_BLOCK_STATES_SIZE else FloatStates(torch.float32)
