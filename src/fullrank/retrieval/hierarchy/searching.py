"""Search of one version of an index: a beam through the levels of nodes, then all items of the leaves that it kept."""

# Shapes: B users, M nodes of a level, J nodes that a user's beam keeps, K results, N levels.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fullrank.retrieval import exact
from fullrank.retrieval.base import NO_ITEM, SearchResult, check_k
from fullrank.retrieval.hierarchy.ranges import Best, Ranges, Rows, scored
from fullrank.retrieval.hierarchy.scorer import Scorer
from fullrank.retrieval.hierarchy.snapshot import Selection, Snapshot
from fullrank.retrieval.hierarchy.storage import Segment

# A filter that leaves fewer items than this many times what the beam would score is a scan of what it leaves, which is
# exact and as fast: alone the two meet at 1.6, in batches at 2.5 (`benchmarks.retrieval.filters`).
SCAN_BELOW = 1.5
# More users are halved before the leaves of each are taken one part after another.
FEW_USERS = 64


@dataclass(frozen=True)
class SearchStats:
    """What a search cost.

    Attributes:
        nodes_BN: int64, nodes of each level scored for each user.
        items_B: int64, stored items scored for each user, dead ones and those that a filter hides among them.
        flops: of all users' scores of nodes and items, None where the scorer does not state its costs.
        index_version: which state of the index was searched; it counts every change.
        model_version: of the model that its vectors and nodes come from.
    """

    nodes_BN: Tensor
    items_B: Tensor
    flops: int | None
    index_version: int
    model_version: str | None


class IndexResult(SearchResult):
    """A `SearchResult` with the statistics of the search."""

    stats: SearchStats

    def __new__(cls, item_keys_BK: Tensor, scores_BK: Tensor, stats: SearchStats) -> IndexResult:
        result = super().__new__(cls, item_keys_BK, scores_BK, stats.items_B)
        result.stats = stats
        return result

    def __getnewargs__(self) -> tuple[Tensor, Tensor, SearchStats]:
        return self.item_keys_BK, self.scores_BK, self.stats  # of a copy

    @classmethod
    def beside(cls, results: Sequence[IndexResult]) -> IndexResult:
        """The results of several batches, at least one, as one."""
        stats = [result.stats for result in results]
        flops = [each.flops for each in stats]
        return cls(
            _beside([result.item_keys_BK for result in results], NO_ITEM),
            _beside([result.scores_BK for result in results], -torch.inf),
            replace(
                stats[0],
                nodes_BN=torch.cat([each.nodes_BN for each in stats]),
                items_B=torch.cat([each.items_B for each in stats]),
                flops=None if None in flops else sum(each for each in flops if each is not None),
            ),
        )


@dataclass
class _Found:
    """Results of a block of users."""

    best: Best
    nodes_BN: Tensor
    items_B: Tensor


@torch.no_grad()
def search_snapshot(
    snapshot: Snapshot,
    scorer: Scorer,
    users: Any,
    k: int,
    beam: Sequence[int] | None,
    allowed: Tensor | Selection | None,
    max_items: int | None,
) -> IndexResult:
    """`beam_search`, among the allowed items if there is a choice.

    Raises:
        ValueError: see `HierarchicalIndex.search`.
    """
    check_k(k)
    levels = snapshot.tree.codes.levels
    if beam is not None and (len(beam) != levels or any(width < 1 for width in beam)):
        raise ValueError(f"beam is {tuple(beam)}, expected {levels} widths of at least 1, one for each level")
    if max_items is not None and max_items < 1:
        raise ValueError(f"max_items must be at least 1, got {max_items}")
    if allowed is None:
        return beam_search(snapshot, scorer, users, k, beam, max_items)
    if isinstance(allowed, Selection) or allowed.ndim == 1:
        selection = allowed if isinstance(allowed, Selection) else Selection(allowed)
        part = selection.within(snapshot)
        if beam is None or len(part) < SCAN_BELOW * _expected_rows(snapshot, beam):
            return beam_search(selection.copied(snapshot), scorer, users, k, None, None)
        return beam_search(part, scorer, users, k, beam, max_items)
    rows = torch.split(torch.arange(scorer.count(users)), 1)
    if not rows:
        return beam_search(snapshot, scorer, users, k, beam, max_items)
    return IndexResult.beside(
        [
            search_snapshot(snapshot, scorer, scorer.take(users, row), k, beam, allowed_A, max_items)
            for row, allowed_A in zip(rows, allowed, strict=True)
        ]
    )


