"""The result of a training, for its caller and for the adapter's card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qformat.artifact.manifest import JsonObject


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The result of a training.

    Attributes:
        output: Directory that holds the adapter.
        steps: Number of optimizer steps.
        metrics: Lines of metrics.jsonl.
        facts: Base model, data, settings and statistics of the training.
    """

    output: Path
    steps: int
    metrics: list[JsonObject]
    facts: JsonObject

    @property
    def loss_before(self) -> float | None:
        """Mean loss over the tokens of the evaluation data before the first step, in nats per token."""
        return self._held_out_loss("before")

    @property
    def loss_after(self) -> float | None:
        """Mean loss over the tokens of the evaluation data after the last step, in nats per token."""
        return self._held_out_loss("after")

    def _held_out_loss(self, when: str) -> float | None:
        losses = [line.get("eval_loss") for line in self.metrics if line.get("when") == when]
        return losses[-1] if losses and isinstance(losses[-1], float) else None
