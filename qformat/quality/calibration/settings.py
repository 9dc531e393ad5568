"""Options of a calibrated conversion. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qformat.errors import UsageError

DEFAULT_TOKENS = 16_384
"""32 windows of 512 tokens: about ten rows of input for each column of a small model's widest layer."""

WINDOW_LENGTH = 512
"""Number of tokens per window, or the model's context length if that is shorter."""

SEED = 0
"""Seed of the random choice of windows."""


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """Options of a calibrated conversion.

    Attributes:
        data: Text, or rows as for training: a file, a directory, or several of them.
        tokens: Largest number of tokens to use, in whole windows.
    """

    data: Path | str | Sequence[Path | str]
    tokens: int = DEFAULT_TOKENS

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UsageError(f"{self.tokens} calibration tokens: expected at least 1")