def _expected_rows(snapshot: Snapshot, beam: Sequence[int]) -> float:
    """Items that a beam scores if leaves are alike."""
    return snapshot.stored * min(1.0, beam[-1] / max(1, len(snapshot.tree.levels[-1])))


def beam_search(
    snapshot: Snapshot, scorer: Scorer, users: Any, k: int, beam: Sequence[int] | None, max_items: int | None
) -> IndexResult:
    """The k best items of the leaves that the beam keeps; of all leaves if `beam` is None.

    A user whose leaves hold fewer than k items gets a beam twice as wide, and so on.
    """
    rows, levels = scorer.count(users), snapshot.tree.levels
    sizes = [len(level) for level in levels]
    beam = [min(width, size) for width, size in zip(sizes if beam is None else beam, sizes, strict=True)]
    k = min(k, len(snapshot))
    nodes_BN = torch.zeros((rows, len(levels)), dtype=torch.int64)
    items_B = torch.zeros(rows, dtype=torch.int64)
    keys_BK = torch.full((rows, k), NO_ITEM)
    scores_BK = torch.full((rows, k), -torch.inf)
    todo_U = torch.arange(rows if k else 0)
    while todo_U.numel():
        short = []
        for some_U in torch.split(todo_U, _users_at_once(snapshot, beam)):
            found = _beam(snapshot, scorer, _taken(scorer, users, some_U, rows), some_U.numel(), k, beam, max_items)
            width = found.best.keys_BK.shape[1]
            keys_BK[some_U, :width], scores_BK[some_U, :width] = found.best.keys_BK, found.best.scores_BK
            nodes_BN[some_U] += found.nodes_BN
            items_B[some_U] += found.items_B
            missing_U = (keys_BK[some_U] == NO_ITEM).any(1)
            short.append(some_U[missing_U])
        if max_items is not None or beam == sizes:
            break
        todo_U = torch.cat(short)
        beam = [min(2 * width, size) for width, size in zip(beam, sizes, strict=True)]
    return IndexResult(keys_BK, scores_BK, _stats(snapshot, scorer, nodes_BN, items_B))


def _taken(scorer: Scorer, users: Any, some_U: Tensor, rows: int) -> Any:
    return users if some_U.numel() == rows else scorer.take(users, some_U)


def _stats(snapshot: Snapshot, scorer: Scorer, nodes_BN: Tensor, items_B: Tensor) -> SearchStats:
    pairs = [*nodes_BN.sum(0).tolist(), int(items_B.sum())]
    flops: int | None = 0
    for level, count in zip([*range(nodes_BN.shape[1]), None], pairs, strict=True):
        each = scorer.flops(level) if count else 0
        flops = None if each is None or flops is None else flops + each * count
    return SearchStats(nodes_BN, items_B, flops, snapshot.index_version, snapshot.model_version)


