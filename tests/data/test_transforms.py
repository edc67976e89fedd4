"""Statistics of the training numbers."""

from __future__ import annotations

import numpy as np
import pytest

from fullrank.data import transforms
from fullrank.data.transforms import NumberState, RowSample, Sample, knots_of, transformed, untransformed
from fullrank.schema import Numeric


def test_a_sample_of_a_long_stream_is_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "SAMPLE_SIZE", 2000)
    sample = Sample()
    for start in range(0, 100_000, 1000):
        sample.add(np.arange(start, start + 1000, dtype=np.float64))
    quartiles = np.array(sample.quantiles(np.array([0.25, 0.5, 0.75]))) / 100_000
    # Five standard errors of a quartile of 2000 draws.
    np.testing.assert_allclose(quartiles, [0.25, 0.5, 0.75], atol=5 * 0.5 / np.sqrt(2000))


def test_a_sample_of_rows_is_uniform_and_keeps_rows_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "KNOT_SAMPLE_SIZE", 2000)
    sample = RowSample(["a", "b"])
    for start in range(0, 100_000, 700):
        a = np.arange(start, start + 700, dtype=np.float64)
        sample.add({"a": a, "b": -a, "c": a})
    a, b = sample.columns["a"], sample.columns["b"]
    assert len(a) == 2000 and np.array_equal(a, -b)
    np.testing.assert_allclose(np.quantile(a, [0.25, 0.5, 0.75]) / 1e5, [0.25, 0.5, 0.75], atol=0.056)


def knots(numbers: list[float], bins: int) -> list[float]:
    return knots_of(np.array(numbers), bins)


def test_few_values_are_the_edges_of_bins_themselves() -> None:
    assert knots([3.0, 1.0, 1.0, 2.0, np.nan], 2) == [1.0, 2.0, 3.0]
    assert knots([5.0, 5.0], 4) == [5.0]
    assert knots([np.nan], 4) == []


def test_a_common_value_and_its_neighbours_are_edges_and_the_rest_is_in_equal_parts() -> None:
    rest = np.sort(np.random.default_rng(0).lognormal(5, 1, 1000))
    edges = knots([0.0] * 9000 + rest.tolist(), 16)
    assert len(edges) == 17 and edges == sorted(set(edges))
    assert edges[:2] == [0.0, rest[0]] and edges[-1] == rest[-1]
    filled = np.histogram(rest, edges[1:])[0]
    assert filled.min() > 0.5 * 1000 / 15 and filled.max() < 1.5 * 1000 / 15


def test_a_number_without_common_values_has_quantiles_as_edges() -> None:
    numbers = np.random.default_rng(1).normal(size=20_000)
    edges = knots(numbers.tolist(), 8)
    assert edges == pytest.approx(np.quantile(numbers, np.linspace(0, 1, 9)), abs=0.01)


def test_a_common_value_in_the_middle_shares_its_code_with_no_other() -> None:
    numbers = [*np.linspace(-1, -0.01, 500), *[0.0] * 500, *np.linspace(0.01, 1, 500)]
    edges = knots(numbers, 12)
    place = edges.index(0.0)
    assert edges[place - 1 : place + 2] == pytest.approx([-0.01, 0.0, 0.01])


def test_many_common_values_leave_room_for_no_more_than_the_bins() -> None:
    rng = np.random.default_rng(2)
    numbers = [*np.repeat(np.arange(20.0), 110), *rng.uniform(0, 19, 200)]
    edges = knots(numbers, 24)
    assert set(np.arange(20.0)) <= set(edges) and len(edges) == 25


@pytest.mark.parametrize("transform", ["none", "log1p", "standard", "quantile"])
@pytest.mark.parametrize("encoding", ["scalar", "piecewise_linear"])
def test_transformed_numbers_lead_back_to_the_raw_ones(transform: str, encoding: str) -> None:
    feature = Numeric.model_validate({"name": "n", "transform": transform, "encoding": encoding, "bins": 8})
    raw = np.concatenate([np.random.default_rng(0).normal(3, 10, 500), [-2.0, 0.0]])
    state = NumberState(
        fill=1.0,
        mean=float(raw.mean()),
        deviation=float(raw.std()),
        quantiles=tuple(np.quantile(raw, np.linspace(0, 1, 101)).tolist()) if transform == "quantile" else (),
        knots=tuple(knots_of(raw, 8)) if encoding == "piecewise_linear" else (),
        misses=True,
    )
    found = untransformed(feature, state, transformed(feature, state, raw).astype(np.float64))
    np.testing.assert_allclose(found, raw, rtol=1e-3, atol=0.05 if transform == "quantile" else 1e-3)
    (missing,) = untransformed(feature, state, transformed(feature, state, np.array([np.nan])).astype(np.float64))
    assert np.isnan(missing) if encoding == "piecewise_linear" else missing == pytest.approx(1.0, abs=0.05)
