"""Exact search of the largest inner products."""

# Shapes: B queries, I items, D width, K results, A items that may be returned.

from __future__ import annotations

import math

import torch
from torch import Tensor

from fullrank.retrieval.base import NO_ITEM, SearchResult, check_k

# Scores held at once: 4M floats are 16 MB, about what a laptop's last-level cache takes.
SCORES_AT_ONCE = 4_000_000


class ExactIndex:
    """Item vectors in order of their keys, searched by one matrix product and a running top k.

    Every item is scored, so recall against the scorer is 1 by construction. Ties go to the smaller key, which makes
    results independent of the order in which items came.
    """

    def __init__(self, width: int) -> None:
        self.keys_I = torch.zeros(0, dtype=torch.int64)
        self.vectors_ID = torch.zeros(0, width)

    def __len__(self) -> int:
        return self.keys_I.numel()

    def add(self, keys_I: Tensor, vectors_ID: Tensor) -> None:
        """Raises:
        ValueError: if a key occurs twice, is there already or is that of no item, the width differs, or a number is
            not finite.
        """
        if keys_I.ndim != 1 or keys_I.dtype != torch.int64:
            raise ValueError(f"item keys are {keys_I.dtype} of shape {tuple(keys_I.shape)}, expected a row of int64")
        if vectors_ID.ndim != 2 or vectors_ID.shape != (keys_I.numel(), self.vectors_ID.shape[1]):
            expected = (keys_I.numel(), self.vectors_ID.shape[1])
            raise ValueError(f"item vectors have shape {tuple(vectors_ID.shape)}, expected {expected}")
        if bool((keys_I == NO_ITEM).any()):
            raise ValueError(f"{NO_ITEM} is the key of no item")
        finite_I = torch.isfinite(vectors_ID).all(1)
        if not bool(finite_I.all()):
            raise ValueError(f"the vector of item {int(keys_I[~finite_I][0])} has a NaN or infinite number")
        keys = torch.cat([self.keys_I, keys_I])
        vectors = torch.cat([self.vectors_ID, vectors_ID.float()])
        keys, order = keys.sort(stable=True)
        twice = keys[1:] == keys[:-1]
        if bool(twice.any()):
            raise ValueError(f"item {int(keys[1:][twice][0])} is in the index already or given twice")
        self.keys_I, self.vectors_ID = keys, vectors[order].contiguous()

    def remove(self, keys: Tensor) -> None:
        """Raises:
        KeyError: if a key is not in the index.
        """
        unknown = ~torch.isin(keys, self.keys_I)
        if bool(unknown.any()):
            raise KeyError(f"item {int(keys[unknown][0])} is not in the index")
        kept = ~torch.isin(self.keys_I, keys)
        self.keys_I, self.vectors_ID = self.keys_I[kept], self.vectors_ID[kept].contiguous()

    def search(self, queries_BD: Tensor, k: int, *, allowed: Tensor | None = None) -> SearchResult:
        """The k best items of each query.

        Args:
            allowed: see `Retriever.search`. What all queries share is searched alone, and costs less.

        Raises:
            ValueError: if k is below 1.
        """
        check_k(k)
        if allowed is not None and allowed.ndim == 1:
            part = ExactIndex(self.vectors_ID.shape[1])
            kept_I = torch.isin(self.keys_I, allowed)
            part.keys_I, part.vectors_ID = self.keys_I[kept_I], self.vectors_ID[kept_I]
            return part.search(queries_BD, k)
        rows, count = queries_BD.shape[0], len(self)
        block = max(k, SCORES_AT_ONCE // max(rows, 1))
        places_BK = torch.zeros((rows, 0), dtype=torch.int64)
        scores_BK = torch.zeros((rows, 0))
        for begin in range(0, count, block):
            scores_BI = queries_BD @ self.vectors_ID[begin : begin + block].T
            if allowed is not None:
                scores_BI = scores_BI.masked_fill(~_among(self.keys_I[begin : begin + block], allowed), -torch.inf)
            best_BK, place_BK = top_k(scores_BI, k)
            if begin:
                # Earlier blocks stand first, so that a stable choice keeps their smaller keys.
                best_BK, place_BK = torch.cat([scores_BK, best_BK], 1), torch.cat([places_BK, place_BK + begin], 1)
                scores_BK, order_BK = top_k(best_BK, k)
                places_BK = place_BK.gather(1, order_BK)
            else:
                scores_BK, places_BK = best_BK, place_BK
        keys_BK = self.keys_I[places_BK]
        if allowed is not None:
            keys_BK = keys_BK.masked_fill(scores_BK == -torch.inf, NO_ITEM)
        return SearchResult(keys_BK, scores_BK, torch.full((rows,), count))


def _among(keys_I: Tensor, allowed_BA: Tensor) -> Tensor:
    """Which of some sorted keys each row has, shape (B, I)."""
    place_BA = torch.searchsorted(keys_I, allowed_BA).clamp_max(keys_I.numel() - 1)
    there_BA = keys_I[place_BA] == allowed_BA
    among_BI = torch.zeros((allowed_BA.shape[0], keys_I.numel()), dtype=torch.bool)
    row_BA = torch.arange(allowed_BA.shape[0])[:, None].expand_as(place_BA)
    among_BI[row_BA[there_BA], place_BA[there_BA]] = True
    return among_BI


def top_k(scores_BI: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores of each row and their places, largest first, ties by smaller place; all if k is larger."""
    rows, count = scores_BI.shape
    k = min(k, count)
    if rows == 1 and count > SORT_ALL_BELOW and k * SAMPLE_EVERY <= count:
        found = _top_k_of_one(scores_BI[0], k)
        if found is not None:
            return found
    if count <= SORT_ALL_BELOW:
        sorted_BI, place_BI = scores_BI.sort(dim=1, descending=True, stable=True)
        return sorted_BI[:, :k], place_BI[:, :k]
    scores_BK, place_BK = scores_BI.topk(k, dim=1)
    # topk leaves open which of several equal scores it takes. Rows that tie at the k-th score choose again.
    if 0 < k < count:
        tied_B = (scores_BI >= scores_BK[:, -1:]).sum(1) > k
        for row in tied_B.nonzero().squeeze(1).tolist():
            place_BK[row] = torch.sort(scores_BI[row], descending=True, stable=True).indices[:k]
    place_BK = place_BK.sort(dim=1).values
    scores_BK, order_BK = scores_BI.gather(1, place_BK).sort(dim=1, descending=True, stable=True)
    return scores_BK, place_BK.gather(1, order_BK)


# Up to here one stable sort is cheaper than a selection and the check for ties that it needs.
SORT_ALL_BELOW = 4096
SAMPLE_EVERY = 16


def _top_k_of_one(scores_I: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """`top_k` of one long row: a bar read off every 16th score leaves few to sort, three times faster than a selection
    among all. None if the bar was too high (fewer than k reach it) or so low that nothing is gained."""
    sample = scores_I[::SAMPLE_EVERY]
    # Four standard deviations above the expected rank of the k-th score in the sample.
    rank = min(sample.numel(), math.ceil(k / SAMPLE_EVERY + 4 * math.sqrt(k / SAMPLE_EVERY) + 4))
    bar = sample.topk(rank).values[-1]
    place = (scores_I >= bar).nonzero().squeeze(1)
    if not k <= place.numel() <= scores_I.numel() // 4:
        return None
    scores, order = scores_I[place].sort(descending=True, stable=True)
    return scores[None, :k], place[order[:k]][None]
