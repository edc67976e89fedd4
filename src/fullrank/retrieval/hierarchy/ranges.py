"""Ranges of rows that each user of a batch is scored against, and the best of them."""

# Shapes: B users, U some of them, J ranges of a user, W rows of a user's ranges behind one another, R stored rows,
# K results, N levels scored so far.

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullrank.retrieval.base import NO_ITEM
from fullrank.retrieval.exact import top_k
from fullrank.retrieval.hierarchy.scorer import Scorer

# (users, rows) -> scores of all pairs.
Score = Callable[[Any, Tensor], Tensor]
# (columns, users) -> keys.
KeysOf = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class Ranges:
    """Ranges of stored rows of each user, ascending; a size of 0 is no range.

    A user's rows behind one another are its columns: column w of user b is a row of the range that holds the w-th.
    """

    begin_BJ: Tensor
    size_BJ: Tensor

    @property
    def ends_BJ(self) -> Tensor:
        """Columns up to the end of each range."""
        return self.size_BJ.cumsum(1)

    def ranges_of(self, columns_BK: Tensor) -> Tensor:
        """Which range each column is of; columns behind the last are of the last."""
        return torch.searchsorted(self.ends_BJ, columns_BK.contiguous(), right=True).clamp_max(
            self.begin_BJ.shape[1] - 1
        )

    def rows(self, columns_BK: Tensor) -> Tensor:
        """The stored row of each column."""
        of_BK = self.ranges_of(columns_BK)
        first_BJ = self.ends_BJ - self.size_BJ
        return self.begin_BJ.gather(1, of_BK) + columns_BK - first_BJ.gather(1, of_BK)

    def of_users(self, rows_U: Tensor | slice) -> Ranges:
        return Ranges(self.begin_BJ[rows_U], self.size_BJ[rows_U])

    def part(self, first: int, last: int) -> Ranges:
        """Ranges first to last of each user."""
        return Ranges(self.begin_BJ[:, first:last], self.size_BJ[:, first:last])


@dataclass(frozen=True)
class Rows:
    """What is stored of nodes or items, and how it is scored.

    Attributes:
        living_R: rows that count; None if all do.
    """

    vectors_RD: Tensor
    score: Score
    living_R: Tensor | None = None


def scored(ranges: Ranges, stored: Rows, scorer: Scorer, users: Any) -> tuple[Tensor, Tensor]:
    """Scores of every column (B, W), 0 where there is none, and where there is a living row (B, W)."""
    rows = ranges.begin_BJ.shape[0]
    ends_B = ranges.size_BJ.sum(1)
    width = int(ends_B.max()) if rows and ranges.size_BJ.shape[1] else 0
    scores_BW = torch.zeros((rows, width))
    live_BW = torch.arange(width) < ends_B[:, None]
    if not width:
        return scores_BW, live_BW
    for call in _calls(ranges, scorer):
        some = users if call.users_U is None else scorer.take(users, call.users_U)
        scores_BW[call.where] = stored.score(some, call.rows_of(stored.vectors_RD)).float()
        if stored.living_R is not None:
            live_BW[call.where] = call.rows_of(stored.living_R)
    return scores_BW, live_BW


@dataclass(frozen=True)
class _Call:
    """A grid of pairs to be scored.

    Attributes:
        users_U: which; None for all.
        where: of the users' columns.
        pieces: begin and end of the rows.
    """

    users_U: Tensor | None
    where: tuple[slice | Tensor, slice | Tensor]
    pieces: list[tuple[int, int]]

    def rows_of(self, stored: Tensor) -> Tensor:
        if len(self.pieces) == 1:
            return stored[self.pieces[0][0] : self.pieces[0][1]]
        sizes = [end - begin for begin, end in self.pieces]
        if sum(sizes) > COPIED_AS_SLICES * len(sizes):
            return torch.cat([stored[begin:end] for begin, end in self.pieces])
        size_P = torch.tensor(sizes)
        shift_P = torch.tensor([begin for begin, _ in self.pieces]) - (size_P.cumsum(0) - size_P)
        return stored[torch.arange(sum(sizes)) + shift_P.repeat_interleave(size_P)]


# Pieces of fewer rows, on average, are gathered row by row.
COPIED_AS_SLICES = 48


