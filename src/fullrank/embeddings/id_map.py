"""An exact map from ids to the rows that hold them, in tensors: lookups, entries and removals of many ids at once."""

# Shapes: N ids, R rows, S slots.

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
    """A hash table with open addressing over ids that lie elsewhere: a slot holds a row, and the row's id is looked up.

    An id lies in the first slot from its own on that is not another's. At most half of the slots are taken, so it is
    found in about one and a half looks; a slot is 4 bytes.

    Args:
        ids_R: int64, the id of each row, to which the map looks. Whoever changes them tells it.
        taken: rows that are in the map from the start.
    """

    def __init__(self, ids_R: Tensor, taken: Tensor) -> None:
        self.ids_R = ids_R
        self._slots = 1 << max(2 * len(ids_R) - 1, 3).bit_length()
        self._clear()
        self.add(taken)

    def _clear(self) -> None:
        self._row_S = torch.full((self._slots,), _EMPTY, dtype=torch.int32, device=self.ids_R.device)
        self._used = 0  # slots with rows, and those of rows that are gone

    def rows(self, ids_N: Tensor) -> Tensor:
        """int64 row of each id, `NO_ROW` of those that have none."""
        return self._find(ids_N)[1]

    def _find(self, ids_N: Tensor) -> tuple[Tensor, Tensor]:
        """The slot where the search for each id ends, and its row."""
        slot_N = self._first_slot(ids_N)
        row_N = self._row_S[slot_N].long()
        left = ((row_N != _EMPTY) & ((row_N == _GONE) | (self.ids_R[row_N] != ids_N))).nonzero().squeeze(1)
        while left.numel():
            slot_N[left] = (slot_N[left] + 1) & (self._slots - 1)
            row_N[left] = row = self._row_S[slot_N[left]].long()
            left = left[(row != _EMPTY) & ((row == _GONE) | (self.ids_R[row] != ids_N[left]))]
        return slot_N, row_N

    def _first_slot(self, ids_N: Tensor) -> Tensor:
        return mixed(ids_N) & (self._slots - 1)

    def add(self, rows_M: Tensor) -> None:
        """Enter the ids of distinct rows; none of them is there."""
        if 2 * (self._used + rows_M.numel()) > self._slots:
            self._rebuild()
        self._used += rows_M.numel()
        slot_M = self._first_slot(self.ids_R[rows_M])
        left = torch.arange(rows_M.numel(), device=rows_M.device)
        while left.numel():
            free = left[self._row_S[slot_M[left]] == _EMPTY]
            self._row_S[slot_M[free]] = rows_M[free].int()  # of several for one slot, one stays
            left = left[self._row_S[slot_M[left]] != rows_M[left]]
            slot_M[left] = (slot_M[left] + 1) & (self._slots - 1)

    def remove(self, rows_M: Tensor) -> None:
        """Take out the ids of distinct rows that are there, before the rows have others."""
        self._row_S[self._find(self.ids_R[rows_M])[0]] = _GONE

    def _rebuild(self) -> None:
        there = self._row_S[self._row_S >= 0].long()
        self._clear()
        self.add(there)