def _users_at_once(snapshot: Snapshot, beam: Sequence[int]) -> int:
    """So many that the scores of a level's nodes fit the memory of `SCORES_AT_ONCE`."""
    widest, above = len(snapshot.tree.levels[0]), beam[0]
    for parents, level, width in zip(snapshot.tree.levels, snapshot.tree.levels[1:], beam[1:], strict=False):
        widest = max(widest, min(len(level), above * parents.most_children))
        above = width
    return max(1, exact.SCORES_AT_ONCE // max(1, widest))


def _beam(
    snapshot: Snapshot, scorer: Scorer, users: Any, rows: int, k: int, beam: Sequence[int], max_items: int | None
) -> _Found:
    levels = snapshot.tree.levels
    nodes_BN = torch.zeros((rows, len(levels)), dtype=torch.int64)
    everything = all(width == len(level) for width, level in zip(beam, levels, strict=True))
    if everything and max_items is None and not scorer.ensembles:  # what nodes score is of no use
        kept_BJ = torch.arange(len(levels[-1])).expand(rows, -1)
        ancestors_BJN = None
    else:
        kept_BJ, ancestors_BJN = _kept_leaves(snapshot, scorer, users, rows, beam, max_items, nodes_BN)
    leaves_BJ = snapshot.tree.leaves_L[kept_BJ.clamp_min(0)].masked_fill(kept_BJ < 0, -1)
    best, items_B = Best.none(rows), torch.zeros(rows, dtype=torch.int64)
    for segment in snapshot.segments:
        ranges = segment.ranges(leaves_BJ)
        items_B += ranges.size_BJ.sum(1)
        best = _with_items(best, segment, ranges, ancestors_BJN, scorer, users, k)
    return _Found(best, nodes_BN, items_B)


def _kept_leaves(
    snapshot: Snapshot,
    scorer: Scorer,
    users: Any,
    rows: int,
    beam: Sequence[int],
    max_items: int | None,
    nodes_BN: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Places of the leaves that each user's beam keeps, ascending, -1 for none; and own scores of them and of their
    ancestors (B, J, N) if the scorer ensembles."""
    levels = snapshot.tree.levels
    begin_BJ, size_BJ = torch.zeros((rows, 1), dtype=torch.int64), torch.full((rows, 1), len(levels[0]))
    ancestors_BJN = torch.zeros(rows, 1, 0) if scorer.ensembles else None
    kept_BJ = begin_BJ
    for number, (level, width) in enumerate(zip(levels, beam, strict=True)):
        ranges = Ranges(begin_BJ, size_BJ)
        nodes_BN[:, number] = size_BJ.sum(1)

        def score(some: Any, vectors: Tensor, number: int = number) -> Tensor:
            return scorer.node_scores(number, some, vectors)

        own_BW, live_BW = scored(ranges, Rows(level.vectors_MV, score), scorer, users)
        scores_BWN = _with_ancestors(own_BW, ranges, ancestors_BJN)
        total_BW = own_BW if scores_BWN is None else scorer.combined(number, scores_BWN).float()
        if bool(total_BW.isnan().any()):
            raise ValueError(f"the scorer gave NaN for a node of level {number}")
        columns_BJ = exact.top_k(total_BW.masked_fill(~live_BW, -torch.inf), width)[1]
        found_BJ = live_BW.gather(1, columns_BJ)
        kept_BJ = ranges.rows(columns_BJ).masked_fill(~found_BJ, -1)
        if max_items is not None and number == len(levels) - 1:
            kept_BJ = _within(snapshot, kept_BJ, max_items)
        # In order of their rows, so that neighbours are scored as one slice; those that are none first.
        kept_BJ, order_BJ = kept_BJ.sort(dim=1)
        if scores_BWN is not None:
            places_BJ = columns_BJ.gather(1, order_BJ)
            ancestors_BJN = scores_BWN.gather(1, places_BJ[..., None].expand(-1, -1, number + 1))
        if number < len(levels) - 1:
            begin_BJ = level.children_M1[kept_BJ.clamp_min(0)]
            size_BJ = (level.children_M1[kept_BJ.clamp_min(0) + 1] - begin_BJ).masked_fill(kept_BJ < 0, 0)
    return kept_BJ, ancestors_BJN


def _with_ancestors(own_BW: Tensor, ranges: Ranges, ancestors_BJN: Tensor | None) -> Tensor | None:
    """Own scores of columns behind those of the range that they are of."""
    if ancestors_BJN is None:
        return None
    columns_BW = torch.arange(own_BW.shape[1]).expand(own_BW.shape[0], -1)
    of_BW = ranges.ranges_of(columns_BW)
    above_BWN = ancestors_BJN.gather(1, of_BW[..., None].expand(-1, -1, ancestors_BJN.shape[2]))
    return torch.cat([above_BWN, own_BW[..., None]], 2)


def _within(snapshot: Snapshot, kept_BJ: Tensor, max_items: int) -> Tensor:
    """Leaves, best first, as long as they hold at most `max_items` rows; the best one always."""
    leaves_BJ = snapshot.tree.leaves_L[kept_BJ.clamp_min(0)].masked_fill(kept_BJ < 0, -1)
    size_BJ = sum(segment.ranges(leaves_BJ).size_BJ for segment in snapshot.segments)
    assert isinstance(size_BJ, Tensor)
    beyond_BJ = size_BJ.cumsum(1) > max_items
    beyond_BJ[:, 0] = False
    return kept_BJ.masked_fill(beyond_BJ, -1)


def _with_items(
    best: Best,
    segment: Segment,
    ranges: Ranges,
    ancestors_BJN: Tensor | None,
    scorer: Scorer,
    users: Any,
    k: int,
) -> Best:
    """Score the items of ranges, as many at once as memory allows, and keep the best."""
    rows = ranges.begin_BJ.shape[0]
    stored = Rows(segment.vectors_ID, scorer.item_scores, segment.living_I)
    most = max(1, exact.SCORES_AT_ONCE // max(1, rows))
    widest_J = ranges.size_BJ.max(0).values if rows else ranges.size_BJ.sum(0)
    too_wide = widest_J.numel() > 0 and int(widest_J.max()) > most
    if rows > 1 and (too_wide or (rows > FEW_USERS and int(widest_J.sum()) > most)):
        halves = [torch.arange(0, rows // 2), torch.arange(rows // 2, rows)]
        parts = [
            _with_items(
                Best(best.keys_BK[half], best.scores_BK[half]),
                segment,
                ranges.of_users(half),
                None if ancestors_BJN is None else ancestors_BJN[half],
                scorer,
                scorer.take(users, half),
                k,
            )
            for half in halves
        ]
        keys_BK = _beside([part.keys_BK for part in parts], NO_ITEM)
        return Best(keys_BK, _beside([part.scores_BK for part in parts], -torch.inf))
    for first, last in _chunks(widest_J.tolist(), most):
        part = ranges.part(first, last)
        own_BW, live_BW = scored(part, stored, scorer, users)
        if not own_BW.shape[1]:
            continue
        above = None if ancestors_BJN is None else ancestors_BJN[:, first:last]
        scores_BWN = _with_ancestors(own_BW, part, above)
        levels = 0 if scores_BWN is None else scores_BWN.shape[2] - 1
        total_BW = own_BW if scores_BWN is None else scorer.combined(levels, scores_BWN).float()

        def keys_of(columns: Tensor, some: slice, part: Ranges = part) -> Tensor:
            # A column behind the last of a user is of no row; its score says so.
            return segment.keys_I[part.of_users(some).rows(columns).clamp(0, len(segment) - 1)]

        best = best.with_more(total_BW, live_BW, keys_of, k)
    return best


def _beside(parts: list[Tensor], none: float) -> Tensor:
    """Rows of several tensors behind one another, narrower ones filled up."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=none) for part in parts])


def _chunks(widths: list[int], most: int) -> list[tuple[int, int]]:
    """Neighbouring ranges, as many as have at most so many rows, one at least."""
    chunks, first, total = [], 0, 0
    for place, width in enumerate(widths):
        if place > first and total + width > most:
            chunks.append((first, place))
            first, total = place, 0
        total += width
    if widths:
        chunks.append((first, len(widths)))
    return chunks
