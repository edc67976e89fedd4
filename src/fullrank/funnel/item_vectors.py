"""What an early stage saw of the items of a catalogue, before anybody asked for them."""

# Shapes: I rows of the catalogue, N new ones, F and M rows that were first and more, V width.

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fullrank.funnel.catalogue import NO_ROW
from fullrank.retrieval.exact import LARGE, MOST_BESIDE


class ItemVectors:
    """Vectors by row of a catalogue.

    When a few rows of a large catalogue change, the vectors stay where they are, so that processes which map them go on
    to share them, and new ones come beside; then a number for each row says where its vector is.

    Args:
        first_FV: the vectors, in order of the rows if nothing else is given.
        more_MV: further ones.
        place_I: int32, of each row's vector among both.
    """

    def __init__(self, first_FV: Tensor, more_MV: Tensor | None = None, place_I: Tensor | None = None) -> None:
        self._first_FV, self._more_MV, self._place_I = first_FV, more_MV, place_I

    def take(self, rows: Tensor) -> Tensor:
        """Those of some rows, (P,), as (P, V)."""
        if self._place_I is None or self._more_MV is None:
            return self._first_FV.index_select(0, rows)
        place = self._place_I.index_select(0, rows).long()
        first = self._first_FV.shape[0]
        found = self._first_FV.index_select(0, place.clamp_max(first - 1))
        is_more = place >= first
        if bool(is_more.any()):
            found[is_more] = self._more_MV.index_select(0, place[is_more] - first)
        return found

    def whole(self) -> Tensor:
        """Those of all rows, (I, V)."""
        return self._first_FV if self._place_I is None else self.take(torch.arange(self._place_I.numel()))

    def changed(self, was_I: Tensor, seen: Callable[[Tensor], Tensor]) -> ItemVectors:
        """Those of another catalogue.

        Args:
            was_I: for each of its rows the one that it was, `NO_ROW` for a new one.
            seen: vectors_NV of some of its rows.
        """
        new_N = (was_I == NO_ROW).nonzero().squeeze(1)
        before_I = was_I.clamp_min(0)
        more = 0 if self._more_MV is None else self._more_MV.shape[0]
        if self._first_FV.shape[0] < LARGE or more + len(new_N) > MOST_BESIDE:
            moved_IV = self.take(before_I)
            if len(new_N):
                moved_IV[new_N] = seen(new_N)
            return ItemVectors(moved_IV)
        place_I = before_I.int() if self._place_I is None else self._place_I.index_select(0, before_I)
        more_MV = self._first_FV[:0] if self._more_MV is None else self._more_MV
        if len(new_N):
            place_I[new_N] = torch.arange(len(new_N), dtype=torch.int32) + self._first_FV.shape[0] + more
            more_MV = torch.cat([more_MV, seen(new_N)])
        return ItemVectors(self._first_FV, more_MV, place_I)
