"""Counters after the log's end are those of an import of the longer log, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from fullrank.data.dataset import Dataset
from fullrank.data.hashing import splitmix, splitmix_one
from fullrank.data.loader import batch_from_frame
from fullrank.data.splits import SplitSpec
from fullrank.data.tallies import Tally
from fullrank.funnel import Funnel, FunnelConfig, load_bundle, save_bundle, train_funnel
from fullrank.funnel.mapped import write_arrays
from fullrank.funnel.recent_events import Event
from fullrank.funnel.requests import Request
from fullrank.funnel.totals import CounterState
from fullrank.funnel.training import EarlyConfig, FinalConfig
from fullrank.retrieval import TwoTower
from fullrank.schema import Schema
from fullrank.training import TrainerConfig

TRAINING = TrainerConfig(batch_size=64, epochs=1)
CONFIG = FunnelConfig(
    retrieval=TwoTower.Config(batch_size=64, epochs=1),
    early=EarlyConfig(training=TRAINING),
    final=FinalConfig(model={"name": "din", "hidden": [8], "embedding_dim": 4}, training=TRAINING),
)


def counter(name: str, *of: str, label: str | None = None, **more: Any) -> dict[str, Any]:
    return {"kind": "numeric", "name": name, "of": of, "label": label, "statistic": "count", **more}


RATE = {"statistic": "rate", "smoothing": 3.5}
SCHEMA = Schema.model_validate(
    {
        "features": [
            {"kind": "categorical", "name": "user", "role": "user"},
            {"kind": "categorical", "name": "country", "role": "user", "min_count": 100},
            {"kind": "categorical", "name": "item", "role": "item"},
            {"kind": "categorical", "name": "brand", "role": "item", "encoding": "hash", "num_embeddings": 4},
            {"kind": "categorical", "name": "device", "role": "context"},
            {"kind": "sequence", "name": "clicks", "of": ["item"], "where": "click", "length": 3},
            counter("user_rows", "user"),
            counter("user_clicks", "user", label="click", encoding="scalar"),
            counter("user_rate", "user", label="click", missing_indicator=True, encoding="scalar", **RATE),
            counter("country_stars", "country", label="stars", **RATE),
            counter("device_rate", "device", label="click", encoding="scalar", **RATE),
            counter("user_on_device", "user", "device", label="like"),
            counter("item_rate", "item", label="click", encoding="scalar", missing_indicator=True, **RATE),
            counter("brand_likes", "brand", label="like", encoding="scalar", transform="none"),
            counter("brand_item_stars", "brand", "item", label="stars", **{**RATE, "smoothing": 0}),
        ],
        "labels": [
            {"name": "click", "delay_seconds": 40},
            {"name": "like"},
            {"name": "stars", "kind": "regression", "delay_seconds": 7.5},
        ],
        "keys": {"user_id": "user", "item_id": "item", "timestamp": "time"},
    }
)
END = 1000
OF_REQUESTS = ("user_rows", "user_clicks", "user_rate", "user_rate__missing", "country_stars", "device_rate")
OF_REQUESTS = (*OF_REQUESTS, "user_on_device")
OF_ITEMS = ("item_rate", "item_rate__missing", "brand_likes", "brand_item_stars")


def log() -> pl.DataFrame:
    """Users u10 and u11, and items 20 to 22, come after the training log's end; up to it labels are missing."""
    rng, rows = np.random.default_rng(1), 1200
    time = np.sort(rng.integers(0, 3 * END // 2, rows))
    user = np.where(time <= END, rng.integers(0, 10, rows), rng.integers(0, 12, rows))
    item = np.where(time <= END, rng.integers(0, 20, rows), rng.integers(0, 23, rows))
    missing = (time <= END) & (rng.random(rows) < 0.3)
    frame = pl.DataFrame(
        {
            "user": [f"u{number}" for number in user],
            "country": [f" c{number % 3}" for number in user],
            "item": item,
            "brand": item % 5,
            "device": rng.integers(0, 3, rows),
            "time": time,
            "click": rng.integers(0, 2, rows),
            "like": rng.integers(0, 2, rows),
            "stars": rng.integers(0, 11, rows) / 10,
        }
    )
    nothing = pl.Series(missing)
    return frame.with_columns(
        pl.when(nothing).then(None).otherwise(pl.col(name)).alias(name) for name in ("click", "stars")
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("counters") / "bundle"
    before = log().filter(pl.col("time") <= END).sample(fraction=1, shuffle=True, seed=0)
    save_bundle(train_funnel(Dataset.from_frame(before, SCHEMA), CONFIG)[0], place)
    return place


@pytest.fixture(scope="module")
def encoded(bundle: Path) -> pl.DataFrame:
    """What an import makes of the whole log."""
    return imported(log(), bundle)


def imported(frame: pl.DataFrame, like: Path) -> pl.DataFrame:
    dataset = Dataset.from_frame(frame, like=like, split=SplitSpec(kind="none"))
    return dataset.scan("train").collect()


def opened(bundle: Path) -> Funnel:
    funnel = load_bundle(bundle)
    assert isinstance(funnel, Funnel)
    return funnel


def event_of(row: dict[str, Any], number: int | None = None) -> Event:
    # A label of 0 need not be said.
    labels = {name: row[name] for name in ("click", "like", "stars") if row[name]}
    return Event(row["item"], row["time"], labels, {key: row[key] for key in ("device", "brand", "country")}, number)


def numbers(funnel: Funnel, numeric_BN: Tensor, names: tuple[str, ...]) -> list[Tensor]:
    places = [funnel.schema.numeric_columns.index(name) for name in names]
    return [numeric_BN[:, place] for place in places]


def item_numbers(funnel: Funnel, item: int) -> list[Tensor]:
    row = funnel.items.row(item)
    if row is not None:
        return numbers(funnel, funnel.items.rows.batch.numeric_BN[row : row + 1], OF_ITEMS)
    return numbers(funnel, funnel._unknown_items([item]).numeric_BN, OF_ITEMS)


def compare(
    funnel: Funnel, encoded: pl.DataFrame, place: int, row: dict[str, Any], events: list[Event] | None = None
) -> None:
    """A row as it is served and as it is trained on; where its user has events of their own, only their part."""
    trained = batch_from_frame(encoded[place], funnel.schema).numeric_BN
    request = Request(row["user"], {"country": row["country"], "device": row["device"]}, events or (), row["time"])
    served = funnel.encode([request]).numeric_BN
    for name, one, other in zip(
        (*OF_REQUESTS, *OF_ITEMS),
        [*numbers(funnel, served, OF_REQUESTS), *item_numbers(funnel, row["item"])],
        numbers(funnel, trained, (*OF_REQUESTS, *OF_ITEMS)),
        strict=True,
    ):
        # Of an item that the catalogue does not have only the id is known.
        if not name.startswith("brand") or funnel.items.row(row["item"]) is not None:
            assert (events is not None and name in OF_ITEMS) or torch.equal(one, other), (name, row, one, other)


@pytest.mark.parametrize("order", ["as they happen", "all before", "in time for who needs them"])
def test_counters_are_what_the_trainer_would_compute(bundle: Path, encoded: pl.DataFrame, order: str) -> None:
    funnel, rng, frame = opened(bundle), np.random.default_rng(2), log()
    assert funnel.counters is not None
    later = [(place, frame.row(place, named=True)) for place, time in enumerate(frame["time"]) if time > END]
    assert len(later) > 300
    waiting = [row for _, row in later]
    rng.shuffle(waiting)  # type: ignore[arg-type]
    for place, row in later[::2]:
        if order == "as they happen":
            come = [each for each in waiting if each["time"] < row["time"]]
        else:
            come = (
                list(waiting)
                if order == "all before"
                else [each for each in waiting if each["time"] <= row["time"] - 40]
            )
        waiting = [each for each in waiting if each not in come]
        if order == "in time for who needs them":
            funnel.counters.totals.advance(row["time"])
            come += waiting
            waiting = []
        for each in come:
            funnel.counters.add(each["user"], event_of(each))
        funnel.counters.totals.advance(row["time"])
        funnel.counters.refresh()
        compare(funnel, encoded, place, row)


def test_a_users_own_events_count_before_all_others_are_read(bundle: Path, encoded: pl.DataFrame) -> None:
    """The last three are not in the totals yet; all others are."""
    frame = log()
    later = [(place, frame.row(place, named=True)) for place, time in enumerate(frame["time"]) if time > END]
    events = [event_of(row, number) for number, (_, row) in enumerate(later, 1)]
    mine = [event for event, (_, row) in zip(events, later, strict=True) if row["user"] == "u3"]
    for place, row in [each for each in later if each[1]["user"] == "u3"][5::5]:
        funnel = opened(bundle)
        assert funnel.counters is not None
        first = min(event.number or 0 for event in [event for event in mine if event.time < row["time"]][-3:])
        for event, (_, each) in zip(events, later, strict=True):
            if event.time < row["time"] and (each["user"] != "u3" or (event.number or 0) < first):
                funnel.counters.add(each["user"], event)
        funnel.counters.totals.number = first - 1
        funnel.counters.totals.advance(row["time"])
        compare(funnel, encoded, place, row, mine)


def test_without_events_counters_are_those_of_the_logs_end(bundle: Path, tmp_path: Path) -> None:
    """Of who asks in the first second at which all is known, and of all items, one by one, together, and mapped."""
    funnel, frame = opened(bundle), log().filter(pl.col("time") <= END)
    at = END + 60
    asked = [(user, user % 3, item, item % 5) for user, item in zip([*range(10)] * 2, range(20), strict=True)]
    names = ("user", "country", "item", "brand")
    rows = pl.DataFrame([dict(zip(names, values, strict=True)) for values in asked]).with_columns(
        user=pl.format("u{}", "user"), country=pl.format(" c{}", "country"), device=pl.lit(0), time=pl.lit(at),
        click=pl.lit(0), like=pl.lit(0), stars=pl.lit(0.0),
    )  # fmt: skip
    whole = pl.concat([frame, rows.select(frame.columns)], how="vertical_relaxed")
    trained = imported(whole, bundle).tail(20)
    of_users = OF_REQUESTS[:5]
    write_arrays(funnel, tmp_path / "arrays")
    mapped = load_bundle(bundle, tmp_path / "arrays")
    assert isinstance(mapped, Funnel)
    for each in (funnel, mapped):
        batches = [each.encode([Request(f"u{number}")]) for number in range(10)]
        batches.append(each.encode([Request(f"u{number}") for number in range(10)]))
        batches.append(each.encode([Request(f"u{number}", time=at) for number in range(10)]))
        found = [torch.cat([batch.numeric_BN for batch in batches[:10]]), *(batch.numeric_BN for batch in batches[10:])]
        for name in of_users:
            place = each.schema.numeric_columns.index(name)
            expected = trained[name].head(10).to_torch()
            assert all(torch.equal(numeric_BN[:, place], expected) for numeric_BN in found), name
        for _ in range(2):
            for item, row in enumerate(trained.iter_rows(named=True)):
                assert [float(number) for number in item_numbers(each, item)] == [row[name] for name in OF_ITEMS]
            assert each.counters is not None
            each.counters.refresh()
    # What one process writes is its own.
    mapped.items.rows.batch.numeric_BN.zero_()
    again = load_bundle(bundle, tmp_path / "arrays")
    assert isinstance(again, Funnel) and torch.equal(
        again.items.rows.batch.numeric_BN, funnel.items.rows.batch.numeric_BN
    )


def test_what_a_request_gives_goes_before_what_is_counted(bundle: Path) -> None:
    funnel = opened(bundle)
    plain, given = (
        funnel.encode([Request("u3", features, time=END + 5)]).numeric_BN
        for features in ({"country": "c1"}, {"country": "c1", "user_clicks": 7})
    )
    clicks, others = (
        funnel.schema.numeric_columns.index("user_clicks"),
        funnel.schema.numeric_columns.index("user_rate"),
    )
    assert given[0, clicks] == np.float32(np.log1p(7))
    assert given[0, others] == plain[0, others]


def test_an_items_new_brand_has_the_brands_counter(bundle: Path) -> None:
    from fullrank.funnel.item_changes import ChangedItems, ItemState

    changed = ChangedItems(opened(bundle))
    states = {"3": ItemState(features={"brand": 4}, whole=False), "70": ItemState(features={"brand": " 4"})}
    funnel = changed.prepare(states, 0.0).apply()
    assert funnel.counters is not None
    funnel.counters.refresh()
    place = OF_ITEMS.index("brand_likes")
    assert item_numbers(funnel, 3)[place] == item_numbers(funnel, 70)[place] == item_numbers(funnel, 4)[place]
    assert item_numbers(funnel, 3)[place] != item_numbers(opened(bundle), 3)[place]


def test_a_bundle_without_sums_has_its_counters_as_before(bundle: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    save_bundle(opened(bundle).with_parts(counters=None, until=None), old)
    funnel = opened(old)
    events = [Event(3, END + 1, {"click": 1})] * 5
    assert funnel.counters is None
    still, now = (funnel.encode([Request("u3", events=each)]).numeric_BN for each in ((), events))
    assert torch.equal(still, now)
    assert not torch.equal(now, opened(bundle).encode([Request("u3", events=events)]).numeric_BN)


def test_damaged_sums_are_refused(bundle: Path) -> None:
    funnel = opened(bundle)
    assert funnel.counters is not None
    tensors = funnel.counters.state.tensors
    place = funnel.counters.state.tallies.index(Tally(("user",), "rate", "click"))
    parts = {name: tensors[f"{place}.{name}"] for name in ("keys", "rows", "totals", "pending_places")}
    assert len(parts["pending_places"])
    for name, wrong in (
        ("keys", parts["keys"].flip(0)),
        ("rows", parts["rows"][:-1]),
        ("totals", parts["totals"].long()),
        ("pending_places", parts["pending_places"] + 10_000),
    ):
        with pytest.raises(ValueError, match="keys are not in order|64-bit|no key"):
            CounterState(funnel.schema, {**tensors, f"{place}.{name}": wrong.contiguous()}, END)
    with pytest.raises(ValueError, match="expected the tensors"):
        CounterState(funnel.schema, {}, END)


def test_one_number_is_mixed_like_many() -> None:
    some = np.random.default_rng(0).integers(0, 2**64 - 1, 100, dtype=np.uint64, endpoint=True)
    assert splitmix(some).tolist() == [splitmix_one(number) for number in some.tolist()]
