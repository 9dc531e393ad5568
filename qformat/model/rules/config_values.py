"""Checks values of config.json that transformers only meets when the model runs, after minutes of loading."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from qformat.errors import ArtifactError, Reason
from qformat.names import CONFIG_NAME

_PROBABILITIES = ("dropout", "pdrop", "layerdrop")
"""Ends of the names of fields that hold probabilities."""


def check_values(config: PretrainedConfig, path: Path) -> None:
    """Check that the probabilities in a model's config, and in those of its parts, lie between 0 and 1.

    Args:
        config: Config of the model.
        path: Directory of the model, for messages.

    Raises:
        ArtifactError: A value is not a probability.
    """
    for name, value in config.__dict__.items():
        if isinstance(value, PretrainedConfig):
            check_values(value, path)
        elif name.endswith(_PROBABILITIES) and isinstance(value, (int, float)) and not 0 <= value <= 1:
            raise ArtifactError(
                Reason.CONFIG_FIELD, path / CONFIG_NAME, f"is {value!r}, expected a number from 0 to 1", field=name
            )
