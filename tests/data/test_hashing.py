"""The hash of a text never changes."""

from __future__ import annotations

import numpy as np
import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from fullrank.data.hashing import hash_series, hash_text, stable_hash

FROZEN = [0, 3_387_003_161_236_568_110, 755_621_251_303_720_452, 4_274_729_870_443_894_285]


def test_hashes_are_frozen() -> None:
    # Stored models hold ids made from these; a change of the function would scramble them.
    assert [hash_text(text) for text in ("", "0", "68fd1e64", "a longer text, ümlaut")] == FROZEN


@given(st.lists(st.text(max_size=40)))
def test_the_column_form_equals_the_single_form(texts: list[str]) -> None:
    assert hash_series(pl.Series(texts, dtype=pl.String)).tolist() == [hash_text(text) for text in texts]


def test_a_slice_hashes_like_the_whole() -> None:
    texts = pl.Series([f"value {n}" for n in range(100)])
    assert hash_series(texts.slice(37, 11)).tolist() == hash_series(texts)[37:48].tolist()


def test_numbers_hash_like_their_text_and_null_stays_null() -> None:
    expected = hash_text("42")
    for column in (pl.Series([42, None]), pl.Series([42.0, None]), pl.Series(["42", None]), pl.Series(["42", ""])):
        assert stable_hash(column).to_list() == [expected, None]
    assert stable_hash(pl.Series([1.5])).to_list() == [hash_text("1.5")]


def test_buckets_fill_like_independent_uniform_draws() -> None:
    hashes = hash_series(pl.Series([str(n) for n in range(200_000)]))
    for bits in (hashes % np.uint64(997), (hashes >> np.uint64(32)) % np.uint64(997)):
        counts = np.bincount(bits.astype(np.int64), minlength=997)
        chi_squared = ((counts - 200_000 / 997) ** 2 / (200_000 / 997)).sum()
        # 996 degrees of freedom: six standard deviations.
        assert abs(chi_squared - 996) < 6 * np.sqrt(2 * 996)
