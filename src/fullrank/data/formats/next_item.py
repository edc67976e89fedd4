"""Users' item sequences as rows to rank: each next item against sampled others, with the items before it."""

# Shapes: m events of some users, c candidates (events after a user's first), n rows.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from fullrank.data.hashing import Hashes, hash_series, splitmix
from fullrank.data.splits import PARTS, TEST, TRAIN, VALID

SEED = 2024
# Draws of a negative before the exact, slower way.
_DRAWS = 8

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class NextItems:
    """Rows of some candidates.

    Each candidate gives a row with label 1 for the item that the user took, and, where there is an item that this user
    never took, a row with label 0 for one of those, drawn with equal probability. Both have the same history. The draw
    depends on the user, the place in the sequence and `SEED` alone.

    Attributes:
        event: shape (n,), the event of each row, an index into the events.
        item: shape (n,), candidate item of each row.
        label: shape (n,), 1 or 0.
        part: shape (n,): a user's last event is test, the last but one valid, the others train.
        history: shape (n,), which of the lists each row has.
        offsets: list i holds the events places[offsets[i]:offsets[i + 1]].
        places: events of all lists, oldest first.
    """

    event: Integers
    item: Integers
    label: npt.NDArray[np.int8]
    part: pl.Series
    history: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int32]
    places: Integers


def next_items(
    users: pl.Series, items: Integers, num_items: int, *, max_length: int, candidates: int
) -> Iterator[NextItems]:
    """The rows of some users' events, `candidates` of them at a time.

    Args:
        users: shape (m,), each user's events side by side and oldest first.
        items: shape (m,), from 0 to `num_items` - 1.
        max_length: longest history; older events are left out.
    """
    user = users.rle_id().cast(pl.Int64).to_numpy()
    firsts = np.flatnonzero(np.diff(user, prepend=-1))
    first = firsts[user]
    last = np.append(firsts[1:], len(user))[user] - 1
    seen = np.unique(user * num_items + items)
    draws = splitmix(hash_series(users.gather(firsts).cast(pl.String)) ^ np.uint64(SEED))
    chosen = np.flatnonzero(np.arange(len(user)) > first)
    for begin in range(0, len(chosen), candidates):
        event = chosen[begin : begin + candidates]
        starts = np.maximum(first[event], event - max_length)
        negative = _negatives(
            user[event], draws[user[event]] + (event - first[event]).astype(np.uint64), seen, num_items
        )
        rows = np.stack([np.ones(len(event), dtype=bool), negative >= 0], axis=1)
        part = np.full(len(event), TRAIN)
        part[event == last[event] - 1] = VALID
        part[event == last[event]] = TEST
        offsets = np.zeros(len(event) + 1, dtype=np.int32)
        np.cumsum(event - starts, out=offsets[1:])
        which = np.repeat(np.arange(len(event)), 2)[rows.ravel()]
        yield NextItems(
            event=event[which],
            item=np.stack([items[event], negative], axis=1)[rows],
            label=np.tile(np.array([1, 0], dtype=np.int8), len(event))[rows.ravel()],
            part=pl.Series(PARTS).gather(part[which]),
            history=which.astype(np.int32),
            offsets=offsets,
            places=np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], event - starts),
        )


def _negatives(user: Integers, draws: Hashes, seen: Integers, num_items: int) -> Integers:
    """An item outside the user's own for each candidate; -1 where the user took them all."""
    chosen = np.full(len(user), -1)
    open_ = np.arange(len(user))
    for attempt in range(_DRAWS):
        draw = (splitmix(draws[open_] ^ np.uint64(attempt << 40)) % np.uint64(num_items)).astype(np.int64)
        key = user[open_] * num_items + draw
        place = np.minimum(np.searchsorted(seen, key), len(seen) - 1)
        fresh = seen[place] != key
        chosen[open_[fresh]] = draw[fresh]
        open_ = open_[~fresh]
        if not len(open_):
            return chosen
    # Users who took most of the items: choose among the rest of them.
    for row in open_:
        begin, end = np.searchsorted(seen, [user[row] * num_items, (user[row] + 1) * num_items])
        rest = np.setdiff1d(np.arange(num_items), seen[begin:end] - user[row] * num_items)
        if len(rest):
            chosen[row] = rest[int(draws[row] % np.uint64(len(rest)))]
    return chosen
