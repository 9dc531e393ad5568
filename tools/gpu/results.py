"""Settings and results of the checks of `tools.gpu.check`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

SHAPES = [(576, 576), (1536, 576), (4864, 896), (2048, 2048), (4096, 4096), (14336, 4096), (4096, 14336)]
"""Shapes of linear layers in SmolLM2-135M, Qwen2.5-0.5B and Llama 3.1 8B, and one in between."""


@dataclass(frozen=True, slots=True)
class Result:
    """One figure. `passed` is None for a measurement that cannot fail."""

    check: str
    case: str
    metric: str
    value: float
    unit: str
    passed: bool | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of all checks.

    Attributes:
        device: Device to check.
        quick: Whether to use few shapes and repeats, only to see that everything works.
        artifact: Artifact for checks of models.
    """

    device: torch.device
    quick: bool = False
    artifact: Path | None = None

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return SHAPES[1::3] if self.quick else SHAPES

    @property
    def repeats(self) -> int:
        return 5 if self.quick else 30

    @property
    def model(self) -> Path:
        """The artifact. Raises ValueError if there is none."""
        if self.artifact is None:
            raise ValueError("checks of models need an artifact")
        return self.artifact
