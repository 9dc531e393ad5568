"""Data sets over tokenised examples: for torch, single or packed, and for SFTTrainer.

All data sets read examples from the mapped cache on demand, without a copy. Pickling for a worker process transfers the
path of the cache, not its content.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from qformat.errors import UsageError
from qformat.training.data.packing import Bins, pack
from qformat.training.data.statistics import DataStatistics
from qformat.training.data.token_cache import CachedTokens, open_cache

if TYPE_CHECKING:
    import datasets

IGNORED = -100
"""Label of a token that is not trained."""


class Example(TypedDict):
    """One row of a data set.

    Attributes:
        input_ids: Token ids, int64 (n,).
        labels: Token ids, or IGNORED for each token that is not trained, int64 (n,).
        seq_lengths: Length of each example in the row; the sum is n.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    seq_lengths: list[int]


class TokenRows(Protocol):
    """The interface that the data sets share."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens in each row, int64 (n_rows,)."""


class TokenisedData(torch.utils.data.Dataset[Example]):
    """A data set with one example per row.

    Args:
        cached: Cache that holds the examples.
    """

    def __init__(self, cached: CachedTokens) -> None:
        self._cached = cached

    def __len__(self) -> int:
        return len(self._cached.starts) - 1

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        start, stop = (int(bound) for bound in self._cached.starts[index : index + 2])
        ids = torch.from_numpy(self._cached.tokens[start:stop].astype(np.int64))
        trained = torch.from_numpy(self._cached.trained[start:stop].astype(np.bool_))
        return Example(input_ids=ids, labels=ids.masked_fill(~trained, IGNORED), seq_lengths=[stop - start])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens in each example, int64 (n_examples,)."""
        return np.diff(self._cached.starts)

    @property
    def statistics(self) -> DataStatistics:
        """Counts of the tokenised data."""
        return self._cached.statistics

    @property
    def key(self) -> str:
        """Digest of everything that the tokens depend on: data, tokenizer, template and settings."""
        return self._cached.folder.name

    @property
    def highest_token(self) -> int:
        """Largest token id in the data."""
        return int(self._cached.tokens.max())

    @property
    def content_digest(self) -> str:
        """Digest of the data files alone. A checkpoint records it to detect changed data."""
        return self._cached.content_digest

    def packed(self, limit: int) -> PackedData:
        """Return the examples packed into rows of at most `limit` tokens.

        Raises:
            UsageError: An example is longer than the limit.
        """
        return PackedData(self, pack(self.lengths, limit))

    def __reduce__(self) -> tuple[Callable[[Path], TokenisedData], tuple[Path]]:
        return _reopen, (self._cached.folder,)


class PackedData(torch.utils.data.Dataset[Example]):
    """A data set with several examples per row.

    Args:
        data: The examples.
        bins: The examples in each row.
    """

    def __init__(self, data: TokenisedData, bins: Bins) -> None:
        self.data = data
        self.bins = bins

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        members = [self.data[example] for example in self.bins[index].tolist()]
        return Example(
            input_ids=torch.cat([member["input_ids"] for member in members]),
            labels=torch.cat([member["labels"] for member in members]),
            seq_lengths=[length for member in members for length in member["seq_lengths"]],
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens in each row, int64 (n_rows,)."""
        by_member = self.data.lengths[self.bins.members]
        return np.add.reduceat(by_member, self.bins.starts[:-1]) if len(self) else by_member


def for_trainer(rows: TokenRows) -> datasets.Dataset:
    """Return rows as the `datasets.Dataset` that SFTTrainer requires, with the columns of `Example` and `length`.

    The table holds only the lengths. A transform reads the tokens of a row from the mapped cache on demand. SFTConfig
    must have dataset_kwargs={"skip_prepare_dataset": True} and remove_unused_columns=False, because the columns of the
    table differ from those of a transformed row.
    """
    import datasets

    table = datasets.Dataset.from_dict({"row": np.arange(len(rows)), "length": rows.lengths})
    return table.with_transform(_ReadRows(rows))


class _ReadRows:
    """A transform from row numbers to examples. `datasets` pickles it to hash it."""

    def __init__(self, rows: TokenRows) -> None:
        self._rows = rows

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if "row" not in batch:  # samplers that group by length read only that column
            return batch
        examples = [self._rows[row] for row in batch["row"]]
        return {name: [example[name] for example in examples] for name in ("input_ids", "labels", "seq_lengths")}


def _reopen(folder: Path) -> TokenisedData:
    cached = open_cache(folder.parent, folder.name)
    if cached is None:
        raise UsageError(f"{folder}: the tokenised data is missing or damaged. Prepare the data again")
    return TokenisedData(cached)
