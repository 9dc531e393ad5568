"""Reports the progress of a training: one JSON line per log in `metrics.jsonl`, and calls to a listener."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qformat import strict_json
from qformat.artifact.manifest import JsonObject
from qformat.artifact.writing.disk import Disk
from qformat.errors import ArtifactError, TargetError
from qformat.model.memory import peak_nbytes
from qformat.named_files import open_named
from qformat.training.optimizer.paged_adamw import PagedAdamW

METRICS_NAME = "metrics.jsonl"

_MAX_LINE_NBYTES = 2**20


class Listener(Protocol):
    """A function that receives every line of metrics."""

    def __call__(self, line: JsonObject, n_steps: int) -> None:
        """Receive a line as it is in the file, and the number of steps of the whole training."""


class MetricsFile:
    """A file of JSON lines, each written immediately.

    A resumed training removes the lines that were written after its checkpoint.

    Args:
        path: Path of the file.
        disk: Performs the file operations.
    """

    def __init__(self, path: Path, disk: Disk | None = None) -> None:
        self._path = path
        self._disk = disk or Disk()

    def append(self, line: JsonObject) -> None:
        """Append a line.

        Raises:
            TargetError: The file cannot be written.
        """
        descriptor = self._disk.open_for_writing(self._path, append=True)
        try:
            self._disk.append(descriptor, strict_json.dumps(line).encode() + b"\n", self._path)
        finally:
            os.close(descriptor)

    def read(self) -> list[JsonObject]:
        """Return the lines, leaving out a line that a crash cut short."""
        if not self._path.exists():
            return []
        lines: list[JsonObject] = []
        try:
            with open_named(self._path) as file:
                while text := file.readline(_MAX_LINE_NBYTES):
                    try:
                        line = strict_json.loads(
                            text, path=self._path, max_nbytes=_MAX_LINE_NBYTES, error=ArtifactError
                        )
                    except ArtifactError:
                        continue
                    if isinstance(line, dict) and isinstance(line.get("step"), int):
                        lines.append(line)
        except OSError as problem:
            raise TargetError(f"{self._path}: cannot be read: {problem.strerror}. Remove it") from None
        return lines

    def forget_all(self) -> None:
        """Remove all lines, those of a training that ended before its first checkpoint."""
        self._disk.remove_file(self._path)

    def forget_after(self, step: int) -> None:
        """Remove the lines of later steps, and the final evaluation of a finished training."""
        kept = [line for line in self.read() if line["step"] <= step and line.get("when") != "after"]  # type: ignore[operator]
        text = "".join(strict_json.dumps(line) + "\n" for line in kept)
        self._disk.replace_file(self._path, text.encode())


class MetricsCallback(TrainerCallback):
    """Writes each log of the Trainer to the metrics file and passes it to the listener.

    The values of a line cover the steps since the previous line. `memory_nbytes` is the peak so far, and `paging` holds
    `PagingStatistics`. `when` marks an evaluation "before" or "after" the training.

    Args:
        file: File that receives the lines.
        listener: Function that receives the lines.
        optimizer: Optimizer, asked for its paging statistics.
    """

    def __init__(self, file: MetricsFile, listener: Listener, optimizer: torch.optim.Optimizer) -> None:
        self._file = file
        self._listener = listener
        self._optimizer = optimizer
        self._started = self._last = time.monotonic()
        self._last_tokens = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock.

        Args:
            args: Arguments of the Trainer.
            state: Progress of the training.
            control: Control flags of the Trainer.
            **kwargs: Other values that the Trainer passes.
        """
        self._started = self._last = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a line for a log that has a loss. The final summary of the Trainer has none and is left out.

        Args:
            args: Arguments of the Trainer.
            state: Progress of the training.
            control: Control flags of the Trainer.
            logs: Logged values by name.
            **kwargs: Other values that the Trainer passes.
        """
        logs = logs or {}
        if "loss" not in logs and "eval_loss" not in logs:
            return
        now = time.monotonic()
        line: JsonObject = {"step": state.global_step, "epoch": state.epoch}
        for name in ("loss", "learning_rate", "grad_norm", "mean_token_accuracy", "eval_loss", "eval_perplexity"):
            if name in logs:
                line[name] = float(logs[name])
        if "loss" in logs:
            tokens = logs.get("num_tokens", 0.0)
            line["tokens"] = int(tokens)
            line["tokens_per_s"] = max(0.0, tokens - self._last_tokens) / max(now - self._last, 1e-9)
            self._last_tokens = tokens
            if isinstance(self._optimizer, PagedAdamW):
                line["paging"] = asdict(self._optimizer.paging_statistics())
        elif state.global_step in {0, state.max_steps}:
            line["when"] = "after" if state.global_step else "before"
        self._last = now
        line["seconds"] = now - self._started
        line["memory_nbytes"] = peak_nbytes(args.device)
        self._file.append(line)
        self._listener(line, state.max_steps)
