"""Facts about the rate of an item in training."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from fullrank.data.dataset import Dataset, write_dataset
from fullrank.metrics import normalized_entropy
from fullrank.schema import Categorical, Keys, Label, Schema
from fullrank.training.baseline import STRENGTHS, beaten_by_item_rate, item_rate


def schema(weight: bool = False) -> Schema:
    return Schema(
        features=(Categorical(name="item", role="item"), Categorical(name="site")),
        labels=(Label(name="click"),),
        keys=Keys(item_id="item", weight="w" if weight else None),
    )


def log(rows: int, items: int, spread: float, seed: int) -> tuple[pl.DataFrame, np.ndarray]:
    """Clicks on items whose log-odds have this standard deviation, and the true ones."""
    random = np.random.default_rng(seed)
    odds = -1 + spread * random.standard_normal(items)
    item = random.integers(0, items, rows)
    click = (random.random(rows) < 1 / (1 + np.exp(-odds[item]))).astype(int)
    return pl.DataFrame({"item": [f"i{n}" for n in item], "site": ["s"] * rows, "click": click}), odds[item]


def dataset(place: Path, train: pl.DataFrame, test: pl.DataFrame, weight: bool = False) -> Dataset:
    return write_dataset(place, schema(weight), {"train": [train], "test": [test]})


def test_it_is_the_share_of_positives_drawn_to_the_mean(tmp_path: Path) -> None:
    train = pl.DataFrame({"item": ["a"] * 4 + ["b"] * 6, "site": ["s"] * 10, "click": [1, 1, 1, 0, 0, 0, 0, 0, 0, 1]})
    test = pl.DataFrame({"item": ["b", "new", "a"], "site": ["s"] * 3, "click": [1, 0, 1]})
    found = item_rate(dataset(tmp_path / "data", train, test), "test", "click")
    assert found is not None
    rates = torch.sigmoid(found).tolist()
    assert rates[1] == pytest.approx(0.4)
    # Both are drawn by one strength, which is one of those on offer.
    strengths = [(3 - 4 * rates[2]) / (rates[2] - 0.4), (1 - 6 * rates[0]) / (rates[0] - 0.4)]
    assert strengths[0] == pytest.approx(strengths[1])
    assert min(abs(math.log(strengths[0] / known)) for known in STRENGTHS) < 1e-6


@pytest.mark.parametrize(("spread", "near"), [(0.0, 0.003), (1.5, 0.02)])
def test_it_comes_near_the_truth_whether_items_differ_or_not(tmp_path: Path, spread: float, near: float) -> None:
    frame, odds = log(40_000, 300, spread, 0)
    made = dataset(tmp_path / "data", frame[:30_000], frame[30_000:])
    labels = torch.from_numpy(frame["click"].to_numpy()[30_000:].copy()).float()
    found = item_rate(made, "test", "click")
    assert found is not None
    truth = normalized_entropy(torch.from_numpy(odds[30_000:].copy()), labels)
    assert truth - 0.003 < normalized_entropy(found, labels) < truth + near


def test_weights_count_rows_twice(tmp_path: Path) -> None:
    frame, _ = log(2000, 20, 1.0, 1)
    heavy = frame.with_columns(w=pl.when(pl.int_range(pl.len()) % 2 == 0).then(2.0).otherwise(1.0))
    twice = pl.concat([frame, frame.gather_every(2)]).with_columns(w=pl.lit(1.0))
    test = frame[:50].with_columns(w=pl.lit(1.0))
    one = item_rate(dataset(tmp_path / "a", heavy, test, weight=True), "test", "click")
    two = item_rate(dataset(tmp_path / "b", twice, test, weight=True), "test", "click")
    assert one is not None and two is not None
    torch.testing.assert_close(one, two)


def test_there_is_none_without_an_answer(tmp_path: Path) -> None:
    frame, _ = log(200, 5, 1.0, 2)
    assert item_rate(dataset(tmp_path / "a", frame, frame), "train", "click") is None
    never = frame.with_columns(click=pl.lit(0))
    assert item_rate(dataset(tmp_path / "b", never, frame), "test", "click") is None


def test_a_ranker_that_loses_is_told_so(tmp_path: Path) -> None:
    frame, _ = log(4000, 10, 1.5, 3)
    made = dataset(tmp_path / "data", frame[:3000], frame[3000:])
    rate = item_rate(made, "test", "click")
    assert rate is not None
    ne = normalized_entropy(rate, torch.from_numpy(frame["click"].to_numpy()[3000:].copy()).float())
    assert beaten_by_item_rate(made, "test", {"click": {"ne": ne - 1e-4}}) == []
    (said,) = beaten_by_item_rate(made, "test", {"click": {"ne": ne + 1e-4}, "spent": {"mse": 1.0}})
    assert (
        said
        == f'the NE {ne + 1e-4:.4f} of "click" in test is no better than the {ne:.4f} of the item\'s rate in training'
    )
    assert beaten_by_item_rate(made, "test", {"click": {"ne": math.nan}}) == []
    (said,) = beaten_by_item_rate(made, "train", {"click": {"ne": 1.01}})
    assert said.endswith("1.0000 of predicting the mean rate")
