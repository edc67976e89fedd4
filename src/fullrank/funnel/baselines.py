"""What is trivial, and which stages do not beat it."""

# Shapes: n rows.

from __future__ import annotations

import math
from typing import Any

from fullrank.data.dataset import Dataset
from fullrank.funnel.predictions import Predictions, intervals
from fullrank.metrics import Bootstrap, bootstrap
from fullrank.training.baseline import RANKER_ADVICE, item_rate

RETRIEVAL_ADVICE = (
    "train retrieval for more epochs, or use what is better here: `retrieval: {name: popularity}` in the recipe"
)
ONE_CLASS_ADVICE = "evaluate on a split, or import a longer log, in which both classes occur"


def item_rates(said: Predictions, dataset: Dataset, split: str, seed: int) -> dict[str, Bootstrap]:
    """Metrics of each item's rate in training, by binary task, on the same resamples as a ranker's."""
    found = {}
    for task, label in enumerate(said.labels):
        if label.kind == "binary" and bool(said.observed(task).any()):
            logits_n = item_rate(dataset, split, label.name)
            if logits_n is not None:
                found[label.name] = bootstrap(said.rows(task, logits_n=logits_n), seed=seed)
    return found


def as_report(rates: dict[str, Bootstrap]) -> dict[str, Any]:
    """The part `baselines` of `evaluate_funnel`."""
    return {
        task: {
            "item_rate": {
                **{metric: drawn.estimate[metric] for metric in ("ne", "auc", "calibration")},
                "intervals": intervals(drawn),
            }
        }
        for task, drawn in rates.items()
    }


def ranker_warning(
    stage: str, task: str, metrics: dict[str, Any], drawn: Bootstrap, rate: Bootstrap | None
) -> dict[str, str] | None:
    """Said of a ranker that does not beat the better of the mean and the item's rate."""
    if "rmse" in metrics:
        if metrics["rmse"] < metrics["std"]:
            return None
        message = f"RMSE {metrics['rmse']:.4g} is no better than the {metrics['std']:.4g} of predicting the mean"
        return _warning(stage, f"{task}: {message}", RANKER_ADVICE)
    ne = drawn.estimate["ne"]
    item = math.nan if rate is None else rate.estimate["ne"]
    if rate is not None and item < 1:
        if ne < item or math.isnan(ne):
            return None
        what, difference, interval = f"the {item:.4f} of the item's rate in training", ne - item, drawn.minus(rate)
        low, high = interval.interval("ne")
    else:
        if ne < 1 or math.isnan(ne):
            return None
        what, difference = "predicting the mean rate, which is 1", ne - 1
        low, high = (end - 1 for end in drawn.interval("ne"))
    message = f"{task}: NE {ne:.4f} is no better than {what} ({_difference(difference, low, high)})"
    return _warning(stage, message, RANKER_ADVICE)


def retrieval_warning(recall: Bootstrap) -> dict[str, str] | None:
    """Said of retrieval that finds fewer clicked items than the most popular ones do."""
    found, popular = recall.estimate["retrieval_at_100"], recall.estimate["popularity_at_100"]
    if found >= popular:
        return None
    gap = Bootstrap(
        {"gap": found - popular},
        {"gap": recall.resampled["retrieval_at_100"] - recall.resampled["popularity_at_100"]},
        recall.clusters,
    )
    difference = _difference(found - popular, *gap.interval("gap"))
    message = f"recall@100 {found:.3f} is below the {popular:.3f} of the most popular items ({difference})"
    return _warning("retrieval", message, RETRIEVAL_ADVICE)


def one_class_warning(stage: str, said: Predictions, task: int, split: str) -> dict[str, str] | None:
    """Said of a binary label of which the split has one class only, or of any label that it has not at all."""
    label = said.labels[task]
    values = said.labels_nT[said.observed(task), task]
    if not len(values):
        return _warning(stage, f"{label.name}: no row of {split} has this label", ONE_CLASS_ADVICE)
    if label.kind == "binary" and bool((values == values[0]).all()):
        message = f"{label.name}: all {len(values):,} labels of {split} are {values[0]:.0f}: NE and AUC are undefined"
        return _warning(stage, message, ONE_CLASS_ADVICE)
    return None


def _warning(stage: str, message: str, advice: str) -> dict[str, str]:
    return {"stage": stage, "message": message, "advice": advice}


def _difference(value: float, low: float, high: float) -> str:
    if math.isnan(low):
        return f"difference {value:+.4f}, too few rows for an interval"
    zero = "excludes" if low > 0 or high < 0 else "includes"
    return f"difference {value:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}, which {zero} zero"
