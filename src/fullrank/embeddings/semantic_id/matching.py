"""Which centroids of a new codebook are those of an old one, and how many items it gives other codes."""

# Shapes: K codes, N items, L levels.

from __future__ import annotations

import torch
from torch import Tensor


def matches(new_KE: Tensor, old_KE: Tensor) -> list[tuple[int, int]]:
    """Pairs (new, old) of centroids that are one code: nearest pairs first, each at most once, and only if they lie
    nearer to each other than half of the distance to the nearest neighbour in either book."""
    distance_KK = torch.cdist(new_KE.double(), old_KE.double())
    reach = [_neighbour(book.double()) / 2 for book in (new_KE, old_KE)]
    near_KK = distance_KK < torch.minimum(reach[0][:, None], reach[1][None, :])
    pairs = near_KK.nonzero()
    order = torch.argsort(distance_KK[near_KK], stable=True)
    found: dict[int, int] = {}
    taken: set[int] = set()
    for new, old in pairs[order].tolist():
        if new not in found and old not in taken:
            found[new] = old
            taken.add(old)
    return sorted(found.items())


def order_like(new_KE: Tensor, old_KE: Tensor) -> Tensor:
    """Places (K,) in the new book that make it look like the old one: matched centroids where their partners are."""
    pairs = matches(new_KE, old_KE)
    place_of = {old: new for new, old in pairs}
    matched = set(place_of.values())
    rest = iter([new for new in range(len(new_KE)) if new not in matched])
    return torch.tensor([place_of[old] if old in place_of else next(rest) for old in range(len(old_KE))])


def _neighbour(book_KE: Tensor) -> Tensor:
    """Distance of each centroid to the nearest other one."""
    if len(book_KE) == 1:
        return torch.full((1,), torch.inf, dtype=book_KE.dtype)
    return torch.cdist(book_KE, book_KE).fill_diagonal_(torch.inf).min(1).values


def code_churn(old_NL: Tensor, new_NL: Tensor, *, remap: bool = False) -> dict[str, list[float]]:
    """How many of the items that have both old and new codes changed them.

    Args:
        remap: first rename the new codes of each level to the old ones that most of their items had, greedily: what is
            left is change that no renaming undoes.

    Returns:
        level: share of the items whose code of a level is another.
        prefix: share whose codes up to a level are not the same: those whose rows of a prefix table change.

    Raises:
        ValueError: if the shapes differ, or no item has both.
    """
    if old_NL.shape != new_NL.shape:
        raise ValueError(f"old codes have shape {tuple(old_NL.shape)}, new ones {tuple(new_NL.shape)}")
    both_N = (old_NL >= 0).all(1) & (new_NL >= 0).all(1)
    old_NL, new_NL = old_NL[both_N], new_NL[both_N]
    if not len(old_NL):
        raise ValueError("no item has old and new codes")
    if remap:
        levels = zip(old_NL.unbind(1), new_NL.unbind(1), strict=True)
        new_NL = torch.stack([_renamed(old_N, new_N) for old_N, new_N in levels], 1)
    same_NL = old_NL == new_NL
    prefix_NL = same_NL.long().cumprod(1)
    return {
        "level": (1 - same_NL.double().mean(0)).tolist(),
        "prefix": (1 - prefix_NL.double().mean(0)).tolist(),
    }


def _renamed(old_N: Tensor, new_N: Tensor) -> Tensor:
    size = int(torch.maximum(old_N.max(), new_N.max())) + 1
    pairs, counts = torch.unique(new_N * size + old_N, return_counts=True)
    name: dict[int, int] = {}
    taken: set[int] = set()
    for pair in pairs[torch.argsort(-counts, stable=True)].tolist():
        new, old = divmod(pair, size)
        if new not in name and old not in taken:
            name[new] = old
            taken.add(old)
    # A code without a partner is no old code: it gets a number that none has.
    table = torch.tensor([name.get(new, size + new) for new in range(size)])
    return table[new_N]
