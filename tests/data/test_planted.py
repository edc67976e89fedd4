from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from fullrank.data.dataset import Dataset
from fullrank.data.loader import Loader
from fullrank.data.planted import (
    TASKS,
    Cascade,
    CrossDomain,
    Heterogeneous,
    Interactions,
    PlantedTask,
    Segments,
    Timed,
    planted_dataset,
    planted_task,
)
from fullrank.metrics import auc

# AUC of the true probability of a click, at the defaults: from the distribution of the true log-odds.
ORACLE = {
    "order-1": (0.90, 0.94),
    "order-2": (0.90, 0.94),
    "order-3": (0.90, 0.94),
    "order-4": (0.90, 0.94),
    "heterogeneous": (0.82, 0.88),
    "segments": (0.84, 0.89),
    "timed": (0.84, 0.90),
    "cascade": (0.77, 0.84),
    "cross-domain": (0.81, 0.86),
}


@pytest.fixture(scope="module")
def logs() -> dict[str, pl.DataFrame]:
    return {name: pl.concat(planted_task(name, 60_000).frames("train")) for name in TASKS}


def column(frame: pl.DataFrame, name: str) -> torch.Tensor:
    return torch.from_numpy(frame[name].to_numpy().astype(np.float64))


@pytest.mark.parametrize("name", TASKS)
def test_true_probabilities_are_calibrated_in_every_decile(name: str, logs: dict[str, pl.DataFrame]) -> None:
    for label in planted_task(name).log_schema().labels:
        p, y = (logs[name][column].to_numpy().astype(float) for column in (f"__true_{label.name}", label.name))
        for part in np.array_split(np.argsort(p), 10):
            assert abs(y[part].sum() - p[part].sum()) < 4.5 * np.sqrt((p[part] * (1 - p[part])).sum())


@pytest.mark.parametrize("name", TASKS)
def test_oracle_auc_is_what_the_distribution_of_probabilities_says(name: str, logs: dict[str, pl.DataFrame]) -> None:
    # P(score of a positive > score of a negative), with p for positives and 1 - p for negatives
    p = np.sort(logs[name]["__true_click"].to_numpy().astype(float))
    below = np.concatenate([[0], np.cumsum(1 - p)[:-1]])
    expected = (p * (below + (1 - p) / 2)).sum() / (p.sum() * (1 - p).sum())
    measured = auc(column(logs[name], "__true_click"), column(logs[name], "click"))
    assert measured == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(len(p)))
    assert ORACLE[name][0] < expected < ORACLE[name][1]


@pytest.mark.parametrize("name", TASKS)
def test_labels_tell_nothing_that_the_true_probability_does_not(name: str, logs: dict[str, pl.DataFrame]) -> None:
    # no column, and no neighbouring row, explains what is left of the label: there is no leak to beat the oracle by
    frame = logs[name]
    rest = frame["click"].to_numpy() - frame["__true_click"].to_numpy().astype(float)
    scale = np.sqrt(np.mean(np.square(rest)) * len(rest))
    for number in frame.select(pl.selectors.numeric()).drop("click"):
        values = number.to_numpy().astype(float)
        if values.std():
            assert abs((rest * (values - values.mean()) / values.std()).sum()) < 4.5 * scale, number.name
    assert abs((rest[1:] * rest[:-1]).sum()) < 4.5 * np.sqrt(np.square(rest[1:] * rest[:-1]).sum())


@pytest.mark.parametrize("name", TASKS)
def test_the_seed_decides_everything_and_nothing_else_does(name: str) -> None:
    first, again, other = (planted_task(name, 4_000, seed) for seed in (1, 1, 2))
    for part in first.part_rows():
        frames = [pl.concat(task.frames(part)) for task in (first, again, other)]
        assert frames[0].equals(frames[1]) and not frames[0].equals(frames[2])
        assert frames[0].height == first.part_rows()[part]


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("cascade", "cross-domain")])
def test_a_larger_log_is_of_the_same_world(name: str) -> None:
    # rows of the larger log, judged by the smaller one's hidden tables
    small, large = planted_task(name, 1_000), planted_task(name, 5_000)
    frame = pl.concat(large.frames("test"))
    np.testing.assert_allclose(truth(small, frame), frame["__true_click"].to_numpy(), rtol=1e-5)


