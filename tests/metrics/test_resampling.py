"""Facts about bootstrap intervals: the metrics are the exact ones, the intervals hold, and pairing helps."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fullrank import metrics
from fullrank.metrics import BinaryRows, Bootstrap, MeanRows, NumberRows, bootstrap, resampling

ROW = st.tuples(
    st.sampled_from([-3.0, -1.0, -0.5, 0.0, 0.25, 2.0, 40.0]),
    st.sampled_from([0.0, 1.0, 0.3]),
    st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    st.integers(0, 4),
)
ROWS = st.lists(ROW, min_size=1, max_size=40).filter(lambda rows: any(w for *_, w, _ in rows))


def columns(rows: list[tuple[float, float, float, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z, y, w, users = zip(*rows, strict=True)
    return torch.tensor(z), torch.tensor(y), torch.tensor(w), torch.tensor(users)


def exact(z: Tensor, y: Tensor, w: Tensor | None) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"ne": "normalized_entropy", "auc": "auc", "calibration": "calibration", "logloss": "log_loss"}
        return {name: getattr(metrics, function)(z, y, w) for name, function in names.items()}


@given(ROWS)
def test_the_estimate_is_the_exact_metric(rows: list[tuple[float, float, float, int]]) -> None:
    z, y, w, users = columns(rows)
    for weights in (None, w):
        for clusters in (None, users):
            found = BinaryRows(z, y, weights, clusters).estimate()
            expected = exact(z, y, weights)
            assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9, nan_ok=True)
            if not math.isnan(found["calibration"]):
                assert found["calibration_error"] == abs(found["calibration"] - 1)


@given(ROWS, st.lists(st.integers(0, 3), min_size=5, max_size=5))
def test_a_resample_has_the_metrics_of_repeated_rows(
    rows: list[tuple[float, float, float, int]], times: list[int]
) -> None:
    z, y, w, users = columns(rows)
    places = torch.unique(users)
    counts = np.array(times)[places.numpy()]
    again = torch.repeat_interleave(torch.tensor(times)[users])
    found = BinaryRows(z, y, w, users).metrics(counts)
    if float(w[again].sum()) == 0:
        assert all(math.isnan(value) for value in found.values())
        return
    expected = exact(z[again], y[again], w[again])
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9, nan_ok=True)
    numbers = NumberRows(z, y, w, users).metrics(counts)
    error = (z - y)[again].double()
    assert numbers["mse"] == pytest.approx(float((w[again] * error**2).sum() / w[again].sum()))


def world(users: int, rows: int, spread: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A model that knows all but each user's own taste, whose standard deviation is `spread`."""
    user = torch.arange(users).repeat_interleave(rows)
    z = torch.randn(users * rows, generator=generator) - 1
    taste = spread * torch.randn(users, generator=generator)[user]
    y = (torch.rand(users * rows, generator=generator) < torch.sigmoid(z + taste)).float()
    return z, y, user


def coverage(truth: dict[str, float], drawn: list[Bootstrap]) -> dict[str, float]:
    return {
        metric: float(np.mean([low <= value <= high for low, high in (one.interval(metric) for one in drawn)]))
        for metric, value in truth.items()
    }


@pytest.fixture(scope="module")
def truth() -> dict[str, float]:
    z, y, _ = world(100_000, 20, 1.0, torch.Generator().manual_seed(0))
    whole = BinaryRows(z, y).estimate()
    return {name: whole[name] for name in ("ne", "auc", "calibration", "rate")}


def test_intervals_hold_the_truth_95_times_in_100_if_users_are_resampled(truth: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(1)
    logs = [world(80, 20, 1.0, generator) for _ in range(300)]
    by_user = coverage(truth, [bootstrap(BinaryRows(z, y, None, user), seed=s) for s, (z, y, user) in enumerate(logs)])
    assert all(0.90 <= share <= 0.98 for share in by_user.values()), by_user
    by_row = coverage(truth, [bootstrap(BinaryRows(z, y), seed=s) for s, (z, y, _) in enumerate(logs[:100])])
    assert by_row["rate"] < 0.8 and by_row["calibration"] < 0.8, by_row


def test_users_with_many_rows_widen_the_interval() -> None:
    z, y, _ = world(1000, 1, 0.0, torch.Generator().manual_seed(2))
    widths = []
    for copies in (1, 10):
        again = torch.arange(1000).repeat(copies)
        low, high = bootstrap(BinaryRows(z[again], y[again], None, again), seed=0).interval("auc")
        widths.append(high - low)
    # Ten copies of each user's row say no more than one; as rows of their own they would seem to.
    assert widths[0] == pytest.approx(widths[1], rel=1e-9)
    low, high = bootstrap(BinaryRows(z[again], y[again]), seed=0).interval("auc")
    assert high - low == pytest.approx(widths[0] / math.sqrt(10), rel=0.3)


def test_a_paired_difference_is_surer_than_two_intervals_and_zero_for_a_twin() -> None:
    z, y, user = world(300, 5, 1.0, torch.Generator().manual_seed(3))
    worse = z + 0.3 * torch.randn(len(z), generator=torch.Generator().manual_seed(4))
    a, b = (bootstrap(BinaryRows(scores, y, None, user), seed=7) for scores in (worse, z))
    gap = b.minus(a)
    assert gap.estimate["ne"] == b.estimate["ne"] - a.estimate["ne"]
    low, high = gap.interval("ne")
    assert high < 0
    own = [one.interval("ne") for one in (a, b)]
    assert own[1][1] > own[0][0]  # they overlap
    assert a.minus(bootstrap(BinaryRows(worse, y, None, user), seed=7)).interval("auc") == (0, 0)
    unpaired = bootstrap(BinaryRows(z, y, None, user), seed=8).minus(a).interval("ne")
    assert unpaired[1] - unpaired[0] > 2 * (high - low)


def test_it_depends_on_the_seed_and_on_nothing_else() -> None:
    z, y, user = world(50, 4, 1.0, torch.Generator().manual_seed(5))
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(6))
    first = bootstrap(BinaryRows(z, y, None, user), seed=1)
    shuffled = bootstrap(BinaryRows(z[order], y[order], None, user[order] * 1000 - 7), seed=1)
    np.testing.assert_allclose(first.resampled["auc"], shuffled.resampled["auc"], rtol=1e-12)
    assert not np.array_equal(first.resampled["auc"], bootstrap(BinaryRows(z, y, None, user), seed=2).resampled["auc"])
    assert len(first.resampled["auc"]) == resampling.REPLICATES


