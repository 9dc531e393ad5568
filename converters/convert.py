"""The verbs `plan` and `convert`: plan, execute and seal put together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qformat.artifact.disk import Disk, free_nbytes
from qformat.artifact.staging import Staging, check_target
from qformat.codec.nf4 import BLOCK_SIZES
from qformat.converters.plan import Plan, make_plan
from qformat.converters.recipe import Recipe, load_recipe
from qformat.converters.safetensors_shards import SafetensorsShards
from qformat.converters.source import Source
from qformat.errors import TargetError, UsageError

DEFAULT_MAX_SHARD_NBYTES = 5_000_000_000
"""The size that the Hub recommends and transformers uses for a shard."""


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    """What a user may choose about a conversion."""

    recipe: Path | None = None
    skip: Sequence[str] = ()
    block_size: int = 64
    double_quant: bool = True
    max_shard_nbytes: int = DEFAULT_MAX_SHARD_NBYTES
    keep_nonfinite: bool = False

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise UsageError(f"block size {self.block_size}: must be one of {', '.join(map(str, BLOCK_SIZES))}")
        if self.max_shard_nbytes < 1:
            raise UsageError(f"shard size {self.max_shard_nbytes}: must be at least 1 byte")

    def load_recipe(self) -> Recipe:
        """Read the recipe file and put the skip patterns in front of it."""
        return load_recipe(
            self.recipe, skip=self.skip, block_size=self.block_size, double_quant=self.double_quant
        )
