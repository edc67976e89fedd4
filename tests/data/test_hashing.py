"""The hash of a text never changes."""

from __future__ import annotations

import numpy as np
import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from fullrank.data.hashing import hash_series, hash_text, raw_ids, stable_hash
from fullrank.schema import MISSING_ID, RAW_IDS

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


@given(st.lists(st.text(max_size=20) | st.integers(-(2**64), 2**64).map(str) | st.none(), max_size=9))
def test_raw_ids_are_the_same_one_by_one_and_in_columns(texts: list[str | None]) -> None:
    alone = [int(raw_ids(pl.Series([text], dtype=pl.String))[0]) for text in texts]
    assert raw_ids(pl.Series([*texts, *["x"] * 5], dtype=pl.String)).tolist()[: len(texts)] == alone
    assert all(0 <= one < RAW_IDS for one in alone)


def test_raw_ids_keep_whole_numbers_and_tell_all_spellings_apart() -> None:
    numbers = [0, 1, 10**18, RAW_IDS - 3]
    assert raw_ids(pl.Series([str(n) for n in numbers])).tolist() == [n + 2 for n in numbers]
    others = ["007", "-1", "+7", "7.5", "", " 7", str(RAW_IDS - 2), str(2**64), "seven", "٧"]
    ids = raw_ids(pl.Series([*others, "7", None], dtype=pl.String)).tolist()
    assert len(set(ids)) == len(ids) and ids[-2:] == [9, MISSING_ID]
