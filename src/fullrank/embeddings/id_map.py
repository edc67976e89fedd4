"""An exact map from 62-bit ids to rows, in tensors: lookups, entries and removals of many ids at once."""

# Shapes: N ids, S slots.

from __future__ import annotations

import torch
from torch import Tensor

NO_ROW = -1
_EMPTY, _GONE = -1, -2
# Odd, so that multiplying loses nothing; 2^64 over the golden ratio, as an int64.
_GOLDEN = -7046029254386353131


def mixed(ids_N: Tensor) -> Tensor:
    """A random-looking 32-bit number for each int64."""
    state_N = (ids_N ^ (ids_N >> 32)) * _GOLDEN
    state_N = (state_N ^ (state_N >> 29)) * _GOLDEN
    return (state_N >> 32) & 0xFFFFFFFF


class IdMap:
    """A hash table with open addressing: an id lies in the first slot from its own on that is not another's.

    At most half of the slots are taken, so an id is found in about one and a half looks.

    Args:
        capacity: most ids that are in it at a time.
    """

    def __init__(self, capacity: int) -> None:
        self._slots = 1 << max(2 * capacity - 1, 3).bit_length()
        self.clear()

    def clear(self) -> None:
        self._id_S = torch.full((self._slots,), _EMPTY, dtype=torch.int64, device="cpu")
        self._row_S = torch.full((self._slots,), NO_ROW, dtype=torch.int32, device="cpu")
        self._taken = 0  # by ids, and by those that are gone

    def rows(self, ids_N: Tensor) -> Tensor:
        """int64 row of each id, `NO_ROW` of those that have none."""
        slot_N = self._find(ids_N)
        rows_N = self._row_S[slot_N.clamp_min(0)].long()
        return rows_N.masked_fill_(slot_N < 0, NO_ROW)

    def _find(self, ids_N: Tensor) -> Tensor:
        """The slot of each id, -1 if it is not there."""
        slot_N = mixed(ids_N) & (self._slots - 1)
        there_N = self._id_S[slot_N]
        left = ((there_N != ids_N) & (there_N != _EMPTY)).nonzero().squeeze(1)
        while left.numel():
            slot_N[left] = (slot_N[left] + 1) & (self._slots - 1)
            there_N[left] = there = self._id_S[slot_N[left]]
            left = left[(there != ids_N[left]) & (there != _EMPTY)]
        return slot_N.masked_fill_(there_N == _EMPTY, -1)

    def add(self, ids_N: Tensor, rows_N: Tensor) -> None:
        """Enter distinct ids that are not there."""
        if 2 * (self._taken + ids_N.numel()) > self._slots:
            self._rebuild()
        self._taken += ids_N.numel()
        slot_N = mixed(ids_N) & (self._slots - 1)
        left = torch.arange(ids_N.numel())
        while left.numel():
            free = left[self._id_S[slot_N[left]] == _EMPTY]
            self._id_S[slot_N[free]] = ids_N[free]  # of several for one slot, one stays
            done = self._id_S[slot_N[left]] == ids_N[left]
            self._row_S[slot_N[left[done]]] = rows_N[left[done]].int()
            left = left[~done]
            slot_N[left] = (slot_N[left] + 1) & (self._slots - 1)

    def remove(self, ids_N: Tensor) -> None:
        """Take out distinct ids that are there."""
        self._id_S[self._find(ids_N)] = _GONE

    def _rebuild(self) -> None:
        there_S = self._id_S >= 0
        ids, rows = self._id_S[there_S], self._row_S[there_S]
        self.clear()
        self.add(ids, rows)
