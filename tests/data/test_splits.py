"""Splits: what trains never meets what judges."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fullrank.data.splits import SplitSpec, TimestampCounts, by_hash, by_name, by_time


@given(
    times=st.lists(st.integers(0, 50), min_size=1, max_size=200),
    valid=st.floats(0, 0.45),
    test=st.floats(0, 0.45),
)
def test_by_time_training_ends_before_validation_and_validation_before_test(
    times: list[int], valid: float, test: float
) -> None:
    counts = TimestampCounts()
    for chunk in np.array_split(np.array(times, dtype=np.int64), 3):
        counts.add(pl.Series(chunk))
    moments = np.array(times, dtype=np.int64)
    parts = by_time(moments, *counts.cuts(valid, test))
    assert (parts == 0).any()
    for earlier, later in ((0, 1), (1, 2), (0, 2)):
        if (parts == earlier).any() and (parts == later).any():
            assert moments[parts == earlier].max() < moments[parts == later].min()


def test_shares_of_a_split_by_time_are_right_to_a_second() -> None:
    counts = TimestampCounts()
    moments = np.random.default_rng(0).permutation(np.repeat(np.arange(1000), 3))
    counts.add(pl.Series(moments))
    parts = by_time(moments, *counts.cuts(0.1, 0.2))
    assert np.bincount(parts).tolist() == [2100, 300, 600]


def test_a_share_of_zero_is_empty() -> None:
    counts = TimestampCounts()
    counts.add(pl.Series([1, 2, 3, 4]))
    assert by_time(np.array([1, 2, 3, 4]), *counts.cuts(0, 0)).tolist() == [0, 0, 0, 0]


def test_a_split_by_hash_depends_on_the_key_and_seed_alone_and_has_the_right_shares() -> None:
    keys = np.arange(100_000, dtype=np.uint64)
    spec = SplitSpec(kind="random", valid=0.05, test=0.2)
    parts = by_hash(keys, spec)
    order = np.random.default_rng(0).permutation(len(keys))
    assert (by_hash(keys[order], spec) == parts[order]).all()
    shares = np.bincount(parts) / len(keys)
    np.testing.assert_allclose(shares, [0.75, 0.05, 0.2], atol=5 * 0.5 / np.sqrt(len(keys)))
    other = by_hash(keys, SplitSpec(kind="random", valid=0.05, test=0.2, seed=1))
    # Independent splits agree on the test rows as often as chance has it.
    assert ((parts == 2) & (other == 2)).mean() == pytest.approx(0.04, abs=0.005)


def test_given_names() -> None:
    names = pl.Series(["train", "Validation", "dev", "val", "TEST", "holdout", None])
    assert by_name(names).tolist() == [0, 1, 1, 1, 2, -1, -1]


def test_impossible_splits() -> None:
    with pytest.raises(ValidationError, match="nothing is left to train on"):
        SplitSpec(valid=0.5, test=0.5)
    with pytest.raises(ValidationError, match="needs the name of its column"):
        SplitSpec(kind="given")