def _calls(ranges: Ranges, scorer: Scorer) -> Iterator[_Call]:
    """Every call to the scorer.

    Where all users have the same ranges a call has all of them. Otherwise ranges that several users share are scored
    once for all of those (node-major), if that leaves enough to do per call; else user by user.
    """
    rows = ranges.begin_BJ.shape[0]
    same = rows == 1 or (
        bool((ranges.begin_BJ == ranges.begin_BJ[:1]).all()) and bool((ranges.size_BJ == ranges.size_BJ[:1]).all())
    )
    if same:
        yield from _of_one(None, slice(None), rows, ranges.begin_BJ[0], ranges.size_BJ[0], scorer)
        return
    user_P, slot_P = (ranges.size_BJ > 0).nonzero(as_tuple=True)
    begin_P, size_P = ranges.begin_BJ[user_P, slot_P], ranges.size_BJ[user_P, slot_P]
    # Ranges are told apart by where they begin.
    _, of_P, count_G = torch.unique(begin_P, return_inverse=True, return_counts=True)
    if int(size_P.sum()) < scorer.pairs_worth_a_call * count_G.numel():
        for user in range(rows):
            alone = slice(user, user + 1)
            yield from _of_one(torch.tensor([user]), alone, 1, ranges.begin_BJ[user], ranges.size_BJ[user], scorer)
        return
    order_P = of_P.argsort(stable=True)
    first_P = (ranges.ends_BJ - ranges.size_BJ)[user_P, slot_P]
    shares = count_G.tolist()
    groups = zip(*(torch.split(each[order_P], shares) for each in (user_P, first_P, begin_P, size_P)), strict=True)
    for users_U, first_U, begin_U, size_U in groups:
        begin, size = int(begin_U[0]), int(size_U[0])
        step = max(1, scorer.pairs_at_once // users_U.numel())
        for done in range(0, size, step):
            last = min(size, done + step)
            columns_UI = first_U[:, None] + torch.arange(done, last)
            yield _Call(users_U, (users_U[:, None], columns_UI), [(begin + done, begin + last)])


def _of_one(
    users_U: Tensor | None, where: slice, users: int, begin_J: Tensor, size_J: Tensor, scorer: Scorer
) -> Iterator[_Call]:
    """Calls for users with the same ranges: long runs where they lie, short ones copied behind one another."""
    most = max(1, scorer.pairs_at_once // users)
    waiting: list[tuple[int, int]] = []
    column = rows = 0
    for begin, end in _runs(begin_J.tolist(), size_J.tolist()):
        alone = end - begin >= min(most, scorer.rows_worth_a_call)
        if waiting and (alone or rows + end - begin > most):
            yield _Call(users_U, (where, slice(column, column + rows)), waiting)
            column, rows, waiting = column + rows, 0, []
        if not alone:
            waiting.append((begin, end))
            rows += end - begin
            continue
        for first in range(begin, end, most):
            last = min(end, first + most)
            yield _Call(users_U, (where, slice(column, column + last - first)), [(first, last)])
            column += last - first
    if waiting:
        yield _Call(users_U, (where, slice(column, column + rows)), waiting)


def _runs(begins: list[int], sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Ranges as begin and end, those that touch made one."""
    first = last = -1
    for begin, size in zip(begins, sizes, strict=True):
        if not size:
            continue
        if begin != last:
            if last > first:
                yield first, last
            first = begin
        last = begin + size
    if last > first:
        yield first, last


@dataclass(frozen=True)
class Best:
    """The best items of each user so far, best first, ties by smaller key; `NO_ITEM` behind the last."""

    keys_BK: Tensor
    scores_BK: Tensor

    @classmethod
    def none(cls, users: int) -> Best:
        return cls(torch.zeros((users, 0), dtype=torch.int64), torch.zeros((users, 0)))

    def with_more(self, scores_BW: Tensor, live_BW: Tensor, keys_of: KeysOf, k: int) -> Best:
        """The best of these and of more columns.

        Args:
            keys_of: keys of columns (U, K) of some of the users.

        Raises:
            ValueError: if a score is NaN.
        """
        scores_BW = scores_BW.masked_fill(~live_BW, -torch.inf)
        scores_BK, columns_BK = top_k(scores_BW, k)
        if bool(scores_BK.isnan().any()):
            raise ValueError("the scorer gave NaN for an item")
        keys_BK = keys_of(columns_BK, slice(None))
        keys_BK = keys_BK.masked_fill(scores_BK == -torch.inf, NO_ITEM)
        if 0 < k < scores_BW.shape[1]:
            last_B = scores_BK[:, -1]
            tied_B = ((scores_BW >= last_B[:, None]).sum(1) > k) & (last_B > -torch.inf)
            # Several columns have the k-th score: those of the smallest keys stay.
            for row in tied_B.nonzero().squeeze(1).tolist():
                above = int((scores_BW[row] > last_B[row]).sum())
                tied_1T = (scores_BW[row] == last_B[row]).nonzero().T
                keys_BK[row, above:] = keys_of(tied_1T, slice(row, row + 1))[0].sort().values[: k - above]
        keys = torch.cat([self.keys_BK, keys_BK], 1)
        scores = torch.cat([self.scores_BK, scores_BK], 1)
        return Best(*in_order(keys, scores, k))


def in_order(keys_BK: Tensor, scores_BK: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best by score, ties by smaller key."""
    keys_BK, by_key_BK = keys_BK.sort(dim=1, stable=True)
    scores_BK, order_BK = scores_BK.gather(1, by_key_BK).sort(dim=1, descending=True, stable=True)
    return keys_BK.gather(1, order_BK)[:, :k], scores_BK[:, :k]
