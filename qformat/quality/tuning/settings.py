"""Options of a tuning."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from qformat.artifact.manifest import JsonObject
from qformat.errors import Option, UsageError

FREE = ("device", "gradient_checkpointing", "save_every", "trust_remote_code")
"""Settings that may change when a tuning is resumed. The manifest does not record them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningSettings:
    """Options of a tuning. The defaults were measured on SmolLM2-135M. An invalid value raises UsageError.

    Attributes:
        steps: Number of optimizer steps.
        learning_rate: Peak learning rate, for relative changes of scales and for norms.
        warmup_steps: Number of steps with a linearly increasing learning rate.
        batch_size: Number of windows per step.
        seq_len: Number of tokens per window.
        held_out: Number of windows set aside for measuring.
        seed: Seed of the order of windows.
        top_k: Number of log-probabilities per position in a cached teacher.
        device: Device to run on. None chooses one.
        gradient_checkpointing: Whether to recompute activations in backward to save memory.
        save_every: Number of steps between checkpoints.
        trust_remote_code: Whether to run model code from the directories.
    """

    steps: int = 160
    learning_rate: float = 2e-3
    warmup_steps: int = 5
    batch_size: int = 2
    seq_len: int = 512
    held_out: int = 16
    seed: int = 0
    top_k: int = 64
    device: str | None = None
    gradient_checkpointing: bool = False
    save_every: int = 40
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        least = {"steps": 1, "warmup_steps": 0, "batch_size": 1, "seq_len": 2, "held_out": 1, "seed": 0, "top_k": 1,
                 "save_every": 1}  # fmt: skip
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise UsageError(Option(name), f": {getattr(self, name)}, expected at least {lowest}")
        if not 0 < self.learning_rate < float("inf"):
            raise UsageError(Option("learning_rate"), f": {self.learning_rate}, expected a finite number above 0")

    def binding(self) -> JsonObject:
        """Return the settings that the result depends on."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}
