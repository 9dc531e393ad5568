"""The key-value pairs of a GGUF file, read with checks of type and range."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qformat.converters.sources.gguf.header import GgufArray, Scalar
from qformat.errors import Reason, SourceError


def shortest(value: float | np.float32) -> float:
    """Return the number with the fewest digits that is the same in float32."""
    return float(str(np.float32(value)))


class Metadata:
    """The key-value pairs of a file, with type checks. `prefix` is put before keys that lack a section."""

    def __init__(self, values: Mapping[str, Scalar | GgufArray], path: Path) -> None:
        self.prefix = ""
        self._values = values
        self._path = path

    def refuse(self, key: str, problem: str) -> SourceError:
        """Return the error about a key.

        Args:
            key: Key, without the prefix.
            problem: What is wrong with its value.
        """
        return SourceError(Reason.CONFIG_FIELD, self._path, problem, field=self._full(key))

    def text(self, key: str, *, default: str | None = None) -> str:
        """Return a string.

        Args:
            key: Key, without the prefix.
            default: Value if the key is missing, or None if it must be there.
        """
        value = self._values.get(self._full(key), default)
        if not isinstance(value, str):
            raise self.refuse(key, "is missing" if value is None else f"{value!r}, expected a string")
        return value

    def integer(self, key: str, smallest: int, largest: int, *, default: int | None = None) -> int:
        """Return an integer.

        Args:
            key: Key, without the prefix.
            smallest: Smallest value that is accepted.
            largest: Largest value that is accepted.
            default: Value if the key is missing, which may be outside the bounds, or None if it must be there.
        """
        value = self._values.get(self._full(key))
        if value is None and default is not None:
            return default
        if type(value) is not int or not smallest <= value <= largest:
            shown = "is missing" if value is None else f"{value!r}"
            raise self.refuse(key, f"{shown}, expected an integer from {smallest} to {largest}")
        return value

    def per_layer(self, key: str, n_layers: int, largest: int) -> tuple[int, ...]:
        """Return one integer for each layer. A single one in the file applies to all.

        Args:
            key: Key, without the prefix.
            n_layers: Number of layers.
            largest: Largest value that is accepted. The smallest is 0.
        """
        value = self._values.get(self._full(key))
        if type(value) is int and 0 <= value <= largest:
            return (value,) * n_layers
        values = value.values if isinstance(value, GgufArray) else None
        if values is None or len(values) != n_layers:
            raise self.refuse(key, f"expected an integer, or an array of {n_layers}")
        found = tuple(item for item in values if type(item) is int and 0 <= item <= largest)
        if len(found) != n_layers:
            raise self.refuse(key, f"expected {n_layers} integers from 0 to {largest}")
        return found

    def flags(self, key: str, n_layers: int) -> tuple[bool, ...]:
        """Return one boolean for each layer.

        Args:
            key: Key, without the prefix.
            n_layers: Number of layers.
        """
        value = self._values.get(self._full(key))
        values = value.values if isinstance(value, GgufArray) else None
        found = tuple(item for item in values or () if isinstance(item, bool))
        if values is None or len(found) != len(values) or len(found) != n_layers:
            raise self.refuse(key, f"expected an array of {n_layers} booleans")
        return found

    def number(self, key: str, *, default: float | None = None) -> float:
        """Return a positive finite number, rounded to the shortest decimal that gives the same float32.

        Args:
            key: Key, without the prefix.
            default: Value if the key is missing, or None if it must be there.
        """
        value = self._values.get(self._full(key), default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.refuse(key, "is missing" if value is None else f"{value!r}, expected a positive number")
        return shortest(value)

    def _full(self, key: str) -> str:
        return f"{self.prefix}.{key}" if self.prefix else key
