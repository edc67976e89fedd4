"""The same value has the same text, however it is spelled."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullrank.data.encoders import Encoders
from fullrank.data.hashing import stable_hash
from fullrank.data.spelling import as_text
from fullrank.funnel.raw_values import scalar_column
from fullrank.schema import MISSING_MARKERS, Categorical, Keys, Label, MultiCategorical, Numeric, Schema

EXACT = st.integers(-(2**53) + 1, 2**53 - 1)
BLANKS = st.text(alphabet=" \t", max_size=2)
# Texts that are not an integer written as a float, a truth value, or a marker.
NAMES = st.one_of(
    st.integers(2**53, 2**64).map(str),
    st.integers(0, 999).map("{:05d}".format),
    st.from_regex(r"[1-9][0-9]{0,3}e[0-9]{1,3}", fullmatch=True),
    st.from_regex(r"[a-z][a-z0-9.]{6,9}", fullmatch=True),
    st.from_regex(r"[0-9]{1,4}\.[0-9]{0,3}[1-9]", fullmatch=True),
    st.from_regex(r"0[0-9]+\.0", fullmatch=True),
)


def one(values: list[object], dtype: pl.DataType | type[pl.DataType] | None = None) -> str | None:
    text: str | None = as_text(pl.Series(values, dtype=dtype), MISSING_MARKERS)[0]
    return text


@given(EXACT, BLANKS, BLANKS, st.integers(1, 3))
def test_an_integer_is_one_text_in_every_spelling(number: int, before: str, after: str, zeros: int) -> None:
    spelled = [f"{before}{number}{after}", f"{before}{number}.{'0' * zeros}{after}"]
    assert {one([text]) for text in spelled} == {str(number)}
    assert one([number]) == one([float(number)]) == str(number)
    assert scalar_column("f", [float(number), "x"], numeric=False)[0] == str(number)
    assert stable_hash(pl.Series([float(number)]))[0] == stable_hash(pl.Series([spelled[1]]))[0]


@given(NAMES, BLANKS)
def test_other_texts_stay_as_they_are(name: str, blank: str) -> None:
    assert one([f"{blank}{name}{blank}"]) == name


@given(
    st.lists(
        st.one_of(NAMES, EXACT.map("{}.0".format), st.sampled_from(["", " ", *MISSING_MARKERS, "True"]), st.none())
    )
)
def test_values_do_not_depend_on_their_company(values: list[str | None]) -> None:
    together = as_text(pl.Series(values, dtype=pl.String), MISSING_MARKERS).to_list()
    assert together == [one([value], pl.String) for value in values]


@pytest.mark.parametrize("marker", ["", "  ", *MISSING_MARKERS, " NULL"])
def test_markers_are_missing(marker: str) -> None:
    assert one([marker]) is None


def test_a_request_gets_the_ids_of_the_log() -> None:
    schema = Schema(
        features=(
            Categorical(name="item"),
            MultiCategorical(name="tags", separator=","),
            Numeric(name="age", encoding="scalar"),
        ),
        labels=(Label(name="bought", positive=("yes",), negative=("no",)),),
        keys=Keys(user_id="user"),
        missing=("?",),
    )
    log = pl.DataFrame(
        {"item": ["3.0", "NULL", "?"], "tags": ["[3, 5]", "3,5.0", "?"], "age": ["20.0", " 30", "?"],
         "user": ["7.0", "8", "7"], "bought": ["yes", " no", "yes"]}
    )  # fmt: skip
    encoders = Encoders.fit(schema, [log])
    encoded = encoders.transform(log)
    assert encoded["item"].to_list() == [2, 3, 0] or encoded["item"].to_list() == [3, 2, 0]
    assert encoded["tags"].to_list() == [encoded["tags"][0].to_list()] * 2 + [[]]
    assert encoded["age"].to_list() == [20, 30, 25]
    assert encoded["bought"].to_list() == [1, 0, 1]
    assert encoded["__user_id"].to_list() == [7, 8, 7]
    request = pl.DataFrame({"item": [3.0], "tags": [["3", "5.0"]], "age": [20]})
    assert encoders.transform(request, allow_missing=True).row(0) == encoded.select("age", "item", "tags").row(0)
