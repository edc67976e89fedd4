"""Facts about slices of a split, against the raw log."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from fullrank.data.dataset import Dataset
from fullrank.funnel.predictions import Predictions
from fullrank.funnel.slices import Grouping, groupings, slices
from fullrank.metrics import auc, calibration, normalized_entropy
from fullrank.schema import Categorical, Keys, Label, MultiCategorical, Numeric, Schema

SCHEMA = Schema(
    features=(
        Categorical(name="user", role="user"),
        Categorical(name="item", role="item", encoding="hash", num_embeddings=1000),
        Categorical(name="device"),
        Numeric(name="price", transform="log1p"),
        MultiCategorical(name="tags"),
    ),
    labels=(Label(name="click"),),
    keys=Keys(user_id="user", item_id="item", timestamp="time"),
)


@pytest.fixture(scope="module")
def raw() -> pl.DataFrame:
    """In time order, so that the last rows are the test part; late users and items are new."""
    random = np.random.default_rng(0)
    rows = 3000
    late = np.arange(rows) // 100
    return pl.DataFrame(
        {
            "user": [f"u{n}" for n in random.integers(0, 40 + late)],
            "item": [int(n) for n in (random.random(rows) ** 3 * (60 + late)).astype(int)],
            "device": random.choice(["phone", "desk", "tv"], rows, p=[0.6, 0.3, 0.1]).tolist(),
            "price": [None if p < 0.1 else round(float(p) * 100, 1) for p in random.random(rows)],
            "tags": ["a|b"] * rows,
            "time": np.arange(rows) * 60,
            "click": (random.random(rows) < 0.3).astype(int),
            "region": random.choice([3, 40], rows),
            "age": random.integers(18, 80, rows),
            "member": random.random(rows) < 0.5,
        }
    )


@pytest.fixture(scope="module")
def dataset(raw: pl.DataFrame) -> Dataset:
    return Dataset.from_frame(raw, SCHEMA, split="time", keep=("region", "age", "member"))


@pytest.fixture(scope="module")
def test(raw: pl.DataFrame, dataset: Dataset) -> pl.DataFrame:
    return raw.tail(dataset.rows("test"))


def named(grouping: Grouping) -> list[str | None]:
    return [None if place < 0 else grouping.names[place] for place in grouping.slice_n]


def test_new_is_what_training_did_not_see(raw: pl.DataFrame, dataset: Dataset, test: pl.DataFrame) -> None:
    train = raw.head(dataset.rows("train"))
    users, items, _ = groupings(dataset, "test")
    assert (users.by, items.by) == ("user", "item")
    for grouping, column in ((users, "user"), (items, "item")):
        expected = ["known" if value in set(train[column]) else "new" for value in test[column]]
        assert named(grouping) == expected and {"known", "new"} == set(expected)


def test_head_torso_and_tail_have_half_the_next_thirty_percent_and_the_rest(
    raw: pl.DataFrame, dataset: Dataset, test: pl.DataFrame
) -> None:
    train = raw.head(dataset.rows("train"))
    popular = train["item"].value_counts().sort(["count", "item"], descending=[True, False])
    place, before = {}, 0
    for item, count in popular.iter_rows():
        place[item] = "head" if before < 0.5 * train.height else "torso" if before < 0.8 * train.height else "tail"
        before += count
    *_, popularity = groupings(dataset, "test")
    assert named(popularity) == [place.get(item, "tail") for item in test["item"]]
    assert set(popularity.names) == set(named(popularity))


def test_values_and_ranges_are_those_of_the_log(dataset: Dataset, test: pl.DataFrame) -> None:
    *_, device, region, member, price, age = groupings(
        dataset, "test", ["device", "region", "member", "price", "age", "device"]
    )
    assert named(device) == test["device"].to_list()
    assert device.names[0] == "phone"
    assert named(region) == [str(value) for value in test["region"]]
    assert named(member) == [str(int(value)) for value in test["member"]]
    for grouping, column, digits in ((price, "price", 2e-3), (age, "age", 0)):
        sizes = []
        for name in grouping.names[:-1]:
            low, high = (float(word) for word in name.split(" to "))
            part = test.filter(pl.Series(named(grouping)) == name)[column]
            assert (part.min(), part.max()) == pytest.approx((low, high), rel=digits)
            sizes.append(len(part))
        assert len(sizes) == 5 and max(sizes) < 1.6 * min(sizes)
        assert (pl.Series(named(grouping)) == "missing").sum() == test[column].null_count()


def test_more_than_ten_values_are_ten_and_the_others(dataset: Dataset, test: pl.DataFrame) -> None:
    *_, users = groupings(dataset, "test", ["user"])
    counts = test["user"].value_counts()
    known = [name for name in users.names if name.startswith("u")]
    assert len(known) + ("new" in users.names) == 10
    rest = test.filter(pl.Series(named(users)).str.contains("other values"))
    assert rest.height > 0
    largest = counts.filter(pl.col("user").is_in(rest["user"].unique().implode()))["count"].max()
    assert largest <= min(counts.filter(pl.col("user").is_in(known))["count"])


def test_a_column_that_cannot_cut_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match='no further column "devise" to slice by; it has user, item, device, price'):
        groupings(dataset, "test", ["devise"])
    with pytest.raises(ValueError, match='"tags" has lists'):
        groupings(dataset, "test", ["tags"])
    with pytest.raises(ValueError, match='"click"'):
        groupings(dataset, "test", ["click"])


def test_metrics_of_a_slice_are_those_of_its_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(500, 1, generator=generator)
    y = (torch.rand(500, 1, generator=generator) < torch.sigmoid(z)).float()
    y[::50] = torch.nan
    said = Predictions((Label(name="click"),), z, y, None, torch.arange(500) % 30)
    place_n = np.where(np.arange(500) < 400, 0, np.where(np.arange(500) < 480, 1, -1))
    large, small = slices(said, 0, [Grouping("half", ("large", "small", "none"), place_n)])
    assert (large["by"], large["slice"], large["task"]) == ("half", "large", "click")
    assert (large["rows"], small["rows"]) == (392, 78)
    kept = ~y[:400, 0].isnan()
    rows = z[:400, 0][kept], y[:400, 0][kept]
    for name, metric in (("ne", normalized_entropy), ("auc", auc), ("calibration", calibration)):
        assert large[name] == pytest.approx(metric(*rows))
        assert large["intervals"][name][0] < large[name] < large["intervals"][name][1]
    assert "note" not in large and small["note"] == "78 rows: too few to say much"


def test_a_slice_of_one_class_or_of_few_users_says_so() -> None:
    z = torch.zeros(400, 1)
    y = torch.tensor([[1.0], [0.0]]).repeat(200, 1)
    y[:200] = 0
    said = Predictions((Label(name="click"),), z, y, None, torch.arange(400) % 3)
    one, few = slices(said, 0, [Grouping("half", ("a", "b"), np.arange(400) // 200)])
    assert one["note"] == "0 rows of the rarer class: too few to say much" and np.isnan(one["ne"])
    assert few["note"] == "3 users: too few to say much"