def test_there_is_no_interval_where_there_is_nothing_to_resample() -> None:
    z = torch.randn(50, generator=torch.Generator().manual_seed(0))
    one_class = bootstrap(BinaryRows(z, torch.zeros(50)))
    assert all(math.isnan(end) for metric in ("ne", "auc", "calibration") for end in one_class.interval(metric))
    assert not math.isnan(one_class.interval("logloss")[0])
    one_user = bootstrap(BinaryRows(z, (z > 0).float(), None, torch.zeros(50, dtype=torch.int64)))
    assert math.isnan(one_user.interval("auc")[0]) and one_user.estimate["auc"] == 1
    # A single positive row is absent from every third resample.
    rare = torch.zeros(50)
    rare[7] = 1
    assert math.isnan(bootstrap(BinaryRows(z, rare)).interval("auc")[0])


@settings(max_examples=20)
@given(st.integers(2, 60), st.integers(0, 1000))
def test_the_spread_of_a_mean_is_its_standard_error(rows: int, seed: int) -> None:
    values = torch.rand(rows, generator=torch.Generator().manual_seed(seed)).double()
    drawn = bootstrap(MeanRows({"a": values, "b": 1 - values}), replicates=2000, seed=seed)
    assert drawn.estimate["a"] == pytest.approx(float(values.mean()))
    assert drawn.resampled["a"].std() == pytest.approx(float(values.std(correction=0)) / math.sqrt(rows), rel=0.15)
    np.testing.assert_allclose(drawn.resampled["b"], 1 - drawn.resampled["a"])


def test_rmse_and_mae_are_those_of_numpy() -> None:
    random = np.random.default_rng(0)
    x, y, w = random.normal(size=300), random.normal(size=300), random.random(300)
    found = NumberRows(*(torch.from_numpy(values) for values in (x, y, w))).estimate()
    assert found["rmse"] == pytest.approx(math.sqrt(np.average((x - y) ** 2, weights=w)))
    assert found["mae"] == pytest.approx(np.average(np.abs(x - y), weights=w))
    assert found["mean"] == pytest.approx(np.average(y, weights=w))
    assert found["predicted"] == pytest.approx(np.average(x, weights=w))


def test_many_rows_have_fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "ROWS_OF_ALL_REPLICATES", 100)
    z = torch.zeros(1000)
    counts = {n: len(bootstrap(NumberRows(z[:n], z[:n])).resampled["rmse"]) for n in (100, 200, 1000)}
    assert counts == {100: 200, 200: 100, 1000: 50}


def test_what_does_not_go_together_is_refused() -> None:
    z = torch.zeros(4)
    with pytest.raises(ValueError, match="clusters must be 4 integers"):
        BinaryRows(z, z, None, torch.zeros(4))
    with pytest.raises(ValueError, match="clusters must be 4 integers"):
        NumberRows(z, z, None, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one row"):
        NumberRows(z[:0], z[:0])
    with pytest.raises(ValueError, match="must be finite"):
        NumberRows(z / 0, z)
    with pytest.raises(ValueError, match="means need values of one length"):
        MeanRows({"a": z, "b": z[:2]})
    with pytest.raises(ValueError, match="replicates is 1"):
        bootstrap(NumberRows(z, z), replicates=1)
    with pytest.raises(ValueError, match="4 clusters and 3 cannot be paired"):
        bootstrap(NumberRows(z, z)).minus(bootstrap(NumberRows(z[:3], z[:3])))
    with pytest.raises(ValueError, match="different numbers of resamples"):
        bootstrap(NumberRows(z, z)).minus(bootstrap(NumberRows(z, z), replicates=5))
