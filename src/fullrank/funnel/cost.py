"""What each stage of a funnel costs a request, in floating-point operations and in milliseconds."""

# Shapes: B requests, P candidates of a user.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from fullrank.batch import Batch
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.item_vectors import ItemVectors
from fullrank.funnel.stages import FINAL, RETRIEVAL, TwoSided
from fullrank.retrieval.vector_retriever import VectorRetriever

# Requests before times count.
WARM_UP = 3


@dataclass(frozen=True)
class Linear:
    """A cost that is `fixed` for a request and grows by `each` with every candidate."""

    fixed: float
    each: float

    def __call__(self, candidates: float) -> float:
        return self.fixed + self.each * candidates


def handed(sizes: Sequence[int], catalogue: int) -> list[int]:
    """Candidates that each stage scores, retrieval aside, if the stages hand on so many: 0 of one that drops none."""
    there = [min(size, catalogue) for size in sizes]
    scored = [before if kept < before else 0 for before, kept in pairwise(there)]
    return [*scored, there[-1]]


@torch.no_grad()
def flops_of(funnel: Funnel, users: Batch) -> dict[str, Linear]:
    """FLOPs of each stage for a request, those of matrix products, by the candidates that it scores.

    Retrieval by inner products takes 2 x width for each item that the index scores, and its user's tower; any other
    what PyTorch counts. The final stage, and an early one that scores pairs, take `flops_per_example` for each
    candidate; one that looks at items beforehand its user's side once, and a little for each candidate.

    Args:
        users: one request, to be counted with.
    """
    retriever = funnel.retriever
    if isinstance(retriever, VectorRetriever):
        scored = float(retriever.search(users, funnel.sizes.retrieve).cost_B.double().mean())
        fixed = _counted(lambda: retriever.user_vectors(users)) + 2 * retriever.width * scored
    else:
        fixed = _counted(lambda: retriever.search(users, funnel.sizes.retrieve))
    found = {RETRIEVAL: Linear(fixed, 0.0)}
    for stage, ranker in funnel.early.items():
        if stage in funnel.prepared:
            # Two vectors and three may be multiplied in other ways than one.
            two, three = (_of_prepared(*funnel.prepared[stage], users, count) for count in (2, 3))
            found[stage] = Linear(max(0.0, two - 2 * (three - two)), three - two)
        else:
            found[stage] = Linear(0.0, float(ranker.flops_per_example()))
    found[FINAL] = Linear(0.0, float(funnel.final.flops_per_example()))
    return found


def _of_prepared(ranker: TwoSided, vectors: ItemVectors, users: Batch, count: int) -> float:
    vector_1V = vectors.take(torch.zeros(1, dtype=torch.int64))
    return _counted(lambda: ranker.score(users, vector_1V.expand(1, count, -1)))


def _counted(work: Callable[[], Any]) -> float:
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    return float(counter.get_total_flops())


def milliseconds(funnel: Funnel, users: Batch, k: int) -> dict[str, np.ndarray[Any, Any]]:
    """Wall milliseconds of each stage for each request, asked one by one, shape (B,)."""
    taken: dict[str, list[float]] = {stage: [] for stage in (RETRIEVAL, *funnel.early, FINAL)}
    for row in (*range(min(WARM_UP, len(users))), *range(len(users))):
        funnel.rank(users[row : row + 1], k, lambda stage, seconds: taken[stage].append(1000 * seconds))
    return {stage: np.array(times[-len(users) :]) for stage, times in taken.items()}


def percentiles(times: np.ndarray[Any, Any]) -> dict[str, float]:
    """`p50` and `p99`."""
    return {"p50": float(np.quantile(times, 0.5)), "p99": float(np.quantile(times, 0.99))}


def fitted(points: Mapping[float, float]) -> Linear:
    """The line through costs by candidates with least squares; neither of its numbers is negative."""
    x, y = np.array(list(points)), np.array(list(points.values()))
    spread = ((x - x.mean()) ** 2).sum()
    each = float(((x - x.mean()) * (y - y.mean())).sum() / spread) if spread else 0.0
    fixed = float(y.mean() - each * x.mean())
    if each < 0:
        return Linear(float(y.mean()), 0.0)
    if fixed < 0:
        return Linear(0.0, float((x * y).sum() / (x * x).sum()))
    return Linear(fixed, each)
