"""Attribution of a training that diverges to a weight that was NaN or Inf before the training began."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qformat.artifact.reading.reader import MappedShards
from qformat.errors import ArtifactError, DivergenceError, Reason


@contextmanager
def naming_weights(shards: MappedShards) -> Iterator[None]:
    """Name the weight if a training diverges because a file contains NaN or Inf: no learning rate would help then.

    Args:
        shards: Shards of the model that is trained, compared with their digests if there are any.

    Raises:
        ArtifactError: The training diverges, and a tensor of the files contains NaN or Inf (nonfinite_weight).
        DivergenceError: The training diverges for another reason.
    """
    try:
        yield
    except DivergenceError as error:
        found = shards.first_non_finite()
        if found is None:
            raise
        shard, tensor = found
        raise ArtifactError(
            Reason.NONFINITE_WEIGHT,
            shards.path / shard,
            "contains NaN or Inf, so every loss is NaN",
            tensor=tensor,
            next_step="Repair the source checkpoint and convert it again",
        ) from error
