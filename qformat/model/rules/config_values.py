"""Checks values of config.json that transformers only meets when the model runs, after minutes of loading."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from qformat.errors import ArtifactError, Reason
from qformat.names import CONFIG_NAME

_PROBABILITIES = ("dropout", "pdrop", "layerdrop")
"""Ends of the names of fields that hold probabilities."""

_COUNTS = {"num_hidden_layers", "num_layers", "n_layer", "n_layers"}
"""Fields that hold numbers of layers. A list of layers is empty for a negative number."""


def check_values(config: PretrainedConfig, path: Path) -> None:
    """Check the probabilities and the numbers of layers in a model's config, and in those of its parts.

    Args:
        config: Config of the model.
        path: Directory of the model, for messages.

    Raises:
        ArtifactError: A value is not a probability, or negative.
    """
    for name, value in config.__dict__.items():
        if isinstance(value, PretrainedConfig):
            check_values(value, path)
        elif name.endswith(_PROBABILITIES) and isinstance(value, (int, float)) and not 0 <= value <= 1:
            raise _error(path, name, value, "a number from 0 to 1")
        elif name in _COUNTS and isinstance(value, int) and value < 0:
            raise _error(path, name, value, "a number that is not negative")


def _error(path: Path, name: str, value: object, expected: str) -> ArtifactError:
    return ArtifactError(Reason.CONFIG_FIELD, path / CONFIG_NAME, f"is {value!r}, expected {expected}", field=name)
