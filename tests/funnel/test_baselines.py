"""Facts about what an evaluation holds stages against, and what it says of those that lose."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from fullrank.data.dataset import Dataset, write_dataset
from fullrank.funnel import Funnel, Scorer, evaluate_funnel
from fullrank.funnel.baselines import retrieval_warning
from fullrank.funnel.predictions import predictions
from fullrank.funnel.recall import Hits, hits
from fullrank.metrics import BinaryRows, bootstrap, normalized_entropy
from fullrank.models import RankerSpec
from fullrank.schema import Categorical, Keys, Label, Schema
from fullrank.training.baseline import item_rate
from fullrank.training.run import defined

SCHEMA = Schema(
    features=(Categorical(name="item", role="item"), Categorical(name="site")),
    labels=(Label(name="click"), Label(name="buy")),
    keys=Keys(item_id="item"),
)


def scorer(dataset: Dataset) -> Scorer:
    """That has learnt nothing."""
    torch.manual_seed(0)
    return Scorer(dataset.encoders, RankerSpec.of("lr").build(dataset.schema))


def log(place: Path, spread: float, buys: int | None = 0) -> Dataset:
    random = np.random.default_rng(0)
    odds = -2 + spread * random.standard_normal(10)
    item = random.integers(0, 10, 3000)
    click = (random.random(3000) < 1 / (1 + np.exp(-odds[item]))).astype(int)
    frame = pl.DataFrame({"item": [str(n) for n in item], "site": ["s"] * 3000, "click": click})
    frame = frame.with_columns(buy=(pl.int_range(3000) % 5 == 0).cast(pl.Int64))
    test = frame[2000:].with_columns(buy=pl.lit(buys, dtype=pl.Int64))
    return write_dataset(place, SCHEMA, {"train": [frame[:2000]], "test": [test]})


def test_a_ranker_below_the_items_rate_is_told_by_how_much(tmp_path: Path) -> None:
    made = log(tmp_path / "data", 1.0)
    report = evaluate_funnel(scorer(made), made)
    said = predictions(scorer(made).model, made, "test", made.schema.labels)
    rate, labels = item_rate(made, "test", "click"), said.labels_nT[:, 0]
    assert rate is not None
    base = report["baselines"]["click"]["item_rate"]
    assert base["ne"] == pytest.approx(normalized_entropy(rate, labels))
    assert base["intervals"]["ne"][0] < base["ne"] < base["intervals"]["ne"][1]
    (lost,) = [one for one in report["warnings"] if one["message"].startswith("click")]
    ne = report["stages"]["final"]["click"]["ne"]
    assert lost["stage"] == "final" and "epochs" in lost["advice"]
    assert f"NE {ne:.4f} is no better than the {base['ne']:.4f} of the item's rate in training" in lost["message"]
    gap = bootstrap(BinaryRows(said.logits_nT[:, 0], labels)).minus(bootstrap(BinaryRows(rate, labels)))
    low, high = gap.interval("ne")
    assert low > 0
    assert (
        f"difference {ne - base['ne']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}, which excludes zero"
        in (lost["message"])
    )


def test_what_knows_the_truth_is_not_warned_of(tmp_path: Path) -> None:
    made = log(tmp_path / "data", 1.0, buys=None)
    good = scorer(made)
    frame = made.scan("train").collect()
    rates = frame.group_by("item").agg(pl.col("click").mean())
    with torch.no_grad():
        for parameter in good.model.parameters():
            parameter.zero_()
        weights = good.model.state_dict()["terms.0.weights.tables.item.weight"]
        weights[rates["item"].to_torch().long(), 0] = torch.logit(rates["click"].to_torch()).float()
    report = evaluate_funnel(good, made)
    assert report["stages"]["final"].keys() == {"click"}
    assert [one["message"] for one in report["warnings"]] == ["buy: no row of test has this label"]


@pytest.mark.parametrize("value", [0, 1])
def test_a_label_of_one_class_is_said_and_is_no_number_in_json(tmp_path: Path, value: int) -> None:
    made = log(tmp_path / "data", 0.0, buys=value)
    report = evaluate_funnel(scorer(made), made)
    buys = [one["message"] for one in report["warnings"] if one["message"].startswith("buy")]
    assert buys == [f"buy: all 1,000 labels of test are {value}: NE and AUC are undefined"]
    found = report["stages"]["final"]["buy"]
    assert math.isnan(found["ne"]) and math.isnan(found["intervals"]["auc"][0])
    assert json.loads(json.dumps(defined(report), allow_nan=False))["stages"]["final"]["buy"]["ne"] is None
    # Only the mean is left to lose against where all items are alike.
    clicks = [one["message"] for one in report["warnings"] if one["message"].startswith("click")]
    assert (len(clicks) == 1 and "item's rate" in clicks[0]) or "predicting the mean" in clicks[0]


def test_the_training_part_has_no_item_rate_to_be_held_against(tmp_path: Path) -> None:
    made = log(tmp_path / "data", 1.0)
    report = evaluate_funnel(scorer(made), made, "train")
    assert report["baselines"] == {}
    assert any("predicting the mean rate" in one["message"] for one in report["warnings"])


def test_retrieval_that_finds_less_than_popularity_is_told_so() -> None:
    def recall(retrieval: list[int], popular: list[int]) -> dict[str, str] | None:
        found = {"retrieval_at_100": torch.tensor(retrieval), "popularity_at_100": torch.tensor(popular)}
        drawn = Hits(found, torch.ones(len(retrieval), dtype=torch.bool), None, torch.zeros(1)).recall()
        assert drawn is not None
        return retrieval_warning(drawn)

    assert recall([1, 0] * 50, [0, 1] * 50) is None
    assert recall([1] * 10, [0] * 10) is None
    surely = recall([0, 1, 0, 0] * 50, [1, 1, 1, 0] * 50)
    assert surely is not None and surely["stage"] == "retrieval"
    assert surely["message"].startswith("recall@100 0.250 is below the 0.750 of the most popular items")
    assert "excludes zero" in surely["message"] and "popularity" in surely["advice"]
    barely = recall([0, 1] * 50 + [0], [1, 0] * 50 + [1])
    assert barely is not None and "includes zero" in barely["message"]


def test_recalls_are_of_requests_whose_item_may_be_retrieved(funnel: Funnel, dataset: Dataset) -> None:
    found = hits(funnel, dataset, "test", 100, 0)
    assert found is not None and found.user_R is not None
    half = Hits(found.found, torch.arange(len(found.retrievable_R)) % 2 == 0, found.user_R, found.cost_R)
    drawn = half.recall(seed=1)
    assert drawn is not None
    assert drawn.estimate["final_at_10"] == pytest.approx(float(found.found["final_at_10"][::2].double().mean()))
    assert drawn.clusters == len(set(found.user_R[::2].tolist()))
    nothing = torch.zeros(len(found.retrievable_R), dtype=torch.bool)
    assert Hits(found.found, nothing, found.user_R, found.cost_R).recall() is None
    report = evaluate_funnel(funnel, dataset, requests=100)
    low, high = report["recall_intervals"]["final_at_10"]
    assert low < report["recall"]["final_at_10"] < high
