"""Tokenised examples as data sets of torch, alone or packed, and as the data set that SFTTrainer takes.

All read from the maps of the cache when asked for an example; none has a copy of its own. They travel to a worker
process as the name of the cache, not as its content.
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
"""The label of a token that is not trained on."""


class Example(TypedDict):
    """One row of a data set.

    input_ids, labels: int64 (n,); labels are IGNORED where a token is not trained on.
    seq_lengths: the examples of the row, one after the other; they add up to n.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    seq_lengths: list[int]


class TokenRows(Protocol):
    """What the two data sets below have in common."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row: int64 (n,)."""


class TokenisedData(torch.utils.data.Dataset[Example]):
    """One example a row."""

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
        """Tokens of each example: int64 (n_examples,)."""
        return np.diff(self._cached.starts)

    @property
    def statistics(self) -> DataStatistics:
        """What became of the rows."""
        return self._cached.statistics

    @property
    def key(self) -> str:
        """The digest of everything that these tokens depend on: data, tokenizer, template, settings."""
        return self._cached.folder.name

    @property
    def content_digest(self) -> str:
        """The digest of the data files alone. A checkpoint records it to notice that they changed."""
        return self._cached.content_digest

    def packed(self, limit: int) -> PackedData:
        """Return the examples packed into rows of at most `limit` tokens. Raises UsageError if one is longer."""
        return PackedData(self, pack(self.lengths, limit))

    def __reduce__(self) -> tuple[Callable[[Path], TokenisedData], tuple[Path]]:
        return _reopen, (self._cached.folder,)


class PackedData(torch.utils.data.Dataset[Example]):
    """Several examples a row."""

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
        """Tokens of each row: int64 (n_rows,)."""
        by_member = self.data.lengths[self.bins.members]
        return np.add.reduceat(by_member, self.bins.starts[:-1]) if len(self) else by_member


def for_trainer(rows: TokenRows) -> datasets.Dataset:
    """Return rows as the `datasets.Dataset` that SFTTrainer insists on, with the columns of `Example` and `length`.

    The table behind it holds only the lengths; a transform reads the tokens from the maps when a row is asked for.
    SFTConfig must have dataset_kwargs={"skip_prepare_dataset": True} and remove_unused_columns=False, since the columns
    that are there are not the ones that a row has.
    """
    import datasets

    table = datasets.Dataset.from_dict({"row": np.arange(len(rows)), "length": rows.lengths})
    return table.with_transform(_ReadRows(rows))


class _ReadRows:
    """The transform: from row numbers to examples. `datasets` hashes it by pickling it."""

    def __init__(self, rows: TokenRows) -> None:
        self._rows = rows

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if "row" not in batch:  # samplers that group by length ask for that column alone
            return batch
        examples = [self._rows[row] for row in batch["row"]]
        return {name: [example[name] for example in examples] for name in ("input_ids", "labels", "seq_lengths")}


def _reopen(folder: Path) -> TokenisedData:
    cached = open_cache(folder.parent, folder.name)
    if cached is None:
        raise UsageError(f"{folder}: the tokenised data is gone or damaged. Prepare the data again")
    return TokenisedData(cached)
