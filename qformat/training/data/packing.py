"""Packs examples into rows by best-fit decreasing.

Examples are placed in order of decreasing length, each into the row with the least free space that still holds it.
Rows never exceed the limit, and examples are never cut.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qformat.errors import UsageError


@dataclass(frozen=True, slots=True)
class Bins:
    """The examples in each row: row r holds examples members[starts[r]:starts[r + 1]].

    Attributes:
        members: Numbers of the examples, row by row, int64 (n_examples,).
        starts: Start of each row in `members`, int64 (n_rows + 1,).
    """

    members: NDArray[np.int64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> NDArray[np.int64]:
        return self.members[self.starts[row] : self.starts[row + 1]]


def pack(lengths: NDArray[np.int64], limit: int) -> Bins:
    """Pack examples into rows of at most `limit` tokens. The result depends only on the lengths.

    Args:
        lengths: Number of tokens in each example, from 1 to `limit`, int64 (n,).
        limit: Largest number of tokens in a row.

    Returns:
        The examples in each row.

    Raises:
        UsageError: An example is longer than the limit.
    """
    if len(lengths) and int(lengths.max()) > limit:
        raise UsageError(
            f"an example has {int(lengths.max())} tokens, more than the {limit} that a packed row holds. "
            f"Tokenise with a max_length of at most {limit}"
        )
    order = np.argsort(-lengths, kind="stable")
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # numbers of free tokens that at least one row has, ascending
    for example, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        position = bisect_left(rooms, length)
        if position == len(rooms):
            row, room = len(rows), limit
            rows.append([example])
        else:
            room = rooms[position]
            row = rows_by_room[room].pop()
            rows[row].append(example)
            if not rows_by_room[room]:
                del rooms[position]
        left = room - length
        if left:
            same = rows_by_room.setdefault(left, [])
            if not same:
                rooms.insert(bisect_left(rooms, left), left)
            same.append(row)
    starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=starts[1:])
    return Bins(np.array([example for row in rows for example in row], np.int64), starts)
