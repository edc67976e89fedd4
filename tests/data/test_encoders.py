"""Encoders: what an id or a number means, fitted on training rows alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import QuantileTransformer, StandardScaler

from fullrank.data.encoders import Encoders
from fullrank.data.hashing import hash_text
from fullrank.data.transforms import log2_buckets
from fullrank.schema import (
    Categorical,
    EventId,
    EventNumber,
    Keys,
    Label,
    MultiCategorical,
    Numeric,
    Schema,
    Sequence,
)


def ids(feature: Categorical, train: list[object], rows: list[object]) -> list[int]:
    """Ids of `rows` by an encoder fitted on `train`."""
    schema = Schema(features=(feature,))
    encoders = Encoders.fit(schema, [pl.DataFrame({feature.name: pl.Series(train, strict=False)})])
    found: list[int] = encoders.transform(pl.DataFrame({feature.name: rows}))[feature.name].to_list()
    return found


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.text(alphabet="abc", min_size=1, max_size=2), min_size=1, max_size=200),
    chunks=st.integers(1, 5),
    min_count=st.integers(1, 4),
)
def test_a_vocabulary_is_ordered_by_count_then_text(values: list[str], chunks: int, min_count: int) -> None:
    schema = Schema(features=(Categorical(name="c", min_count=min_count),))
    frames = [pl.DataFrame({"c": part}, schema={"c": pl.String}) for part in np.array_split(values, chunks)]
    encoders = Encoders.fit(schema, frames)
    counts = Counter(values)
    kept = sorted((v for v in counts if counts[v] >= min_count), key=lambda v: (-counts[v], v))
    expected = {value: 2 + place for place, value in enumerate(kept)}
    assert encoders.schema.tables() == {"c": 2 + len(kept)}
    encoded = encoders.transform(pl.DataFrame({"c": values}))["c"].to_list()
    assert encoded == [expected.get(value, 1) for value in values]


def test_missing_and_unknown_have_ids_of_their_own() -> None:
    assert ids(Categorical(name="c"), ["x", "x", "y", None, ""], ["x", "y", None, "", "z"]) == [2, 3, 0, 0, 1]
    # The same with more rows than the short path takes.
    assert ids(Categorical(name="c"), ["x", "x", "y"], ["x", "y", None, "", "z"] * 50) == [2, 3, 0, 0, 1] * 50


def test_one_value_has_one_id_whatever_type_carries_it() -> None:
    schema = Schema(features=(Categorical(name="c"),))
    encoders = Encoders.fit(schema, [pl.DataFrame({"c": ["7", "8", "8"]})])
    for rows in ([7, 8], [7.0, 8.0], ["7", "8"]):
        assert encoders.transform(pl.DataFrame({"c": rows}))["c"].to_list() == [3, 2]
    assert encoders.transform(pl.DataFrame({"c": [7, 8] * 100}))["c"].to_list() == [3, 2] * 100


def test_shared_tables_have_one_vocabulary_over_features_and_events() -> None:
    schema = Schema(
        features=(
            Categorical(name="item"),
            MultiCategorical(name="basket", table="item"),
            Sequence(name="past", fields=(EventId(name="item", table="item"),)),
        )
    )
    frame = pl.DataFrame({"item": ["a", "b"], "basket": ["c|c|a", ""], "past.item": [["d", "c"], ["e"]]})
    encoders = Encoders.fit(schema, [frame])
    # c three times, a twice, then b, d, e in order of text.
    assert encoders.vocabularies["item"].values.to_list() == ["c", "a", "b", "d", "e"]
    encoded = encoders.transform(frame)
    assert encoded["item"].to_list() == [3, 4]
    assert encoded["basket"].to_list() == [[2, 2, 3], []]
    assert encoded["past.item"].to_list() == [[5, 2], [6]]


def test_counts_of_bags_weigh_each_row_even_when_equal_texts_are_parsed_once() -> None:
    schema = Schema(features=(MultiCategorical(name="b"),))
    texts = ["x|y"] * 60 + ["y|z"] * 40 + ["z"] * 30
    vocabulary = Encoders.fit(schema, [pl.DataFrame({"b": texts})]).vocabularies["b"]
    assert dict(zip(vocabulary.values, vocabulary.counts, strict=True)) == {"y": 100, "z": 70, "x": 60}


def test_bags_keep_their_first_ids_and_sequences_their_latest() -> None:
    schema = Schema(
        features=(
            MultiCategorical(name="b", max_length=2),
            Sequence(name="s", fields=(EventId(name="i"), EventNumber(name="n")), max_length=2),
        )
    )
    frame = pl.DataFrame({"b": ["a|b|c"], "s.i": ["a^b^c"], "s.n": [[1.0, 2.0, 3.0]]})
    encoded = Encoders.fit(schema, [frame]).transform(frame)
    assert encoded["b"].to_list() == [[2, 3]]
    assert encoded["s.i"].to_list() == [[2, 3]]
    assert encoded["s.n"].to_list() == [[2.0, 3.0]]


def test_a_missing_event_keeps_its_place() -> None:
    schema = Schema(features=(Sequence(name="s", fields=(EventId(name="i"), EventNumber(name="n"))),))
    frame = pl.DataFrame({"s.i": ["a^^b"], "s.n": ["1^2^"]})
    encoded = Encoders.fit(schema, [frame]).transform(frame)
    assert encoded["s.i"].to_list() == [[2, 0, 3]]
    assert encoded["s.n"].to_list() == [[1.0, 2.0, 0.0]]


def test_hashing_needs_no_training_and_spreads_over_the_table() -> None:
    feature = Categorical(name="c", encoding="hash", num_embeddings=12)
    rows = [str(n) for n in range(300)]
    found = ids(feature, ["1"], [*rows, None])
    assert found[:-1] == [2 + hash_text(row) % 10 for row in rows]
    assert set(found[:-1]) == set(range(2, 12))
    assert found[-1] == 0


def test_identity_takes_ids_as_they_are_within_their_range() -> None:
    feature = Categorical(name="c", encoding="identity", num_embeddings=5)
    assert ids(feature, [1], [0, 4, None, 2]) == [0, 4, 0, 2]
    with pytest.raises(ValueError, match='row 1: column "c" is "5": id is not an integer from 0 to 4'):
        ids(feature, [1], [5])


def test_log2_buckets_of_counts() -> None:
    counts = np.array([-100.0, -3, 0, 1, 2, 3, 4, 7, 8, 1024])
    expected = [-8, -3, 0, 1, 2] + [int(np.log2(x) ** 2) + 2 for x in (3, 4, 7, 8, 1024)]
    assert log2_buckets(counts).tolist() == expected
    # Ids: one row per bucket from the lowest to the highest seen; beyond them the nearest; missing is 0.
    feature = Categorical(name="c", encoding="log2_bucket")
    assert ids(feature, [0, 4, 8, None], [0, 4, 8, 1_000_000, -5, None]) == [2, 8, 13, 13, 2, 0]


def test_quantile_buckets_hold_equal_shares_of_the_training_rows() -> None:
    rng = np.random.default_rng(1)
    train = rng.exponential(size=10_000)
    found = ids(Categorical(name="c", encoding="quantile", num_embeddings=10), list(train), list(train))
    counts = np.bincount(found, minlength=10)
    assert counts[:2].tolist() == [0, 0]
    assert np.abs(counts[2:] - 1250).max() <= 1


def numbers(feature: Numeric, train: list[float | None], rows: list[float | None]) -> pl.DataFrame:
    schema = Schema(features=(feature,))
    encoders = Encoders.fit(schema, [pl.DataFrame({"x": part}) for part in (train[:7], train[7:]) if part])
    return encoders.transform(pl.DataFrame({"x": rows}, schema={"x": pl.Float64}))


def test_standard_equals_scikit_learn_over_chunks() -> None:
    train = list(np.random.default_rng(2).normal(5, 3, 1000))
    found = numbers(Numeric(name="x", transform="standard", encoding="scalar"), train, train[:50])["x"].to_numpy()
    oracle = StandardScaler().fit(np.array(train)[:, None]).transform(np.array(train[:50])[:, None])[:, 0]
    np.testing.assert_allclose(found, oracle, rtol=1e-5, atol=1e-6)


def test_quantile_equals_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    train = list(np.round(rng.lognormal(size=3000), 1))
    rows = [-1.0, 0.5, 1.0, 2.3, 99.0]
    found = numbers(Numeric(name="x", transform="quantile", encoding="scalar"), train, rows)["x"].to_numpy()
    oracle = QuantileTransformer(n_quantiles=1001, subsample=None).fit(np.array(train)[:, None])
    np.testing.assert_allclose(found, oracle.transform(np.array(rows)[:, None])[:, 0], atol=2e-3)


def test_log1p_is_odd() -> None:
    found = numbers(Numeric(name="x", transform="log1p", encoding="scalar"), [1.0], [0.0, np.e - 1, 1 - np.e])[
        "x"
    ].to_list()
    assert found == pytest.approx([0.0, 1.0, -1.0])


@pytest.mark.parametrize("transform", ["none", "log1p", "standard", "quantile"])
def test_a_missing_number_is_the_transform_of_the_training_mean(transform: str) -> None:
    feature = Numeric(name="x", transform=transform, encoding="scalar", missing_indicator=True)  # type: ignore[arg-type]
    train = [1.0, 2.0, 6.0, None, 3.0, 3.0, 3.0, 3.0]
    frame = numbers(feature, train, [None, 3.0])
    assert frame["x"][0] == pytest.approx(frame["x"][1])
    assert frame["x__missing"].to_list() == [1.0, 0.0]


def test_a_constant_column_does_not_divide_by_zero() -> None:
    assert numbers(Numeric(name="x", transform="standard", encoding="scalar"), [4.0, 4.0], [4.0, 5.0])[
        "x"
    ].to_list() == [0.0, 1.0]


EVERYTHING = Schema(
    features=(
        Numeric(name="n", transform="quantile", missing_indicator=True),
        Numeric(name="m", transform="standard"),
        Categorical(name="a/b"),
        Categorical(name="count", encoding="log2_bucket"),
        Categorical(name="price", encoding="quantile", num_embeddings=6),
        Categorical(name="h", encoding="hash", num_embeddings=100),
        MultiCategorical(name="tags", min_count=2),
        Sequence(name="past", fields=(EventId(name="item", table="a/b"), EventNumber(name="age", transform="log1p"))),
    ),
    labels=(Label(name="y"),),
    keys=Keys(user_id="h", timestamp="t"),
)


def everything(rows: int, seed: int) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    lists = [rng.integers(0, 20, rng.integers(0, 4)).tolist() for _ in range(rows)]
    return pl.DataFrame(
        {
            "n": [None if rng.random() < 0.1 else float(rng.normal()) for _ in range(rows)],
            "m": rng.normal(size=rows),
            "a/b": [f"v{n}" for n in rng.integers(0, 20, rows)],
            "count": rng.integers(0, 500, rows),
            "price": rng.random(rows),
            "h": [f"u{n}" for n in rng.integers(0, 20, rows)],
            "tags": ["|".join(f"t{n}" for n in each) for each in lists],
            "past.item": [[f"v{n}" for n in each] for each in lists],
            "past.age": [[float(n) for n in each] for each in lists],
            "y": rng.integers(0, 2, rows),
            "t": rng.integers(0, 10**9, rows),
        }
    )


def test_saved_and_loaded_encoders_encode_alike(tmp_path: Path) -> None:
    encoders = Encoders.fit(EVERYTHING, [everything(300, 0), everything(100, 1)])
    encoders.save(tmp_path / "encoders")
    loaded = Encoders.load(tmp_path / "encoders")
    fresh = everything(200, 2)
    assert loaded.schema == encoders.schema
    assert loaded.transform(fresh).equals(encoders.transform(fresh))


def test_a_row_alone_encodes_as_it_does_among_others() -> None:
    encoders = Encoders.fit(EVERYTHING, [everything(300, 0)])
    frame = everything(150, 3)
    together = encoders.transform(frame)
    for row in range(0, 150, 15):
        assert encoders.transform(frame.slice(row, 1)).equals(together.slice(row, 1))


def test_absent_columns_are_missing_values_when_allowed() -> None:
    encoders = Encoders.fit(EVERYTHING, [everything(300, 0)])
    encoded = encoders.transform(pl.DataFrame({"h": ["u1"]}), allow_missing=True)
    assert encoded.columns == [
        "n", "n__missing", "m", "a/b", "count", "price", "h", "tags", "past.item", "past.age", "__user_id",
    ]  # fmt: skip
    assert encoded.select("n__missing", "a/b", "count", "price", "tags", "past.item", "past.age").rows() == [
        (1.0, 0, 0, 0, [], [], [])
    ]
    with pytest.raises(ValueError, match='column "n" of the schema is missing'):
        encoders.transform(pl.DataFrame({"h": ["u1"]}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version is 2, this release reads 1"),
        ({"numbers": {}}, 'no state for number "m"'),
        ({"vocabularies": {"a/b": "../x.parquet"}}, "lies outside the directory"),
        ({"vocabularies": {}}, 'no vocabulary state for feature "a/b"'),
        ({"surprise": 1}, "surprise: unknown key"),
    ],
)
def test_damaged_encoders_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    Encoders.fit(EVERYTHING, [everything(50, 0)]).save(tmp_path)
    path = tmp_path / "encoders.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as caught:
        Encoders.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    Encoders.fit(EVERYTHING, [everything(50, 0)]).save(tmp_path)
    pl.DataFrame({"value": ["x"], "count": [1]}).write_parquet(tmp_path / "vocabulary-000.parquet")
    with pytest.raises(ValueError, match='table "a/b" has 22 rows, its file 3'):
        Encoders.load(tmp_path)


def test_features_that_share_a_table_must_share_its_rules() -> None:
    schema = Schema(features=(Categorical(name="a", table="t"), Categorical(name="b", table="t", min_count=2)))
    with pytest.raises(ValueError, match='features "a" and "b" share table "t" but differ in encoding or min_count'):
        Encoders.fit(schema, [])
