"""What a user can choose about a tuning."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from qformat.artifact.manifest import JsonObject
from qformat.errors import Option, UsageError

FREE = ("device", "gradient_checkpointing", "save_every", "trust_remote_code")
"""May differ when a tuning is continued, and are not told in the manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningSettings:
    """How to tune. Raises UsageError for a value that makes no sense.

    learning_rate: at the end of the warm-up, for relative changes of scales and for norms alike. held_out: windows that
    are set aside to tell whether it got better. top_k: of a cached teacher. The defaults were measured on SmolLM2-135M.
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
        """Return the settings on which the result depends."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}
