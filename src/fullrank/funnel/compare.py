"""Whether one bundle is better than another on the same rows, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fullrank.data.dataset import Dataset
from fullrank.data.encoders import Encoders
from fullrank.data.simulate import World
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.outcomes import affordable, draw, outcomes, sizes_of
from fullrank.funnel.predictions import predictions
from fullrank.funnel.recall import hits
from fullrank.funnel.scorer import Scorer
from fullrank.funnel.stages import RETRIEVAL
from fullrank.metrics import Bootstrap, MeanRows, bootstrap
from fullrank.models.base import Ranker
from fullrank.schema import Label

# Metrics that are compared, by kind of label; of all of them less is better but of these.
COMPARED = {"binary": ("ne", "auc", "calibration_error"), "regression": ("rmse", "mae")}
MORE_IS_BETTER = {"auc"}

NO_DIFFERENCE, UNDEFINED = "no difference shown", "undefined"


def compare_funnels(
    a: Funnel | Scorer,
    b: Funnel | Scorer,
    dataset: Dataset,
    split: str = "test",
    *,
    requests: int = 2000,
    seed: int = 0,
    world: World | None = None,
) -> dict[str, Any]:
    """The final stages of two bundles on the same rows, and of two funnels the recalls on the same requests.

    Each difference is that of B minus A, and its interval the middle 95 % of the differences on resamples that are the
    same for both: of users where the log names them, else of rows. What makes a user easy or hard for both cancels, so
    a difference may be sure though the intervals of A and B overlap.

    Args:
        requests: clicked rows, drawn at random, for the recalls.
        seed: of the choice of requests, and of the resamples.
        world: of a simulated log, for the true value of two funnels' lists.

    Returns:
        `split`, `rows`, and what was `resampled`.
        `tasks.<task>.<metric>`: for each label that both predict NE, AUC and `calibration_error`, the distance of the
        calibration from 1, or of a number RMSE and MAE; each with `a`, `b`, `difference`, `interval` and a `verdict`:
        "A is better" or "B is better" if the interval excludes zero, else "no difference shown", or "undefined".
        `recall.<place>`: the same for two funnels, over the requests whose item both may retrieve, and `requests`.
        `cascade`: for two funnels, over the same requests: `recall` and `value` by stage, the shares of the items and
            of the value of what its own final stage would find in the whole catalogue that are left after the stage,
            and in a simulated world the `true_value` of the lists; `requests`.
        `verdict`: that of the first task, by NE or RMSE.

    Raises:
        ValueError: if the dataset has another schema, labels aside, or other encoders than a bundle (its own extended
            are not others: what is new is unknown to it); the two share no label with it; or there is no such split, or
            no row of it has a label of both.
    """
    a, b = (each if isinstance(each, Scorer) else each.without_deadlines() for each in (a, b))
    models = [funnel.model if isinstance(funnel, Scorer) else funnel.final for funnel in (a, b)]
    # What came after a bundle is unknown to it.
    views = [dataset.as_known_to(_as_for(funnel.encoders, dataset.schema.labels)) for funnel in (a, b)]
    if dataset.rows(split) == 0:
        raise ValueError(f'{dataset.path}: split "{split}" is empty')
    shared = _shared_labels(models, dataset)
    said = [predictions(model, view, split, shared) for model, view in zip(models, views, strict=True)]
    tasks = {
        label.name: _compared(*(bootstrap(one.rows(task), seed=seed) for one in said), metrics=COMPARED[label.kind])
        for task, label in enumerate(shared)
        if bool(said[0].observed(task).any())
    }
    if not tasks:
        raise ValueError(f'{dataset.path}: no row of split "{split}" has a label that both predict')
    result = {
        "split": split,
        "rows": dataset.rows(split),
        "resampled": said[0].resampled,
        "tasks": tasks,
        "verdict": next(iter(next(iter(tasks.values())).values()))["verdict"],
    }
    if isinstance(a, Funnel) and isinstance(b, Funnel):
        result["recall"] = _recalls((a, b), views, split, requests, seed)
        result["cascade"] = _cascades((a, b), views, split, max(1, requests // 20), seed, world)
    return result


def _recalls(
    funnels: Sequence[Funnel], views: Sequence[Dataset], split: str, requests: int, seed: int
) -> dict[str, Any]:
    found = [hits(funnel, view, split, requests, seed) for funnel, view in zip(funnels, views, strict=True)]
    of_a, of_b = found
    if of_a is None or of_b is None:
        return {}
    both_R = of_a.retrievable_R & of_b.retrievable_R
    recalls = [one.recall(both_R, seed=seed) for one in (of_a, of_b)]
    if recalls[0] is None or recalls[1] is None:
        return {}
    places = [place for place in of_a.found if place in of_b.found and place != "popularity_at_100"]
    compared = _compared(recalls[0], recalls[1], metrics=places, more_is_better=True)
    return {"requests": int(both_R.sum()), **compared}


def _cascades(
    funnels: Sequence[Funnel], views: Sequence[Dataset], split: str, requests: int, seed: int, world: World | None
) -> dict[str, Any]:
    requests = min(affordable(funnel, requests) for funnel in funnels)
    sides: dict[str, list[dict[str, Tensor]]] = {"recall": [], "value": [], "true_value": []}
    users: list[Tensor | None] = []
    for funnel, view in zip(funnels, views, strict=True):
        sizes = sizes_of(funnel)
        stages = dict(zip([RETRIEVAL, *funnel.early], [sizes[: n + 1] for n in range(len(sizes))], strict=True))
        found = outcomes(funnel, draw(view, split, requests, seed, world), list(stages.values()))
        share_RS = found.value_RS / np.where(found.whole_R > 0, found.whole_R, np.nan)[:, None]
        for name, values_RS in (("recall", found.recall_RS), ("value", share_RS)):
            by_stage = dict(zip(stages, torch.from_numpy(values_RS.copy()).unbind(1), strict=True))
            sides[name].append(by_stage)
        if found.true_RS is not None:
            sides["true_value"].append({"list": torch.from_numpy(found.true_RS[:, -1].copy())})
        users.append(found.user_R)
    result: dict[str, Any] = {"requests": len(found)}
    for name, both in sides.items():
        if both:
            drawn = [bootstrap(MeanRows(values, users[0]), seed=seed) for values in both]
            shared = [place for place in both[0] if place in both[1]]
            result[name] = _compared(*drawn, metrics=shared, more_is_better=True)
    return result


def _compared(
    a: Bootstrap, b: Bootstrap, *, metrics: Sequence[str], more_is_better: bool = False
) -> dict[str, dict[str, Any]]:
    gaps = b.minus(a)
    result = {}
    for metric in metrics:
        low, high = gaps.interval(metric)
        up_is_better = more_is_better or metric in MORE_IS_BETTER
        better, worse = ("B is better", "A is better") if up_is_better else ("A is better", "B is better")
        verdict = better if low > 0 else worse if high < 0 else UNDEFINED if math.isnan(low) else NO_DIFFERENCE
        result[metric] = {
            "a": a.estimate[metric],
            "b": b.estimate[metric],
            "difference": gaps.estimate[metric],
            "interval": [low, high],
            "verdict": verdict,
        }
    return result


def _shared_labels(models: Sequence[Ranker], dataset: Dataset) -> list[Label]:
    """Labels of the dataset that every model predicts."""
    known = [{(label.name, label.kind) for label in model.schema.labels} for model in models]
    shared = [label for label in dataset.schema.labels if all((label.name, label.kind) in one for one in known)]
    if not shared:
        told = [", ".join(label.name for label in model.schema.labels) for model in models]
        there = ", ".join(label.name for label in dataset.schema.labels)
        raise ValueError(f"A predicts {told[0]}, B {told[1]}, and {dataset.path} has {there}: they share no label")
    return shared


def _as_for(encoders: Encoders, labels: tuple[Label, ...]) -> Encoders:
    """The same encoders for a log with other labels, which no feature depends on."""
    schema = encoders.schema.model_copy(update={"labels": labels})
    return Encoders(schema, encoders.numbers, encoders.buckets, encoders.vocabularies)
