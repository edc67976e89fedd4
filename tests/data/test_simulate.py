from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from fullrank.data.dataset import Dataset
from fullrank.data.simulate import DAY, START, SimulationConfig, World, simulate, simulate_dataset

CONFIG = SimulationConfig(impressions=120_000, seed=3, drift=0.3)


@pytest.fixture(scope="module")
def world() -> World:
    return World.make(CONFIG)


@pytest.fixture(scope="module")
def log(world: World) -> pl.DataFrame:
    return pl.concat(list(simulate(CONFIG, world)))


def test_true_probabilities_are_calibrated_in_every_decile(log: pl.DataFrame) -> None:
    for label in ("click", "conversion", "hide"):
        p, y = log[f"__true_{label}"].to_numpy().astype(float), log[label].to_numpy()
        for part in np.array_split(np.argsort(p), 10):
            deviation = np.sqrt((p[part] * (1 - p[part])).sum())
            assert abs(y[part].sum() - p[part].sum()) < 4.5 * deviation, label


def test_the_oracle_beats_the_mean(log: pl.DataFrame) -> None:
    p, y = log["__true_click"].to_numpy().astype(float), log["click"].to_numpy()
    loss = -(y * np.log(p) + (1 - y) * np.log1p(-p)).mean()
    rate = y.mean()
    assert loss < 0.85 * -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
    assert 0.05 < rate < 0.25


def test_popularity_follows_a_power_law(log: pl.DataFrame) -> None:
    counts = np.sort(log["item_id"].value_counts()["count"].to_numpy())[::-1][5:200]
    slope = np.polyfit(np.log(np.arange(5, 5 + len(counts))), np.log(counts), 1)[0]
    assert -1.3 < slope < -0.4


def test_interests_drift(world: World) -> None:
    users = np.arange(CONFIG.num_users)
    first, last = (world.interest(users, np.full(users.shape, START + day * DAY)) for day in (0, 9))
    assert 2.0 < np.linalg.norm(last - first, axis=1).mean() < 3.5  # 9 days of 0.3 a day
    assert np.array_equal(first, world.interest(users, np.full(users.shape, START)))


def test_histories_hold_the_latest_earlier_clicks_and_nothing_else(log: pl.DataFrame) -> None:
    clicks = log.filter(pl.col("click") == 1)
    user = clicks["user_id"].value_counts().sort("count", "user_id", descending=True)["user_id"][3]
    mine = log.filter(pl.col("user_id") == user)
    past = clicks.filter(pl.col("user_id") == user).select("timestamp", "item_id")
    block = 10 * DAY / 60
    checked = 0
    for row in mine.iter_rows(named=True):
        times = [row["timestamp"] - age for age in row["history.age"]]
        assert times == sorted(times) and all(time < row["timestamp"] for time in times)
        known = past.filter(pl.col("timestamp") < row["timestamp"])
        # the clicks of the current block may be missing at the end, none may be invented or skipped
        for missing in range(0, known.height + 1):
            seen = known[: known.height - missing]
            if seen["item_id"].to_list()[-20:] == row["history.item"]:
                break
        else:
            raise AssertionError("the history is no run of the user's clicks")
        assert all(time > row["timestamp"] - block for time in known["timestamp"][known.height - missing :])
        checked += len(times)
    assert checked > 100


def test_conversions_follow_clicks_after_a_delay(log: pl.DataFrame) -> None:
    converted = log.filter(pl.col("conversion") == 1)
    assert (converted["click"] == 1).all()
    assert converted["conversion_delay"].null_count() == 0
    assert converted["conversion_delay"].mean() == pytest.approx(6 * 3600, rel=0.1)
    assert log.filter(pl.col("conversion") == 0)["conversion_delay"].null_count() == log.height - converted.height


def test_campaigns_are_shown_only_while_they_live(log: pl.DataFrame, world: World) -> None:
    day = (log["timestamp"].to_numpy() - START) / DAY
    item = log["item_id"].to_numpy()
    slack = 10 / 60  # a block decides once which campaigns live
    assert (world.arrays["item_birth"][item] <= day + slack).all()
    assert (day < world.arrays["item_death"][item] + slack).all()
    assert (world.arrays["item_death"] < 10).any()


def test_the_world_reproduces_the_logged_probability_of_any_row(log: pl.DataFrame, world: World) -> None:
    rows = log.sample(500, seed=0)
    history = np.full((500, 20), -1)
    for i, items in enumerate(rows["history.item"].to_list()):
        history[i, : len(items)] = items
    p = world.click_probability(
        rows["user_id"].to_numpy(),
        rows["item_id"].to_numpy()[:, None],
        rows["timestamp"].to_numpy(),
        rows["device"].to_numpy(),
        rows["position"].to_numpy()[:, None],
        history,
    )
    np.testing.assert_allclose(p[:, 0], rows["__true_click"].to_numpy(), rtol=1e-5)


def test_a_request_never_shows_an_ad_twice(log: pl.DataFrame) -> None:
    request = pl.col("request_id") // 64
    assert log.select(request, "item_id").n_unique() == log.height


def test_the_same_seed_gives_the_same_dataset(tmp_path: Path) -> None:
    made = [simulate_dataset(tmp_path / name, 3_000, 5) for name in ("a", "b")]
    other = simulate_dataset(tmp_path / "c", 3_000, 6)
    for split in ("train", "valid", "test"):
        frames = [dataset.scan(split).collect() for dataset in made]
        assert frames[0].equals(frames[1])
    assert not made[0].scan("train").collect().equals(other.scan("train").collect())
    dataset = Dataset.open(tmp_path / "a")
    latest = dataset.scan("train").select(pl.col("__timestamp").max()).collect().item()
    assert latest < dataset.scan("test").select(pl.col("__timestamp").min()).collect().item()


def test_a_saved_world_is_the_same_world(tmp_path: Path, world: World) -> None:
    world.save(tmp_path / "world.npz")
    again = World.load(tmp_path / "world.npz")
    assert again.config == world.config
    assert all(np.array_equal(again.arrays[name], values) for name, values in world.arrays.items())
    (tmp_path / "bad.npz").write_bytes(b"not a world")
    with pytest.raises(ValueError, match="not a simulated world"):
        World.load(tmp_path / "bad.npz")
