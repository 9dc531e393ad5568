"""The steps of a tuning: Adam on scales and norms, held-out KL at every checkpoint, the best checkpoint kept.

WORK/tuning/checkpoint-40/   trained values and Adam's states; facts: history and held-out figures

A step depends only on the state and its number, so that a tuning resumed from a checkpoint gives the same bytes as an
uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from qformat.artifact.manifest import JsonObject
from qformat.errors import AdapterError, DivergenceError, Option, Words
from qformat.model.loaded_model import check_unchanged
from qformat.model.memory import peak_nbytes
from qformat.quality.output_head import SplitModel
from qformat.quality.teacher import Teacher
from qformat.quality.tuning.distillation import Closeness, Target, distil, measure
from qformat.quality.tuning.settings import TuningSettings
from qformat.quality.tuning.tunable import TunableModel
from qformat.quality.windows import TokenWindows
from qformat.training.checkpoints import SEAL_NAME, Checkpoint, CheckpointFolder, read_checkpoint, restoring

STATE_NAME = "tuning.safetensors"
BETAS = (0.9, 0.95)
_MOMENTS = ("exp_avg", "exp_avg_sq")

DIVERGED = 3.0
DIVERGED_NATS = 0.05
"""Training has diverged if the mean KL of the last steps exceeds this multiple of the initial held-out KL plus this."""

KEPT_NBYTES = 256 << 20
"""Memory limit in bytes for the targets of all held-out windows. Hidden states take 2 bytes per token and dimension."""

_RECENT = 5
"""Number of steps to average for detecting divergence."""


@dataclass(frozen=True, slots=True)
class StepLine:
    """Figures of one step.

    Attributes:
        step: Number of the step, from 1.
        kl: KL of its batch in nats per token.
        learning_rate: Learning rate of the step.
        tokens_per_s: Tokens per second.
        memory_nbytes: Peak memory in bytes so far.
    """

    step: int
    kl: float
    learning_rate: float
    tokens_per_s: float
    memory_nbytes: int


@dataclass(slots=True)
class History:
    """History of a tuning, stored with each checkpoint.

    Attributes:
        recent_kl: KL of the last steps.
        held_out: Mean held-out KL at each checkpoint, keyed by step.
    """

    recent_kl: list[float] = field(default_factory=list)
    held_out: dict[str, float] = field(default_factory=dict)

    def note(self, kl: float) -> None:
        """Add the KL of a step."""
        self.recent_kl = [*self.recent_kl, kl][-_RECENT:]

    @property
    def diverged(self) -> bool:
        """Whether the last steps are far worse than the beginning."""
        if len(self.recent_kl) < _RECENT:
            return False
        return sum(self.recent_kl) / _RECENT > DIVERGED * self.held_out["0"] + DIVERGED_NATS

    def best(self) -> int:
        """Return the step with the smallest held-out KL."""
        return min((kl, int(step)) for step, kl in self.held_out.items())[1]


class HeldOut:
    """Held-out windows and the 16-bit model's predictions for them, which are kept in memory if they are small."""

    def __init__(self, windows: TokenWindows, teacher: Teacher, batch_size: int, device: torch.device) -> None:
        self.device = device
        self._windows = windows
        self._teacher = teacher
        self._batch_size = batch_size
        self._kept: dict[int, Target] = {}

    def measure(self, student: SplitModel) -> Closeness:
        """Measure how close a model is to the 16-bit model on these windows."""
        parts = []
        for start in range(0, len(self._windows), self._batch_size):
            ids = _as_ids(self._windows.ids[start : start + self._batch_size], self.device)
            parts.append(measure(student, ids, self._target(start, ids)))
        return Closeness.join(parts)

    def _target(self, start: int, ids: Tensor) -> Target:
        target = self._kept.get(start)
        if target is None:
            target = self._teacher.target(self._windows.numbers[start : start + self._batch_size], ids)
            if target.nbytes * len(self._windows) <= KEPT_NBYTES * len(ids):
                self._kept[start] = target
        return target


