"""How many candidates each stage of a funnel should hand on for a budget of FLOPs or of milliseconds."""

# Shapes: R requests.

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset
from fullrank.data.simulate import World
from fullrank.funnel.cascade import total
from fullrank.funnel.cost import Linear, fitted, flops_of, handed, milliseconds
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.outcomes import (
    BEST,
    Outcomes,
    Setting,
    affordable,
    as_sizes,
    draw,
    front,
    outcomes,
    point_of,
    settings_within,
    sizes_of,
)
from fullrank.funnel.stages import FINAL, RETRIEVAL, StageSizes
from fullrank.metrics import MeanRows, bootstrap

# Settings that are tried, settings whose times are taken, and requests for each of those.
TRIED, TIMED, TIMED_REQUESTS = 400, 8, 12


def with_sizes(funnel: Funnel, sizes: StageSizes) -> Funnel:
    """The same funnel, which hands on other numbers of candidates.

    Raises:
        ValueError: if there are not as many as it has stages.
    """
    sizes.keeps(len(funnel.early))
    changed = copy.copy(funnel)
    changed.sizes = sizes
    return changed


def tune(
    funnel: Funnel,
    dataset: Dataset,
    split: str = "valid",
    *,
    flops: float | None = None,
    milliseconds: float | None = None,
    requests: int = 200,
    k: int = BEST,
    seed: int = 0,
    world: World | None = None,
) -> dict[str, Any]:
    """The sizes with the most value that cost a request no more than the budget.

    Nothing is trained. Every stage scores the whole catalogue, or all that a deep retrieval finds, for each request
    once; that says what is left of the final stage's best k items under any sizes. Sizes a constant factor apart are
    tried, and the funnel's own.

    Args:
        flops, milliseconds: the budget, one of the two: floating-point operations of a request, or its time when it is
            asked alone on this machine, by a line through measured times of each stage.
        requests: rows of the split, drawn at random; fewer, if the catalogue is large.
        k: items of a list.
        world: of a simulated log, for the true value of what is chosen. Nothing is chosen by it.

    Returns:
        `chosen`, `current` and `front`, the sizes than which none has more value at no more cost: `sizes` (of
        retrieval and each early stage), `flops`, `milliseconds`, `recall`, `value` and `share` of what the final stage
        would find in the whole catalogue, `true_value`. `gain`: `value` of the chosen over the current sizes, and its
        95 % `interval`, users resampled. `budget`, `by`, `stages`, `requests`, `catalogue`, `k`, `split`; `costs`: of
        each stage and unit, `fixed` and by `each` candidate. `best_true_value` of the best possible list.

    Raises:
        ValueError: if there is not one budget, it is below the cheapest sizes, or the dataset does not fit.
    """
    if (flops is None) == (milliseconds is None):
        raise ValueError("expected one budget: flops or milliseconds")
    by, budget = ("flops", flops) if flops is not None else ("milliseconds", milliseconds)
    assert budget is not None
    funnel, dataset = funnel.without_deadlines(), dataset.as_known_to(funnel.encoders)
    if dataset.rows(split) == 0:
        raise ValueError(f'{dataset.path}: split "{split}" is empty')
    asked = draw(dataset, split, affordable(funnel, requests), seed, world)
    catalogue, current = funnel.items.active_I.numel(), sizes_of(funnel)
    settings = list(dict.fromkeys([*settings_within(funnel, most=TRIED, k=k), current]))
    lines = {"flops": flops_of(funnel, asked.users[:1]), "milliseconds": times_of(funnel, asked.users, settings, k)}
    costs = {unit: {one: total(line, one, catalogue) for one in settings} for unit, line in lines.items()}
    cheapest = min(costs[by].values())
    if budget < cheapest:
        raise ValueError(f"no sizes cost {budget:,g} {by} a request or less: the cheapest cost {cheapest:,.4g}")
    found = outcomes(funnel, asked, settings, k)
    best = front(found, costs[by])
    chosen = [setting for setting in best if costs[by][setting] <= budget][-1]

    def point(setting: Setting) -> dict[str, Any]:
        return point_of(found, setting, {unit: cost[setting] for unit, cost in costs.items()})

    result = {
        "by": by,
        "budget": budget,
        "split": split,
        "requests": len(found),
        "catalogue": catalogue,
        "k": k,
        "stages": [RETRIEVAL, *funnel.early],
        "chosen": point(chosen),
        "current": point(current),
        "gain": _gain(found, chosen, current, seed),
        "front": [point(setting) for setting in best],
        "costs": {
            unit: {stage: {"fixed": line.fixed, "each": line.each} for stage, line in each.items()}
            for unit, each in lines.items()
        },
    }
    if found.true_best_R is not None:
        result["best_true_value"] = float(found.true_best_R.mean())
    return result


def times_of(funnel: Funnel, users: Batch, settings: Sequence[Setting], k: int) -> dict[str, Linear]:
    """Milliseconds of each stage for a request asked alone: a line through the medians at a few settings."""
    catalogue, stages = funnel.items.active_I.numel(), [RETRIEVAL, *funnel.early, FINAL]
    ordered = sorted(settings, key=lambda setting: sum(handed(setting, catalogue)))
    chosen = [
        ordered[place] for place in np.linspace(0, len(ordered) - 1, min(TIMED, len(ordered))).round().astype(int)
    ]
    points: dict[str, dict[float, list[float]]] = {stage: {} for stage in stages}
    for setting in chosen:
        taken = milliseconds(with_sizes(funnel, as_sizes(setting)), users[:TIMED_REQUESTS], k)
        counts = [min(setting[0], catalogue), *handed(setting, catalogue)]
        for stage, count in zip(stages, counts, strict=True):
            if count:
                points[stage].setdefault(count, []).extend(taken[stage].tolist())
    return {
        stage: fitted({count: float(np.median(times)) for count, times in by_count.items()})
        if by_count
        else Linear(0, 0)
        for stage, by_count in points.items()
    }


def _gain(found: Outcomes, chosen: Setting, current: Setting, seed: int) -> dict[str, Any]:
    new_R, old_R = (found.value_RS[:, found.settings.index(setting)] for setting in (chosen, current))
    drawn = bootstrap(MeanRows({"value": torch.from_numpy(new_R - old_R)}, found.user_R), seed=seed)
    return {"value": drawn.estimate["value"], "interval": list(drawn.interval("value"))}