def truth(task: PlantedTask, frame: pl.DataFrame) -> np.ndarray:
    """True probability of rows, from their columns alone."""
    names = [feature.name for feature in task.log_schema().categorical]
    ids = {name: frame[name].to_numpy() for name in names}

    def padded(name: str) -> np.ndarray:
        rows = frame[name].to_list()
        return np.array([row + [-1] * (20 - len(row)) for row in rows]).astype(np.int64)

    if isinstance(task, Interactions):
        logit = task.logit(np.stack(list(ids.values()), 1))
    elif isinstance(task, Segments):
        x = np.stack(list(ids.values()), 1)
        logit = task.logit(x[:, :4], x[:, 4:])
    elif isinstance(task, Heterogeneous):
        lengths = frame["history.item"].list.len().to_numpy().astype(np.int64)
        logit = task.logit(ids["group"], ids["item_id"], ids["surface"], padded("history.item"), lengths)
    else:
        assert isinstance(task, Timed)
        lengths = frame["history.age"].list.len().to_numpy().astype(np.int64)
        now = frame["timestamp"].to_numpy()
        times = now[:, None] - padded("history.age")
        logit = task.logit(ids["category"], padded("history.category"), times, lengths, now)
    return 1 / (1 + np.exp(-logit))


def test_every_task_is_a_dataset_for_the_loader(tmp_path: Path) -> None:
    for name in TASKS:
        dataset = planted_dataset(tmp_path / name, name, 3_000)
        task = planted_task(name, 3_000)
        assert dataset.schema == task.log_schema()
        batch = next(iter(Loader(dataset, "train", 512)))
        assert len(batch) == 512
        frame = pl.concat(task.frames("train")).head(512)
        for place, feature in enumerate(task.log_schema().categorical):
            assert batch.ids_BF[:, place].tolist() == frame[feature.name].to_list()
        stored = dataset.scan("train").collect()
        np.testing.assert_array_equal(stored["__true_click"][:512].to_numpy(), frame["__true_click"].to_numpy())
    bare = planted_dataset(tmp_path / "bare", "segments", 1_000, true_probabilities=False)
    assert not [name for name in bare.scan("train").collect_schema() if name.startswith("__true")]
    assert isinstance(Dataset.open(tmp_path / "bare"), Dataset)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("order-9", {}, 'no planted task "order-9", expected one of order-1, order-2'),
        ("order-2", {"fields": 7}, "fields must be a multiple of order, got 7 fields for order 2"),
        ("order-2", {"values": 5}, "values must be even"),
        ("segments", {"depth": 3}, "task segments: depth: unknown key"),
        ("timed", {"half_life_hours": -1}, "half_life_hours"),
        ("heterogeneous", {"surfaces": 3}, "categories and surfaces must be even"),
        ("cascade", {"ads": 20}, "ads"),
        ("timed", {"rows": 0}, "rows"),
    ],
)
def test_impossible_tasks_are_refused(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planted_task(name, **options)
    with pytest.raises(ValueError, match='task "timed" has no part "valid", expected one of train, test'):
        planted_task("timed", 100, valid=0).frames("valid")


# A: interactions


@pytest.mark.parametrize("order", [1, 2, 3])
def test_fewer_fields_than_the_order_say_nothing_and_all_say_everything(order: int) -> None:
    # the best any model of lower order can do, in closed form: average the probability over all other fields
    task = Interactions(order=order, fields=2 * order if order < 3 else 3, values=4, seed=3)
    grid = np.array(list(itertools.product(range(4), repeat=task.fields)))
    p = 1 / (1 + np.exp(-task.logit(grid)))
    assert p.mean() == pytest.approx(0.5)

    def conditional(fields: tuple[int, ...]) -> np.ndarray:
        key = (grid[:, fields] * 4 ** np.arange(len(fields))).sum(1)
        return np.bincount(key, p, 4 ** len(fields)) / np.bincount(key, minlength=4 ** len(fields))

    for fields in itertools.combinations(range(task.fields), order - 1):
        np.testing.assert_allclose(conditional(fields), 0.5, atol=1e-12)
    whole_groups = [np.ptp(conditional(tuple(group))) for group in task.groups_GR]
    assert min(whole_groups) > 0.1


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_logit_has_the_stated_strength(order: int) -> None:
    task = Interactions(order=order, strength=2.0)
    logit = task.logit(np.random.default_rng(0).integers(0, task.values, (200_000, task.fields)))
    assert logit.std() == pytest.approx(2.0, rel=0.02)
    assert abs(logit.mean()) < 0.02


def test_negating_one_field_negates_its_group_alone() -> None:
    task = Interactions(order=3)
    x = np.random.default_rng(0).integers(0, task.values, (100, task.fields))
    group = task.groups_GR[1]
    flipped = x.copy()
    flipped[:, group[0]] = (x[:, group[0]] + task.values // 2) % task.values
    twice = flipped.copy()
    twice[:, group[1]] = (x[:, group[1]] + task.values // 2) % task.values
    assert np.abs(task.logit(flipped) - task.logit(x)).max() > 0.5
    np.testing.assert_allclose(task.logit(twice), task.logit(x), atol=1e-12)


# B: heterogeneous


def heterogeneous() -> tuple[Heterogeneous, dict[str, np.ndarray]]:
    """Rows with a history of five events of category 4, two of 7, and an intent in category 6."""
    task = Heterogeneous()
    n = 200
    rng = np.random.default_rng(0)
    events = np.tile([4, 16, 28, 4, 52, 7, 19, 6, 18, 30], (n, 1))
    rows = {
        "group": rng.integers(0, task.groups, n),
        "item": rng.integers(0, task.items, n),
        "surface": rng.integers(0, task.surfaces, n),
        "events_nL": events,
        "lengths": np.full(n, 10),
    }
    return task, rows


def test_no_user_id_is_a_feature_and_no_user_is_in_two_parts() -> None:
    task = planted_task("heterogeneous", 5_000)
    assert task.log_schema().keys.user_id == "user_id"
    assert "user_id" not in [feature.name for feature in task.log_schema().features]
    users = [set(pl.concat(task.frames(part))["user_id"]) for part in task.part_rows()]
    assert not users[0] & users[1] and not users[0] & users[2] and not users[1] & users[2]
    sizes = pl.concat(task.frames("train"))["user_id"].value_counts()["count"]
    assert sizes.max() == task.sessions  # type: ignore[attr-defined]


def test_the_intents_parity_flips_the_sign_of_the_profile_effect() -> None:
    task, rows = heterogeneous()
    # the intent moves from category 6 to 7; items of category 0 match neither
    rows["item"] = rows["item"] // 12 * 12
    even = task.logit(**rows)
    rows["events_nL"] = rows["events_nL"] + np.array([0] * 7 + [1] * 3)
    odd = task.logit(**rows)
    effect = task.profile_effect[rows["group"], task.brand_I[rows["item"]]]
    np.testing.assert_allclose(even - odd, 2 * task.profile * effect, atol=1e-12)
    assert np.abs(effect).mean() > 0.5


def test_the_profile_effect_vanishes_in_every_group_and_brand() -> None:
    effect = Heterogeneous().profile_effect
    np.testing.assert_allclose(effect.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(effect.mean(1), 0, atol=1e-12)


def test_the_surface_decides_which_part_of_the_history_matters() -> None:
    task, rows = heterogeneous()
    for category, on_even, on_odd in ((6, True, False), (4, False, True)):
        rows["item"] = np.full(200, category)
        other = {**rows, "item": np.full(200, category)}
        # another history without the category, the intent's parity unchanged
        swap = np.where(task.category_of(rows["events_nL"]) == category, 2, rows["events_nL"])
        other["events_nL"] = swap
        moved = np.abs(task.logit(**rows) - task.logit(**other)) > 1e-9
        even = rows["surface"] % 2 == 0
        assert moved[even].all() == on_even and moved[~even].all() == on_odd
        assert moved[even].any() == on_even and moved[~even].any() == on_odd


def test_only_the_kind_of_the_last_event_and_the_share_of_the_early_ones_count() -> None:
    task, rows = heterogeneous()
    shuffled = {**rows, "events_nL": rows["events_nL"][:, [6, 2, 0, 5, 1, 3, 4, 9, 7, 8]]}
    padded = {**rows, "events_nL": np.pad(rows["events_nL"], ((0, 0), (0, 5)), constant_values=6)}
    for other in (shuffled, padded):
        np.testing.assert_allclose(task.logit(**other), task.logit(**rows), atol=1e-12)


# C: segments


def test_segments_are_equally_large_and_linear_inside(logs: dict[str, pl.DataFrame]) -> None:
    frame = logs["segments"]
    task = Segments()
    shares = np.bincount(frame["__true_segment"].to_numpy().astype(int)) / frame.height
    assert len(shares) == 4 and shares.min() > 0.2 and shares.max() < 0.3
    x = frame.select(pl.selectors.starts_with("content")).to_numpy()
    routing = frame.select(pl.selectors.starts_with("routing")).to_numpy()
    logit = task.logit(routing, x)
    np.testing.assert_array_equal(task.segment(routing), frame["__true_segment"].to_numpy())
    one_hot = (x[:, :, None] == np.arange(task.values)).reshape(len(x), -1).astype(float)
    one_hot = np.c_[one_hot, np.ones(len(x))]

    def explained(rows: np.ndarray) -> float:
        fit, *_ = np.linalg.lstsq(one_hot[rows], logit[rows], rcond=None)
        return float(1 - np.var(logit[rows] - one_hot[rows] @ fit) / np.var(logit[rows]))

    segment = task.segment(routing)
    assert all(explained(segment == s) > 1 - 1e-9 for s in range(4))
    half, everybody = explained(segment // 2 == 0), explained(segment >= 0)
    assert everybody < 0.05 < 0.4 < half < 0.9  # two levels: a half is alike, the whole is not


def test_no_single_routing_field_decides_the_segment(logs: dict[str, pl.DataFrame]) -> None:
    frame = logs["segments"]
    upper = frame["__true_segment"].to_numpy() >= 2
    for field in range(4):
        values = frame[f"routing_{field}"].to_numpy()
        share = np.bincount(values, upper) / np.bincount(values)
        assert np.maximum(share, 1 - share).mean() < 0.9
        if field >= 2:  # these decide the lower bit alone
            assert np.ptp(share) < 0.06


# D: timed sequences


def timed(n: int = 300) -> dict[str, np.ndarray]:
    frame = pl.concat(planted_task("timed", n * 2, valid=0, test=0).frames("train")).filter(
        pl.col("history.age").list.len() > 1
    )
    lengths = frame["history.age"].list.len().to_numpy().astype(np.int64)
    age = np.array([row + [0] * (20 - len(row)) for row in frame["history.age"].to_list()]).astype(np.int64)
    events = np.array([row + [-1] * (20 - len(row)) for row in frame["history.category"].to_list()])
    now = frame["timestamp"].to_numpy()
    return {
        "category": frame["category"].to_numpy(),
        "events_nL": events,
        "times_nL": now[:, None] - age,
        "lengths": lengths,
        "now": now,
    }


def test_shifting_all_times_changes_nothing() -> None:
    task, rows = Timed(), timed()
    later = {**rows, "times_nL": rows["times_nL"] + 86_400, "now": rows["now"] + 86_400}
    np.testing.assert_array_equal(task.logit(**rows), task.logit(**later))
    waited = {**rows, "now": rows["now"] + 86_400}
    assert np.abs(task.logit(**rows) - task.logit(**waited)).max() > 0.5


def test_events_of_the_same_second_have_no_order() -> None:
    task, rows = Timed(), timed()
    place = np.arange(20)
    same = (rows["times_nL"][:, 1:] == rows["times_nL"][:, :-1]) & (place[1:] < rows["lengths"][:, None])
    assert same.any(1).mean() > 0.5
    swapped = rows["events_nL"].copy()
    for row, first in zip(*np.nonzero(same), strict=True):
        swapped[row, [first, first + 1]] = swapped[row, [first + 1, first]]
    assert (swapped != rows["events_nL"]).any()
    np.testing.assert_allclose(task.logit(**{**rows, "events_nL": swapped}), task.logit(**rows), atol=1e-12)


def test_hours_decide_and_places_do_not() -> None:
    task, rows = Timed(), timed()
    ahead = {name: rows[name].copy() for name in rows}
    # one more event of another category at the end moves every place and no age
    ahead["events_nL"] = np.c_[rows["events_nL"], np.full(len(rows["now"]), -1)]
    ahead["times_nL"] = np.c_[rows["times_nL"], rows["now"]]
    ahead["events_nL"][np.arange(len(rows["now"])), rows["lengths"]] = (rows["category"] + 1) % task.categories
    ahead["times_nL"][np.arange(len(rows["now"])), rows["lengths"]] = rows["now"]
    ahead["lengths"] = rows["lengths"] + 1
    np.testing.assert_array_equal(task.logit(**ahead), task.logit(**rows))
    # a half-life halves what one event counts
    one = {"category": np.array([3]), "events_nL": np.array([[3]]), "lengths": np.array([1]), "now": np.array([10**9])}
    at = [task.logit(**one, times_nL=np.array([[10**9 - hours * 3600]]))[0] for hours in (12, 36, 60)]
    assert (at[1] - task.base) / (at[0] - task.base) == pytest.approx(0.5)
    assert (at[2] - task.base) / (at[1] - task.base) == pytest.approx(0.5)


def test_the_place_of_an_event_says_little_of_its_age(logs: dict[str, pl.DataFrame]) -> None:
    ages = logs["timed"].filter(pl.col("history.age").list.len() > 0)["history.age"].list.last().to_numpy() / 3600
    assert np.quantile(ages, 0.9) > 100 * np.quantile(ages, 0.3)
    exact = pl.concat(Timed(rows=2_000).frames("train"))["history.age"]
    assert all(row == sorted(row, reverse=True) for row in exact.to_list())


# E: cascade


def recall(task: Cascade, score: np.ndarray, kept: int) -> float:
    best, first = (np.argsort(-s, 1)[:, :n] for s, n in ((task.value_UI, 10), (score, kept)))
    return float(np.mean([len(np.intersect1d(*pair)) / 10 for pair in zip(best, first, strict=True)]))


def test_clicks_alone_do_not_tell_the_value() -> None:
    task = Cascade()
    click, hide = task.probabilities_2UI
    by_clicks = task.bid_I * click
    assert 0.55 < recall(task, by_clicks, 10) < 0.85 and 0.85 < recall(task, by_clicks, 20) < 0.98
    assert recall(task, by_clicks - 3 * hide, 10) == 1
    assert recall(task, np.random.default_rng(0).random(click.shape), 20) == pytest.approx(0.1, abs=0.01)
    # baiting ads: clicks and hides rise together
    assert np.corrcoef(np.log(click).mean(0), np.log(hide).mean(0))[0, 1] > 0.3


def test_impressions_are_the_policys_choice_and_requests_have_every_ad() -> None:
    task = Cascade(rows=3_000, requests=20)
    parts = {part: pl.concat(task.frames(part)) for part in task.part_rows()}
    shown = pl.concat([parts["train"], parts["valid"]])
    assert shown.select("user_id", "item_id").n_unique() == shown.height == 100 * 30
    assert (shown["user_id"].value_counts()["count"] == 30).all()
    mean_value = task.value_UI[shown["user_id"], shown["item_id"]].mean()
    assert mean_value > task.value_UI.mean() + 0.5 * task.value_UI.std()
    test = parts["test"]
    assert test.height == 20 * task.ads and test.select("user_id", "item_id").n_unique() == test.height
    for label, p in zip(("click", "hide"), task.probabilities_2UI, strict=True):
        expected = p[test["user_id"], test["item_id"]]
        np.testing.assert_allclose(test[f"__true_{label}"].to_numpy(), expected, rtol=1e-6)
    assert "bid" not in [feature.name for feature in task.log_schema().features]


def test_a_history_holds_a_users_own_earlier_rows_and_what_came_of_them() -> None:
    frame = pl.concat([*(task := CrossDomain(rows=4000, users=30)).frames("train"), *task.frames("test")])
    assert frame["timestamp"].is_sorted() and frame["request_id"].is_sorted()
    for _, rows in frame.group_by("user_id"):
        items, clicks = rows["item_id"].to_list(), rows["click"].to_list()
        for place, (past, clicked) in enumerate(rows.select("history.item", "history.clicked").iter_rows()):
            assert past == items[max(0, place - 20) : place] and clicked == clicks[max(0, place - 20) : place]


def test_what_comes_from_elsewhere_is_the_interest_and_noise_and_the_interest_halves() -> None:
    task = CrossDomain(rows=40_000, users=50, noise=0.0, half_life_days=5.0)
    frame = next(iter(task.frames("train"))).sort("user_id", "timestamp")
    interest = frame.select(task.elsewhere).to_numpy()
    content = task.latents().standard_normal((task.ads, task.latent_dim))[frame["item_id"].to_numpy()]
    logit = task.base + task.strength * (interest * content).sum(1) / 2
    assert np.allclose(1 / (1 + np.exp(-logit)), frame["__true_click"].to_numpy(), atol=1e-6)
    days = (frame["timestamp"] - frame["timestamp"].shift(400)).to_numpy() / 86_400
    same = (frame["user_id"] == frame["user_id"].shift(400)).fill_null(False).to_numpy()
    assert same.sum() > 5000
    expected = np.exp2(-days[same] / 5).mean()
    assert abs((interest[same] * np.roll(interest, 400, 0)[same]).mean() - expected) < 0.15
    assert abs(interest.std() - 1) < 0.1
