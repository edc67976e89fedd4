"""What each stage thought of each candidate of one request, and why an item fell out."""

# Shapes: C candidates of the one request, T tasks.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fullrank.funnel.catalogue import NO_ROW
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.requests import Request
from fullrank.funnel.stages import FINAL, RETRIEVAL


@dataclass(frozen=True)
class Explained:
    """A candidate on its way.

    Attributes:
        item_id: as in the log.
        values: by stage: the score of retrieval, then values; None where the formula gave no number. Every stage is
            asked about every candidate, those that it was not handed too.
        ranks: by stage, from 1: where it stood among what the stage was handed.
        predictions: by stage after retrieval, by task.
        fell_out: the stage that dropped it; None for an item of the list.
        reason: why, in words.
    """

    item_id: int | str
    values: dict[str, float | None]
    ranks: dict[str, int]
    predictions: dict[str, dict[str, float]]
    fell_out: str | None
    reason: str | None


@torch.inference_mode()
def explain(funnel: Funnel, request: Request, k: int = 10) -> list[Explained]:
    """What retrieval found for a request, in its order, and what became of each.

    The list is the greedy one, without rules of a slate: what a policy drew or a rule forbade is not told.

    Raises:
        ValueError: as `Funnel.recommend`.
    """
    users, terms = funnel.encode([request]), funnel.terms([request])
    sizes, stages = funnel.sizes, (*funnel.early, FINAL)
    keeps = [*(max(keep, k) for keep in sizes.keeps(len(funnel.early))), k]
    found = funnel.searched(users, max(sizes.retrieve, *keeps), terms)
    rows_1C = funnel.items.places(found.item_keys_BK)
    there_C = rows_1C[0] != NO_ROW
    rows_1C = rows_1C[:, there_C]
    count = rows_1C.shape[1]
    values: dict[str, list[float]] = {RETRIEVAL: found.scores_BK[0, there_C].tolist()}
    ranks = {RETRIEVAL: {place: place + 1 for place in range(count)}}
    predictions: dict[str, list[list[float]]] = {}
    fell_out: dict[int, tuple[str, str]] = {}
    handed = list(range(count))
    for stage, keep in zip(stages, keeps, strict=True):
        value_1C, predicted_1CT = funnel.predictions_of(stage, users, rows_1C)
        values[stage], predictions[stage] = value_1C[0].tolist(), predicted_1CT[0].tolist()
        order = sorted(handed, key=values[stage].__getitem__, reverse=True)
        ranks[stage] = {place: rank for rank, place in enumerate(order, 1)}
        for place in order[keep:]:
            fell_out[place] = stage, f"{stage} ranked it {ranks[stage][place]} of {len(order)}, and {keep} go on"
        handed = order[:keep]
    tasks, names = funnel.scorer.tasks, funnel.items.ids
    return [
        Explained(
            names[row],
            {stage: own[place] if math.isfinite(own[place]) else None for stage, own in values.items()},
            {stage: own[place] for stage, own in ranks.items() if place in own},
            {stage: dict(zip(tasks, own[place], strict=True)) for stage, own in predictions.items()},
            *fell_out.get(place, (None, None)),
        )
        for place, row in enumerate(rows_1C[0].tolist())
    ]
