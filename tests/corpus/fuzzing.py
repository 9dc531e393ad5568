"""Fuzz targets: a property that holds for every input, in a short run for CI and in a long one for the slow tests.

Structure-aware inputs come from generators that take a `random.Random`. Hypothesis can play its part, records what they
draw and reduces a failure to a small one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

RANDOM = st.randoms(use_true_random=False)


def lengths(short: int, long: int) -> pytest.MarkDecorator:
    """Return a parametrization of `n_examples` with a short and a long run.

    Args:
        short: Number of examples in CI.
        long: Number of examples in the slow tests.
    """
    slow = pytest.param(long, marks=pytest.mark.slow)
    return pytest.mark.parametrize("n_examples", [short, slow], ids=["short", "long"])


def fuzz(n_examples: int, check: Callable[..., None], *strategies: st.SearchStrategy[Any]) -> None:
    """Call `check` with values of the strategies, the same ones in every run."""
    limited = settings(
        max_examples=n_examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    limited(given(*strategies)(check))()


def edited_bytes(random: Random, data: bytes) -> bytes:
    """Return bytes with up to three edits: other bytes, inserted ones, hostile integers, cuts and repeated parts."""
    changed = bytearray(data)
    for _ in range(random.randint(0, 3)):
        at = random.randrange(len(changed) + 1)
        match random.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([random.randrange(256)])
            case 1:
                changed[at:at] = bytes(random.randrange(256) for _ in range(random.randint(1, 4)))
            case 2:
                value = random.choice([0, 1, 127, 128, 2**16, 2**31, 2**32 - 1, 2**48, 2**63, 2**64 - 1])
                form = random.choice(["<Q", "<I", "<H", "<B"])
                wrapped = value % 2 ** (8 * struct.calcsize(form))
                changed[at : at + struct.calcsize(form)] = struct.pack(form, wrapped)
            case 3:
                del changed[at:]
            case 4:
                del changed[at : at + random.randint(1, 8)]
            case 5:
                changed[at:at] = changed[at : at + random.randint(1, 16)]
    return bytes(changed)