def rows_of_step(step: int, n_windows: int, settings: TuningSettings) -> NDArray[np.int64]:
    """Return the windows that a step uses. Each pass over the text has its own random order.

    Args:
        step: Number of the step, from 0.
        n_windows: Number of windows to train on.
        settings: Options of the tuning.
    """
    places = np.arange(step * settings.batch_size, (step + 1) * settings.batch_size)
    orders = {
        int(turn): np.random.default_rng([settings.seed, int(turn)]).permutation(n_windows)
        for turn in set(places // n_windows)
    }
    return np.array([orders[int(place // n_windows)][place % n_windows] for place in places], np.int64)


def learning_rate(step: int, settings: TuningSettings) -> float:
    """Return the learning rate of a step: linear warm-up, then half a cosine down to zero.

    Args:
        step: Number of the step, from 0.
        settings: Options of the tuning.
    """
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    return settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


class TuningRun:
    """One tuning: the trained values, the optimizer, and the checkpoints.

    `measured` has the held-out figures of the checkpoints that this process wrote, keyed by step.
    """

    def __init__(
        self,
        tunable: TunableModel,
        student: SplitModel,
        teacher: Teacher,
        windows: TokenWindows,
        held_out: HeldOut,
        settings: TuningSettings,
        checkpoints: CheckpointFolder,
    ) -> None:
        self._tunable = tunable
        self._student = student
        self._teacher = teacher
        self._windows = windows
        self._held_out = held_out
        self._settings = settings
        self._checkpoints = checkpoints
        self._parameters = tunable.parameters()
        self._optimizer = torch.optim.Adam(
            self._parameters.values(), lr=settings.learning_rate, betas=BETAS, foreach=False, fused=True
        )
        self.history = History()
        self.measured: dict[int, Closeness] = {}

    def resume(self, on_damage: Callable[[AdapterError], None]) -> int:
        """Restore the last intact checkpoint, whose best checkpoint must be intact, too.

        Args:
            on_damage: Called with the error of each damaged checkpoint.

        Returns:
            The number of completed steps, 0 if there is no such checkpoint.
        """
        intact = {checkpoint.step: checkpoint for checkpoint in self._checkpoints.intact(on_damage)}
        for step, checkpoint in intact.items():
            if _history(checkpoint.facts).best() in intact:
                self._restore(checkpoint, with_optimizer=True)
                return step
        return 0

    def run(self, first: int, before: Closeness, on_step: Callable[[StepLine], None]) -> None:
        """Run the remaining steps.

        Args:
            first: Number of completed steps.
            before: Closeness of the artifact before tuning.
            on_step: Called with the figures of each step.

        Raises:
            DivergenceError: The training diverges. The message gives the step and the best checkpoint.
            TargetError: A checkpoint cannot be written.
        """
        settings, device = self._settings, self._held_out.device
        if first == 0:
            self._checkpoint(0, before)
        for step in range(first, settings.steps):
            started = time.monotonic()
            rate = learning_rate(step, settings)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            rows = rows_of_step(step, len(self._windows), settings)
            ids = _as_ids(self._windows.ids[rows], device)
            kl = distil(self._student, ids, self._teacher.target(self._windows.numbers[rows], ids))
            if not math.isfinite(kl) or not self._gradients_finite():
                raise self._stopped(step + 1, f"the KL of the step is {kl}, or its gradient is not finite")
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._tunable.limit()
            self.history.note(kl)
            if self.history.diverged:
                recent = sum(self.history.recent_kl) / len(self.history.recent_kl)
                raise self._stopped(step + 1, f"the KL diverges: {recent:.3g} nats per token over the last steps")
            speed = ids.numel() / max(time.monotonic() - started, 1e-9)
            on_step(StepLine(step + 1, kl, rate, speed, peak_nbytes(device)))
            if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
                self._checkpoint(step + 1, self._held_out.measure(self._student))

    def bring_back_best(self) -> tuple[int, Closeness]:
        """Restore the checkpoint with the smallest held-out KL, and return its step and closeness.

        Raises:
            AdapterError: It was damaged during this run.
        """
        best = self.history.best()
        try:
            checkpoint = read_checkpoint(self._checkpoints.folder(best))
        except AdapterError as damaged:
            raise AdapterError(f"{damaged}. Run the same command again: it repeats the steps that are lost") from None
        self._restore(checkpoint, with_optimizer=False)
        return best, self.measured.get(best) or self._held_out.measure(self._student)

    def _checkpoint(self, step: int, closeness: Closeness) -> None:
        kl = closeness.mean("kl")
        if not math.isfinite(kl):
            raise self._stopped(step, f"the KL on held-out windows is {kl}")
        check_unchanged(self._tunable.model)
        before = {max(map(int, self.history.held_out)), self.history.best()} if self.history.held_out else set()
        self.history.held_out[str(step)] = kl
        self.measured[step] = closeness
        states = {}
        for name, parameter in self._parameters.items():
            states[f"{name}.value"] = parameter.detach()
            for moment in _MOMENTS:
                state = self._optimizer.state.get(parameter)
                states[f"{name}.{moment}"] = torch.zeros_like(parameter) if not state else state[moment]
        facts: JsonObject = asdict(self.history)  # JSON preserves floats exactly
        with self._checkpoints.writing(step, facts) as folder:
            save_file({name: tensor.cpu().contiguous() for name, tensor in states.items()}, folder / STATE_NAME)
        self._checkpoints.keep_only({step, self.history.best()} | before)  # in case that this one gets damaged

    def _restore(self, checkpoint: Checkpoint, *, with_optimizer: bool) -> None:
        with torch.no_grad(), restoring(checkpoint.folder / STATE_NAME):
            states = load_file(checkpoint.folder / STATE_NAME)
            for name, parameter in self._parameters.items():
                parameter.copy_(states[f"{name}.value"])
                if with_optimizer and checkpoint.step:
                    moments = {moment: states[f"{name}.{moment}"].to(parameter.device) for moment in _MOMENTS}
                    self._optimizer.state[parameter] = {
                        "step": torch.tensor(float(checkpoint.step), device=parameter.device), **moments
                    }  # fmt: skip
        if with_optimizer:
            with restoring(checkpoint.folder / SEAL_NAME):
                self.history = _history(checkpoint.facts)

    def _gradients_finite(self) -> bool:
        # A sum over finite float32 gradients of this size cannot overflow in float64.
        total = sum(
            parameter.grad.double().abs().sum() for parameter in self._parameters.values() if parameter.grad is not None
        )
        return math.isfinite(float(total))

    def _stopped(self, step: int, what: str) -> DivergenceError:
        kept: Words = ("no checkpoint exists yet",)
        if self.history.held_out:
            best = self.history.best()
            kept = (
                f"the best checkpoint, after {best} steps with a held-out KL of "
                f"{self.history.held_out[str(best)]:.4f}, is kept in {self._checkpoints.output}; ",
                Option("use_best", True),
                " writes it",
            )
        restart = Option("restart", True)
        return DivergenceError(
            f"step {step}: {what}; ", *kept, ". Lower the learning rate (with ", restart, "), or check the data"
        )


def _history(facts: JsonObject) -> History:
    recent, held_out = facts["recent_kl"], facts["held_out"]
    assert isinstance(recent, list)
    assert isinstance(held_out, dict)
    return History(
        [float(kl) for kl in recent if isinstance(kl, (int, float))],
        {step: float(kl) for step, kl in held_out.items() if isinstance(kl, (int, float))},
    )


def _as_ids(rows: NDArray[np.int32], device: torch.device) -> Tensor:
    return torch.from_numpy(rows.astype(np.int64)).to(device)


def checkpoint_folder(work: Path) -> Path:
    """Return the directory for checkpoints in the work directory of an output."""
    return work / "tuning"
