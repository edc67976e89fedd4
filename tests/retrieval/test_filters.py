"""Filters of items, against a plain program."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
import pytest

from fullrank.retrieval import ItemFilter, item_keys

RANDOM = np.random.default_rng(0)
ROWS: list[dict[str, Any]] = [
    {
        "item_id": 10 * n,
        "kind": None if n % 11 == 0 else ["a", "b", "c"][n % 3],
        "tags": None if n % 13 == 0 else [f"t{t}" for t in RANDOM.choice(4, RANDOM.integers(0, 4), replace=False)],
        "size": None if n % 7 == 0 else math.nan if n % 17 == 0 else float(RANDOM.integers(0, 9)),
        "fresh": bool(n % 2),
    }
    for n in range(200)
]
ITEMS = pl.DataFrame(ROWS, schema_overrides={"tags": pl.List(pl.String)})


def texts(value: Any) -> set[str]:
    """As a filter compares them."""
    values = value if isinstance(value, list) else [value]
    kept = [one for one in values if one is not None and one == one]
    return {
        str(one).lower() if isinstance(one, bool) else str(int(one)) if isinstance(one, float) else str(one)
        for one in kept
    }


def chosen(row: dict[str, Any], given: dict[str, Any]) -> bool:
    def sets(name: str) -> list[tuple[set[str], set[str]]]:
        return [(texts(row[column]), texts(values)) for column, values in given.get(name, {}).items()]

    in_range = (
        row[column] is not None and (low is None or row[column] >= low) and (high is None or row[column] <= high)
        and row[column] == row[column]
        for column, (low, high) in given.get("range", {}).items()
    )  # fmt: skip
    return (
        all(has & wanted for has, wanted in sets("any"))
        and all(wanted <= has for has, wanted in sets("all"))
        and not any(has & wanted for has, wanted in sets("none"))
        and all(in_range)
    )


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"any": {"kind": ["a", "c"]}},
        {"any": {"kind": ["a"], "tags": ["t1", "t3"]}},
        {"all": {"tags": ["t0", "t2"]}},
        {"all": {"tags": [], "kind": []}},
        {"any": {"tags": []}},
        {"all": {"kind": ["a", "b"]}},
        {"none": {"tags": ["t0"], "kind": ["b"]}},
        {"range": {"size": [2, 5]}},
        {"range": {"size": [None, 3.5]}, "any": {"fresh": [True]}},
        {"range": {"size": [None, None]}},
        {"any": {"size": [3, "4.0"]}},
        {"any": {"item_id": [30, "50", 70.0]}},
    ],
)
def test_a_filter_chooses_what_a_plain_program_would(given: dict[str, Any]) -> None:
    found = ItemFilter.of(given).keys(ITEMS).tolist()
    expected = [row["item_id"] for row in ROWS if chosen(row, given)]
    if given.get("any", {}).get("size"):
        expected = [row["item_id"] for row in ROWS if row["size"] in (3.0, 4.0)]
    if given.get("any", {}).get("item_id"):
        expected = [30, 50, 70]
    assert found == expected


def test_keys_are_those_of_retrievers_and_mistakes_are_named() -> None:
    named = ITEMS.with_columns(pl.format("i{}", "item_id").alias("item_id"))
    keys = ItemFilter.of({"any": {"kind": "a"}}).keys(named)
    assert keys.tolist() == item_keys(named.filter(pl.col("kind") == "a")["item_id"]).tolist()
    for given, said in (
        ({"any": {"knd": ["a"]}}, 'there is no column "knd"'),
        ({"range": {"kind": [1, 2]}}, 'column "kind" is String, expected numbers'),
    ):
        with pytest.raises(ValueError, match=said):
            ItemFilter.of(given).chosen(ITEMS)
    for wrong in ({"only": {}}, {"range": {"size": [1]}}, {"any": ["kind"]}, "kind", {"any": {"kind": [["a"]]}}):
        with pytest.raises(ValueError, match="^filter"):
            ItemFilter.of(wrong)
