"""What a user may choose about a calibrated conversion. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qformat.errors import UsageError

DEFAULT_TOKENS = 16_384
"""32 windows of 512: some ten rows of input for each column of a small model's widest layer."""

WINDOW_LENGTH = 512
"""Tokens of a window, less where the model takes no more."""

SEED = 0
"""Of the choice of windows."""


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """data: text, or rows as for training; one file, a folder, or several. tokens: of it, at most, in whole windows."""

    data: Path | str | Sequence[Path | str]
    tokens: int = DEFAULT_TOKENS

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UsageError(f"{self.tokens} calibration tokens: at least one window is needed")
