"""The rate of each item in training: what a ranker has to beat to be worth its cost."""

# Shapes: n rows, I items.

from __future__ import annotations

import math
from collections.abc import Mapping

import polars as pl
import torch
from torch import Tensor

from fullrank.data.dataset import Dataset
from fullrank.data.encoders import KEY_COLUMNS
from fullrank.metrics import BinaryMetrics

RANKER_ADVICE = (
    "train for more epochs or with another learning rate; if validation was best early and then got worse, with fewer "
    "epochs, smaller tables or more regularisation"
)
# Impressions at the mean rate that an item is given before its own; the likeliest of these is taken.
STRENGTHS = tuple(10 ** (power / 4) for power in range(0, 21))


def item_rate(dataset: Dataset, split: str, label: str) -> Tensor | None:
    """Log-odds of each row's item: its share of positives in training, drawn to the mean rate; new items have the mean.

    How far rates are drawn is what makes the training counts likeliest, if the items' rates follow a beta distribution.

    Args:
        label: a binary one.

    Returns:
        Shape (n,), float64, for all rows of the split. None if the log names no items, if the training part has
        but one class, or if the split is the training part, where the rates would know the answers.
    """
    if dataset.schema.keys.item_id is None or split == "train" or "train" not in dataset.splits:
        return None
    item, weight = KEY_COLUMNS["item_id"], KEY_COLUMNS["weight"]
    y = pl.col(label).cast(pl.Float64).fill_nan(None)
    w = pl.col(weight).cast(pl.Float64) if dataset.schema.keys.weight is not None else y.is_not_null().cast(pl.Float64)
    shown = dataset.scan("train").filter(y.is_not_null())
    counts = shown.group_by(item).agg((w * y).sum().alias("positive"), w.sum().alias("mass")).collect()
    positive, mass = float(counts["positive"].sum()), float(counts["mass"].sum())
    if not 0 < positive < mass:
        return None
    counts = counts.filter(pl.col(item).is_not_null())
    mean = positive / mass
    strength = _strength(counts["positive"].to_torch(), counts["mass"].to_torch(), mean)
    rates = counts.select(item, ((pl.col("positive") + strength * mean) / (pl.col("mass") + strength)).alias("rate"))
    rows = dataset.scan(split).select(item).join(rates.lazy(), on=item, how="left", maintain_order="left").collect()
    return torch.logit(rows["rate"].fill_null(mean).to_torch())


def beaten_by_item_rate(dataset: Dataset, split: str, metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A sentence for each binary label whose NE on a split is no better than that of the item's rate, or of the mean.

    Args:
        metrics: of the ranker, by label, as `evaluate` gives them.
    """
    found = []
    for label, values in metrics.items():
        ne = values.get("ne", math.nan)
        logits_n = None if math.isnan(ne) else item_rate(dataset, split, label)
        best, what = 1.0, "predicting the mean rate"
        if logits_n is not None:
            weight = KEY_COLUMNS["weight"] if dataset.schema.keys.weight is not None else None
            frame = dataset.scan(split).select(label, *([weight] if weight else [])).collect()
            rate = BinaryMetrics()
            label_n = frame[label].fill_null(math.nan).to_torch()
            rate.update(logits_n, label_n, frame[weight].to_torch() if weight else None)
            best, what = min((best, what), (rate.compute()["ne"], "the item's rate in training"))
        if ne >= best:
            found.append(f'the NE {ne:.4f} of "{label}" in {split} is no better than the {best:.4f} of {what}')
    return found


def _strength(positive_I: Tensor, mass_I: Tensor, mean: float) -> float:
    """The likeliest of `STRENGTHS` by the beta-binomial likelihood of the counts."""

    def likelihood(strength: float) -> float:
        a, b = torch.tensor(strength * mean).double(), torch.tensor(strength * (1 - mean)).double()
        beta_I = torch.lgamma(a + positive_I) + torch.lgamma(b + mass_I - positive_I) - torch.lgamma(a + b + mass_I)
        return float((beta_I - torch.lgamma(a) - torch.lgamma(b) + torch.lgamma(a + b)).sum())

    return max(STRENGTHS, key=likelihood)
