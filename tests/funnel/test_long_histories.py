"""Facts about histories of a million events: the newest are read, and no work is done on the others."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from fullrank.data.dataset import Dataset
from fullrank.funnel import Funnel, Request, raw_values

LENGTH = 1_000_000


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many values each column was made from."""
    counts: list[int] = []
    type_of = raw_values._type_of

    def counted(values: Any, *, numeric: bool) -> Any:
        values = list(values)
        counts.append(len(values))
        return type_of(values, numeric=numeric)

    monkeypatch.setattr(raw_values, "_type_of", counted)
    return counts


class Counted(list[Any]):
    """A list that must not be gone through."""

    def __iter__(self) -> Any:
        raise AssertionError("every event was looked at")


def history(length: int = LENGTH) -> dict[str, Any]:
    """The newest events are those of items 1, 2, 3."""
    items = Counted([50] * (length - 3) + [1, 2, 3])
    return {"history.item": items, "history.category": Counted([4] * length), "history.age": Counted([30.0] * length)}


def newest(dataset: Dataset, values: dict[str, Any]) -> dict[str, Any]:
    most = next(sequence.max_length for sequence in dataset.schema.sequences)
    return {name: list.__getitem__(events, slice(-most, None)) for name, events in values.items()}


def test_a_request_is_answered_by_its_newest_events(funnel: Funnel, dataset: Dataset, looked_at: list[int]) -> None:
    whole = funnel.recommend([Request("of long histories", history())], 5)[0]
    assert looked_at == [1, 20, 20, 20]  # the id of the user, and what is read of the history
    assert whole == funnel.recommend([Request("of long histories", newest(dataset, history()))], 5)[0]
    assert whole != funnel.recommend([Request("of long histories")], 5)[0]


def test_so_is_text_as_a_log_has_it(funnel: Funnel, dataset: Dataset, looked_at: list[int]) -> None:
    separator = next(sequence.separator for sequence in dataset.schema.sequences)
    text = {name: separator.join(map(str, list.copy(events))) for name, events in history(100_000).items()}
    expected = funnel.recommend([Request("of long histories", newest(dataset, history()))], 5)[0]
    looked_at.clear()
    assert funnel.recommend([Request("of long histories", text)], 5)[0] == expected
    assert max(looked_at) <= 20


def test_a_row_to_score_is_cut_alike(funnel: Funnel, dataset: Dataset, looked_at: list[int]) -> None:
    row: dict[str, Any] = {"user_id": 3, "item_id": 5, **history()}
    scored = funnel.scorer.score([row])[0].predictions
    assert max(looked_at) <= 20
    assert scored == pytest.approx(funnel.scorer.score([{**row, **newest(dataset, history())}])[0].predictions)


def test_fields_of_a_history_that_differ_in_length_are_refused_however_long(funnel: Funnel) -> None:
    values = history()
    values["history.age"] = [1.0] * (LENGTH - 1)
    message = '"history.age" has 999,999 events, "history.item" has 1,000,000'
    with pytest.raises(ValueError, match=message):
        funnel.recommend([Request("of long histories", values)], 5)
    with pytest.raises(ValueError, match=f"row 2: {message}"):
        funnel.scorer.score([{}, values])


def test_a_row_of_a_log_keeps_its_newest_events(dataset: Dataset) -> None:
    values = {name: [list.copy(events)] for name, events in history().items()}
    encoded = dataset.encoders.transform(pl.DataFrame(values), allow_missing=True)
    assert encoded["history.item"].list.len().to_list() == [20]
    expected = dataset.encoders.transform(
        pl.DataFrame({name: [each[0][-20:]] for name, each in values.items()}), allow_missing=True
    )
    for name in ("history.item", "history.category", "history.age"):
        assert encoded[name].to_list() == expected[name].to_list()
