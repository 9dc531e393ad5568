"""The scaling of rotary positions in a GGUF file, as transformers describes it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from qformat.artifact.manifest import JsonObject
from qformat.converters.sources.gguf.architectures import LONG_FACTORS_NAME, ROPE_FACTORS_NAME, SHORT_FACTORS_NAME
from qformat.converters.sources.gguf.metadata import Metadata, shortest

ReadVector = Callable[[str], NDArray[np.float32] | None]
"""Returns the values of a short vector in the file, or None if the file does not have it."""


def rope_scaling(
    metadata: Metadata, context: int, theta: float, n_rotated: int, read_vector: ReadVector
) -> JsonObject | None:
    """Return `rope_scaling` of config.json, or None.

    Args:
        metadata: Metadata of the file.
        context: Largest number of positions.
        theta: Base of the frequencies.
        n_rotated: Number of rotated dimensions of a head.
        read_vector: Reads a vector of the file.

    Raises:
        SourceError: The scaling cannot be converted.
    """
    if (long := read_vector(LONG_FACTORS_NAME)) is not None:
        return _longrope(metadata, long, read_vector(SHORT_FACTORS_NAME), n_rotated)
    if (factors := read_vector(ROPE_FACTORS_NAME)) is not None and (factors != 1).any():
        return _llama3_scaling(metadata, theta, n_rotated, factors)
    kind = metadata.text("rope.scaling.type", default="none")
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": metadata.number("rope.scaling.factor")}
    if kind == "yarn":
        original = metadata.integer("rope.scaling.original_context_length", 1, 2**31, default=context)
        factor = metadata.number("rope.scaling.factor")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise metadata.refuse("rope.scaling.type", f"{kind!r}, expected none, linear or yarn")


def _longrope(
    metadata: Metadata, long: NDArray[np.float32], short: NDArray[np.float32] | None, n_rotated: int
) -> JsonObject:
    """Return the scaling of Phi-3 and 4, whose factors for short and long texts the file contains."""
    for name, factors in ((LONG_FACTORS_NAME, long), (SHORT_FACTORS_NAME, short)):
        if factors is None or factors.size != n_rotated // 2:
            found = "is missing" if factors is None else f"has {factors.size} factors"
            raise metadata.refuse(name, f"{found}, expected {n_rotated // 2} factors")
    assert short is not None
    return {
        "rope_type": "longrope",
        "short_factor": [shortest(value) for value in short],
        "long_factor": [shortest(value) for value in long],
    }


def _llama3_scaling(metadata: Metadata, theta: float, head: int, factors: NDArray[np.float32]) -> JsonObject:
    """Return the scaling of Llama 3.1 to 3.3, whose factors the file contains. Other factors are rejected."""
    low, high, original = 1.0, 4.0, 8192
    factor = float(factors.max())
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head, 2) / head)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if factors.shape != smooth.shape or not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise metadata.refuse(ROPE_FACTORS_NAME, "has factors other than those of Llama 3, which cannot be converted")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
