"""What comes out of a training, for its caller and for the card of the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qformat.artifact.manifest import JsonObject


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What came out. metrics: the lines of metrics.jsonl. facts: what it was trained on, and how."""

    output: Path
    steps: int
    metrics: list[JsonObject]
    facts: JsonObject

    @property
    def loss_before(self) -> float | None:
        """The mean loss over the tokens of the evaluation data before the first step, in nats."""
        return self._held_out_loss("before")

    @property
    def loss_after(self) -> float | None:
        """The same after the last step."""
        return self._held_out_loss("after")

    def _held_out_loss(self, when: str) -> float | None:
        losses = [line.get("eval_loss") for line in self.metrics if line.get("when") == when]
        return losses[-1] if losses and isinstance(losses[-1], float) else None
