"""Popularity as a part of a score: how much it weighs is what ranks later clicks best."""

# Shapes: I items, P clicks in order of time, H held-out clicks, D width of vectors.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fullrank.retrieval.vectors.base import places_of

# Weights of log(1 + clicks), and half-lives of a click as shares of all clicks; none: clicks do not age. The first
# of each is taken where there is nothing to choose by.
WEIGHTS = (1.0, 0.0, 0.25, 0.5, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0)
HALF_LIVES = (None, 0.2)

# Ranks are judged by about this many results.
RESULTS = 100


@dataclass(frozen=True)
class RecentClicks:
    """w log(1 + clicks) of items, 0 of those never clicked.

    Attributes:
        keys_I: ascending.
        scores_I: float32.
    """

    keys_I: Tensor
    scores_I: Tensor

    @classmethod
    def none(cls) -> RecentClicks:
        """Nothing was clicked."""
        return cls(torch.zeros(0, dtype=torch.int64), torch.zeros(0))

    @classmethod
    def of(cls, keys_P: Tensor, weight: float = WEIGHTS[0], half_life: float | None = HALF_LIVES[0]) -> RecentClicks:
        """Of clicks in order of time.

        Args:
            half_life: share of all clicks after which one counts half; default never.
        """
        keys_I, item_P = torch.unique(keys_P, return_inverse=True)
        clicks_P = torch.ones(len(keys_P), dtype=torch.float64)
        if half_life is not None:
            clicks_P = 0.5 ** (torch.arange(len(keys_P) - 1, -1, -1) / (half_life * len(keys_P))).double()
        clicks_I = torch.zeros(len(keys_I), dtype=torch.float64).index_add_(0, item_P, clicks_P)
        return cls(keys_I, (weight * clicks_I.log1p()).float())

    @classmethod
    def restored(cls, keys_I: Tensor, scores_I: Tensor) -> RecentClicks:
        """As they were saved.

        Raises:
            ValueError: if keys are not in order, or differ in number from the scores.
        """
        if keys_I.shape != scores_I.shape:
            raise ValueError(f"{keys_I.numel()} keys of clicked items, but {scores_I.numel()} scores")
        if bool((keys_I[1:] <= keys_I[:-1]).any()):
            raise ValueError("the keys of clicked items are not in ascending order")
        return cls(keys_I, scores_I)

    def __call__(self, keys: Tensor) -> Tensor:
        """Scores of items."""
        place = places_of(keys, self.keys_I)
        known = place >= 0
        scores = torch.zeros(keys.shape)
        scores[known] = self.scores_I[place[known]]
        return scores


def best_clicks(
    keys_P: Tensor,
    earlier: int,
    users_HD: Tensor,
    clicked: tuple[Tensor, Tensor],
    items: tuple[Tensor, Tensor],
    share: float = 1.0,
) -> RecentClicks:
    """The weight and half-life with which clicks before `earlier` rank later ones best, applied to all.

    Better is the mean of 1 / (1 + rank / 100) among the items, a smooth form of recall@100; of a tenth of the items
    where those are fewer than 1000. Scores are inner products plus popularity.

    Args:
        users_HD: the users of held-out clicks.
        clicked: vectors of their items, (H, D), and keys.
        items: vectors of items to rank them among, (I, D), and keys.
        share: of all items that these are.
    """
    clicked_HD, clicked_H = clicked
    items_ID, keys_I = items
    cut = min(RESULTS, max(1.0, len(keys_I) / share / 10)) * share
    own_H = (users_HD * clicked_HD).sum(1)
    scores_HI = users_HD @ items_ID.T
    # Its own item is no rival, which rounding might make it.
    scores_HI.masked_fill_(clicked_H[:, None] == keys_I, -torch.inf)
    best = -1.0
    found: tuple[float, float | None] = WEIGHTS[0], HALF_LIVES[0]
    for half_life in HALF_LIVES:
        before = RecentClicks.of(keys_P[:earlier], 1.0, half_life)
        popularity_I, popularity_H = before(keys_I), before(clicked_H)
        for weight in WEIGHTS:
            bar_H1 = (own_H + weight * popularity_H)[:, None]
            rank_H = (scores_HI + weight * popularity_I >= bar_H1).sum(1)
            quality = float((1 / (1 + rank_H.double() / cut)).mean())
            if quality > best:
                best, found = quality, (weight, half_life)
    return RecentClicks.of(keys_P, *found)
