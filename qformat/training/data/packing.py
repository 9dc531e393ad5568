"""Which examples share a row: best fit, longest first.

Each example goes, longest first, into the row with the least room that still takes it. Rows are never longer than the
limit and examples are never cut.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qformat.errors import UsageError


@dataclass(frozen=True, slots=True)
class Bins:
    """Examples by row: row r holds examples members[starts[r]:starts[r + 1]]. Both int64."""

    members: NDArray[np.int64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> NDArray[np.int64]:
        return self.members[self.starts[row] : self.starts[row + 1]]


def pack(lengths: NDArray[np.int64], limit: int) -> Bins:
    """Put examples of 1 to `limit` tokens into rows of at most `limit`. Same lengths, same rows.

    lengths: int64 (n,). Raises UsageError where one is longer than the limit.
    """
    if len(lengths) and int(lengths.max()) > limit:
        raise UsageError(
            f"an example has {int(lengths.max())} tokens and a packed row takes {limit}. "
            "Tokenise with a max_length of at most that"
        )
    order = np.argsort(-lengths, kind="stable")
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # ascending: the rooms that some row has
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
