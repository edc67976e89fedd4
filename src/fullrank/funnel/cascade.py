"""A funnel as a whole: what each stage loses of what the final stage would find in the whole catalogue, and cost."""

from __future__ import annotations

from typing import Any

import numpy as np

from fullrank.data.dataset import Dataset
from fullrank.data.simulate import World
from fullrank.funnel.cost import Linear, flops_of, handed, milliseconds, percentiles
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.outcomes import (
    BEST,
    Doubles,
    Setting,
    affordable,
    draw,
    front,
    outcomes,
    point_of,
    settings_within,
    sizes_of,
)
from fullrank.funnel.stages import FINAL, RETRIEVAL

# Settings of the curve of value against cost, and requests whose times are taken.
CURVE, TIMED = 60, 100


def evaluate_cascade(
    funnel: Funnel,
    dataset: Dataset,
    split: str = "test",
    *,
    requests: int = 100,
    seed: int = 0,
    world: World | None = None,
) -> dict[str, Any]:
    """What each stage loses of what the final stage would find in the whole catalogue, and what it costs.

    The reference is the final model on all active items. After each stage the list is judged that the final stage
    would make of what is left: by its own value, and in a simulated world by the true value.

    Args:
        requests: rows of the log, drawn at random; fewer, if the catalogue is large.
        world: of a simulated log.

    Returns:
        `requests`, `catalogue` (active items), `k`; `whole`: `value`, `true_value` of the final stage's list from the
        whole catalogue; `best`: `true_value` of the best possible list.
        `stages.<stage>`: `recall` of that list's items in what the stage hands on, `value` of the list from that,
        `share` of the whole one's, `lost` against the stage before; `true_value` and `true_lost` likewise. Of the
        final stage `true_lost` is what it loses by its own errors: the best possible list less its own from the whole
        catalogue. `intervals` of the means, users resampled. `candidates` that it scores, `flops` of a request,
        `milliseconds` of one asked alone (`p50`, `p99`).
        `total`: `flops` and `milliseconds` of all stages.
        `curve`: the most value for FLOPs under other sizes: `sizes`, `flops`, `share`, and `true_value`.
    """
    asked = draw(dataset, split, affordable(funnel, requests), seed, world)
    sizes, catalogue = sizes_of(funnel), funnel.items.active_I.numel()
    prefixes = [sizes[: place + 1] for place in range(len(sizes))]
    grid = settings_within(funnel, most=CURVE)
    found = outcomes(funnel, asked, [*dict.fromkeys([*prefixes, *grid])])
    flops = flops_of(funnel, asked.users[:1])
    times = milliseconds(funnel, asked.users[:TIMED], BEST)
    stages: dict[str, dict[str, Any]] = {}
    value, true = float(found.whole_R.mean()), _mean(found.true_whole_R)
    for stage, setting in zip([RETRIEVAL, *funnel.early], prefixes, strict=True):
        drawn = found.drawn(setting, seed)
        now = drawn.estimate
        stages[stage] = {
            **now,
            "lost": _lost(value, now["value"]),
            "intervals": {metric: list(drawn.interval(metric)) for metric in now},
        }
        value = now["value"]
        if true is not None:
            stages[stage]["true_lost"], true = _lost(true, now["true_value"]), now["true_value"]
    last = stages[next(reversed(stages))]
    stages[FINAL] = {key: last[key] for key in ("recall", "value", "share", "true_value") if key in last} | {
        "lost": 0.0
    }
    result: dict[str, Any] = {
        "requests": len(found),
        "catalogue": catalogue,
        "k": BEST,
        "whole": {"value": float(found.whole_R.mean())},
    }
    if found.true_whole_R is not None and found.true_best_R is not None:
        result["whole"]["true_value"] = float(found.true_whole_R.mean())
        result["best"] = {"true_value": float(found.true_best_R.mean())}
        stages[FINAL]["true_lost"] = float((found.true_best_R - found.true_whole_R).mean())
    scored = dict(zip([*funnel.early, FINAL], handed(sizes, catalogue), strict=True))
    scored[RETRIEVAL] = funnel.retriever.cost()
    for stage, values in stages.items():
        values["candidates"] = scored[stage]
        values["flops"] = flops[stage](scored[stage]) if scored[stage] else 0.0
        values["milliseconds"] = percentiles(times[stage])
    result["stages"] = stages
    whole_times = sum(times.values())
    assert isinstance(whole_times, np.ndarray)
    result["total"] = {
        "flops": sum(values["flops"] for values in stages.values()),
        "milliseconds": percentiles(whole_times),
    }
    costs = {setting: total(flops, setting, catalogue) for setting in dict.fromkeys([*grid, sizes])}
    result["curve"] = [point_of(found, setting, {"flops": costs[setting]}) for setting in front(found, costs)]
    return result


def total(costs: dict[str, Linear], setting: Setting, catalogue: int) -> float:
    """What all stages cost a request under a setting, by what each costs; retrieval by what it hands on."""
    retrieval, *others = costs.values()
    scored = handed(setting, catalogue)
    return retrieval(min(setting[0], catalogue)) + sum(
        cost(count) for cost, count in zip(others, scored, strict=True) if count
    )


def _lost(before: float, after: float) -> float:
    """The difference; lists of the same items may differ in their last digits."""
    return 0.0 if abs(before - after) <= 1e-6 * abs(before) else before - after


def _mean(values: Doubles | None) -> float | None:
    return None if values is None else float(values.mean())
