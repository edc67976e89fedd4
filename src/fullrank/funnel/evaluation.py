"""How good each stage of a funnel is on a split of a log, and how good the lists are."""

# Shapes: n rows.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fullrank.data.dataset import Dataset
from fullrank.data.encoders import KEY_COLUMNS
from fullrank.data.simulate import World
from fullrank.funnel.baselines import as_report, item_rates, one_class_warning, ranker_warning, retrieval_warning
from fullrank.funnel.cascade import evaluate_cascade
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.predictions import Predictions, intervals, predictions
from fullrank.funnel.recall import early_recall, hits
from fullrank.funnel.scorer import Scorer
from fullrank.funnel.slices import Grouping, groupings, slices
from fullrank.funnel.stages import FINAL
from fullrank.metrics import BinaryMetrics, Bootstrap, bootstrap, reliability
from fullrank.models.base import Ranker


def evaluate_funnel(
    funnel: Funnel | Scorer,
    dataset: Dataset,
    split: str = "test",
    *,
    requests: int = 2000,
    seed: int = 0,
    slice_by: Sequence[str] = (),
    world: World | None = None,
) -> dict[str, Any]:
    """Metrics of every stage on one split; a single ranker counts as a final stage, and there are no recalls.

    Every interval is the middle 95 % of resamples, of users where the log names them, else of rows: see
    `fullrank.metrics.resampling`.

    Args:
        requests: clicked rows, drawn at random, for the recalls.
        seed: of the choice of requests, and of the resamples.
        slice_by: columns to cut the rows by as well: features with one value a row, or further columns of the dataset.
        world: of a simulated log, for the true value of what the stages lose.

    Returns:
        `stages.<stage>.<task>`, the stage being `final` or an early one: of a binary task what `BinaryMetrics.compute`
        gives, of a number what `NumberRows` gives and `std`, the error of predicting the mean; `intervals` of the main
        ones and what was `resampled` for them; with the simulator's true probabilities also `oracle_ne`, `oracle_auc`
        and `gap_closed`, the share of the way from predicting the mean (NE 1) to the oracle.
        `baselines.<task>.item_rate`: metrics of the item's smoothed rate in training; not of the training part.
        `calibration_curve`: predicted and observed click rate of ten equal bins.
        `slices`: metrics of the final stage's first binary task for new and known users and items, for items from head,
        torso and tail (with half, the next 30 % and the rest of the training impressions), and for each value or range
        of the columns of `slice_by`; NE against the slice's own rate, and a `note` where rows are too few to say much.
        `recall`: share of the clicked items, among those that may be retrieved, that are in the first 100 of
        retrieval (and of the most clicked items), among all that retrieval hands on, among those that each early stage
        keeps, and in the final list; `recall_intervals` of these. The later stages sort by value, not by click, so they
        do drop cheap clicks.
        `early_recall`: how well the early stages stand in for the final one, which for this scores everything that was
        retrieved: share of its 10 most valuable items that they keep, and of their value; and of each of the `stages`
        by itself that share, Kendall's tau-b and the share of pairs ordered as by the final one.
        `cascade`: what each stage loses against the final one on the whole catalogue, and costs; see
            `evaluate_cascade`.
        `cost`: items that retrieval scored for a request: `mean` and `largest`.
        `warnings`: each a `stage`, a `message` and the `advice` that follows: a stage that does not beat what is
        trivial, a label that has one class or no rows.

    Raises:
        ValueError: if the dataset has another schema or was encoded by other encoders than the funnel's (these
            extended are not others: new ids are out of vocabulary), has no such split, no row of it has a label, or a
            column to slice by is not there.
    """
    if isinstance(funnel, Funnel):
        funnel = funnel.without_deadlines()
    dataset = dataset.as_known_to(funnel.encoders)
    if dataset.rows(split) == 0:
        raise ValueError(f'{dataset.path}: split "{split}" is empty')
    parts = groupings(dataset, split, slice_by)
    oracle = _oracle(dataset, split)
    models: dict[str, Ranker] = {} if isinstance(funnel, Scorer) else dict(funnel.early)
    models[FINAL] = funnel.model if isinstance(funnel, Scorer) else funnel.final
    report: dict[str, Any] = {"split": split, "rows": dataset.rows(split), "stages": {}}
    warnings: list[dict[str, str] | None] = []
    rates: dict[str, Bootstrap] | None = None
    for stage, model in models.items():
        said = predictions(model, dataset, split, dataset.schema.labels)
        rates = item_rates(said, dataset, split, seed) if rates is None else rates
        report["stages"][stage] = tasks = {}
        for task, label in enumerate(said.labels):
            if stage == FINAL:
                warnings.append(one_class_warning(stage, said, task, split))
            if not bool(said.observed(task).any()):
                continue
            drawn = bootstrap(said.rows(task), seed=seed)
            values: dict[str, Any] = said.metrics(task)
            values["intervals"], values["resampled"] = intervals(drawn), said.resampled
            true = oracle.get(label.name)
            if true is not None and not math.isnan(true["ne"]):
                values["oracle_ne"], values["oracle_auc"] = true["ne"], true["auc"]
                values["gap_closed"] = (1 - values["ne"]) / (1 - true["ne"])
            warnings.append(ranker_warning(stage, label.name, values, drawn, rates.get(label.name)))
            tasks[label.name] = values
        if not tasks:
            raise ValueError(f'{dataset.path}: no row of split "{split}" has a label')
        if stage == FINAL:
            report |= _of_final(said, parts, seed)
    report["baselines"] = as_report(rates or {})
    if isinstance(funnel, Funnel):
        report |= _lists(funnel, dataset, split, requests, seed, warnings)
        few = max(1, requests // 20)
        report["cascade"] = evaluate_cascade(funnel, dataset, split, requests=few, seed=seed, world=world)
    report["warnings"] = [warning for warning in warnings if warning is not None]
    return report


def _of_final(said: Predictions, parts: Sequence[Grouping], seed: int) -> dict[str, Any]:
    """Calibration curve and slices of the first binary task that has rows."""
    observed = [task for task, label in enumerate(said.labels) if label.kind == "binary"]
    observed = [task for task in observed if bool(said.observed(task).any())]
    if not observed:
        return {"slices": []}
    task = observed[0]
    seen_n = said.observed(task)
    curve = reliability(said.logits_nT[seen_n, task], said.labels_nT[seen_n, task], bins=10)
    return {
        "calibration_curve": {
            "predicted": curve.predicted_K.tolist(),
            "observed": curve.observed_K.tolist(),
            "rows": curve.rows_K.tolist(),
        },
        "slices": slices(said, task, parts, seed),
    }


def _lists(
    funnel: Funnel, dataset: Dataset, split: str, requests: int, seed: int, warnings: list[dict[str, str] | None]
) -> dict[str, Any]:
    found = hits(funnel, dataset, split, requests, seed)
    if found is None:
        return {"recall": {}, "recall_intervals": {}, "cost": {}, "early_recall": {}}
    recall = found.recall(seed=seed)
    if recall is not None:
        warnings.append(retrieval_warning(recall))
    shares = dict.fromkeys(found.found, math.nan) if recall is None else recall.estimate
    return {
        "recall": {
            "requests": float(len(found.retrievable_R)),
            "retrievable": float(found.retrievable_R.double().mean()),
            **shares,
        },
        "recall_intervals": {} if recall is None else {place: list(recall.interval(place)) for place in shares},
        "cost": {"mean": float(found.cost_R.double().mean()), "largest": float(found.cost_R.max())},
        "early_recall": early_recall(funnel, dataset, split, max(1, requests // 20), seed),
    }


def _oracle(dataset: Dataset, split: str) -> dict[str, dict[str, float]]:
    """Metrics of the true probabilities, where the dataset has them."""
    names = dataset.scan(split).collect_schema().names()
    weight = KEY_COLUMNS["weight"]
    result = {}
    for label in dataset.schema.labels:
        if f"__true_{label.name}" not in names:
            continue
        columns = [f"__true_{label.name}", label.name, *([weight] if weight in names else [])]
        frame = dataset.scan(split).select(columns).collect()
        metric = BinaryMetrics()
        p = torch.from_numpy(frame[columns[0]].to_numpy().copy()).double().clamp(1e-9, 1 - 1e-9)
        observed = torch.from_numpy(frame[label.name].fill_null(float("nan")).to_numpy().copy())
        weights = torch.from_numpy(frame[weight].to_numpy().copy()) if weight in names else None
        metric.update(torch.logit(p), observed, weights)
        result[label.name] = metric.compute()
    return result
