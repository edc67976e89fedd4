"""Files that arrive one by one: late, early and odd ones, new ids, columns that change, and a kill between them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from streams import HOUR, START, KillAt, Killed, files

from fullrank.data.encoders import Encoders
from fullrank.serving.store import EventStore
from fullrank.training.publishing import open_current
from fullrank.training.stream import StreamReport, stream

SCHEMA: dict[str, Any] = {
    "features": [
        {"kind": "categorical", "name": "user", "role": "user"},
        {"kind": "categorical", "name": "item", "role": "item"},
        {"kind": "numeric", "name": "price", "encoding": "scalar"},
    ],
    "labels": [{"name": "click"}],
    "keys": {"user_id": "user", "item_id": "item", "timestamp": "time"},
}


def clicks(hour: float, rows: int = 90, items: int = 8, begin: int = 0) -> pl.DataFrame:
    numbers = range(rows)
    return pl.DataFrame(
        {
            "user": [f"u{k % 7}" for k in numbers],
            "item": [f"i{begin + k % items}" for k in numbers],
            "price": [float(k % 5) for k in numbers],
            "click": [int(k * 7919 % 10 < 4) for k in numbers],
            "time": [START + int(hour * HOUR) + k * HOUR // rows for k in numbers],
        }
    )


class Room:
    """A directory that files arrive in, and the stream of them."""

    def __init__(self, place: Path) -> None:
        self.place, self.log, self.out = place, place / "log", place / "out"
        self.log.mkdir()
        (place / "schema.json").write_text(json.dumps(SCHEMA))

    def write(self, name: str, frame: pl.DataFrame, written: int | None = None) -> None:
        frame.write_parquet(self.log / name)
        at = written or START + 48 * HOUR
        os.utime(self.log / name, (at, at))

    def run(
        self, embedding: str = "adagrad", *, format: str = "parquet", forgotten: Path | None = None, **settings: Any
    ) -> StreamReport:
        torch.set_num_threads(1)
        source = {"format": format, "path": str(self.log), "schema_file": str(self.place / "schema.json")}
        if forgotten is not None:
            source["forgotten"] = str(forgotten)
        recipe = {
            "data": {"dataset": str(self.place / "data"), "source": source},
            "model": {"name": "deepfm", "hidden": [8], "embedding_dim": 4},
            "training": {"batch_size": 32, "learning_rate": 0.02},
            "embedding": {"kind": embedding},
            "stream": {"arrivals": True, "rollback": None, **settings},
        }
        return stream(recipe, self.out, source="recipe")


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)


def test_a_window_ends_when_a_later_event_says_so_and_the_last_one_waits(room: Room) -> None:
    room.write("a.parquet", clicks(0))
    assert room.run().windows == []
    room.write("b.parquet", clicks(1).head(1))
    (first,) = room.run().windows
    assert first["rows"] == 90 and first["metrics"] == {}
    room.write("c.parquet", clicks(5))  # hours without events publish nothing
    (second,) = room.run().windows
    assert (second["begin"], second["rows"]) == (START + HOUR, 1)
    room.write("d.parquet", clicks(6).head(0))  # nor does a file without rows
    assert room.run().windows == []
    room.write("e.parquet", clicks(6).head(1))
    (third,) = room.run().windows
    assert (third["begin"], third["rows"], third["empty_before"]) == (START + 5 * HOUR, 90, 3)


def test_late_events_are_learnt_and_not_judged_by(room: Room) -> None:
    room.write("a.parquet", pl.concat([clicks(0), clicks(1).head(60)]))
    room.write("b.parquet", pl.concat([clicks(0, 30), clicks(1).tail(30)]))
    room.write("c.parquet", clicks(2, 10))
    report = room.run()
    assert [(window["rows"], window["late"]) for window in report.windows] == [(90, 0), (90, 30)]
    assert report.windows[1]["metrics"]["click"]["rows"] == 90
    assert report.counts["trained"] == 210 and report.counts["late"] == 30


def test_within_the_lateness_they_are_in_their_window(room: Room) -> None:
    room.write("a.parquet", pl.concat([clicks(0), clicks(1).head(60)]))
    room.write("b.parquet", pl.concat([clicks(0, 30), clicks(1).tail(30)]))
    room.write("c.parquet", clicks(2, 90))
    report = room.run(lateness=HOUR)
    assert [(window["rows"], window["late"]) for window in report.windows] == [(120, 0)]


def test_events_from_the_future_are_refused(room: Room) -> None:
    written = START + HOUR
    room.write("a.parquet", pl.concat([clicks(0), clicks(1).head(3), clicks(24 * 365).head(4)]), written)
    room.write("b.parquet", clicks(2).head(1), written + HOUR)
    report = room.run(skew=90)  # the first three are 0, 40 and 80 s ahead
    assert [window["rows"] for window in report.windows] == [90, 3]
    assert report.counts["refused"] == 4 and report.counts["rows"] == 94


def test_text_files_are_taken_up_too(room: Room, tmp_path: Path) -> None:
    for hour in range(3):
        clicks(hour).write_csv(room.log / f"{hour}.csv")
    (room.log / ".3.csv").write_text("half of a fi")
    (room.log / "4.csv").write_text("user,item,price,click,time\n")
    assert [window["rows"] for window in room.run(format="csv").windows] == [90, 90]
    clicks(4).select("user", "item", "click", "time").write_csv(room.log / "5.csv")
    with pytest.raises(ValueError, match='5.csv: the column "price" of the files before is gone'):
        room.run(format="csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.drop("price"), 'b.parquet: the column "price" of the files before is gone'),
        (lambda frame: frame.with_columns(mood=1), 'b.parquet: column "mood" is new'),
        (lambda frame: frame.with_columns(item=3), 'b.parquet: column "item" holds integers, and text'),
        (lambda frame: frame.with_columns(click=7), "b.parquet: .* rows are bad"),
    ],
)
def test_a_schema_that_changes_ends_the_stream_and_leaves_what_is_served(change: Any, message: str, room: Room) -> None:
    room.write("a.parquet", pl.concat([clicks(0), clicks(1).head(1)]))
    room.run()
    before = files(room.out / "bundles")
    room.write("b.parquet", change(clicks(2)))
    for _ in range(2):
        with pytest.raises(ValueError, match=message) as refused:
            room.run()
        assert "\n" not in str(refused.value)
        assert files(room.out / "bundles") == before and open_current(room.out)
    room.write("b.parquet", clicks(2))  # mended, it is taken up
    assert len(room.run().windows) == 1


@pytest.mark.parametrize(("embedding", "delta"), [("adagrad", None), ("dense", None), ("adagrad", HOUR // 2)])
def test_new_ids_get_rows_and_a_kill_between_files_changes_nothing(
    embedding: str, delta: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        rooms.append(Room(tmp_path / name))
    whole, killed = rooms
    killed.place = whole.place  # so that the recipes are the same
    killed.log = whole.log
    names = [f"{hour}.parquet" for hour in range(4)]
    for hour, name in enumerate(names):
        whole.write(name, clicks(hour, items=8 + hour, begin=hour))
    report = whole.run(embedding, delta=delta)
    served, pointer, position = open_current(whole.out)
    assert [window["rows"] for window in report.windows] == [90, 90, 90]
    known = Encoders.load(whole.out / pointer.bundle / "encoders").vocabularies["item"].values.to_list()
    assert known == [f"i{k}" for k in range(8)] + [f"i{k}" for k in range(8, 14)][: len(known) - 8]
    assert len(known) == 14
    assert position.number == len(pointer.deltas)
    at, ended = 20, False
    while not ended:
        with monkeypatch.context() as patched:
            KillAt(patched, at)
            try:
                killed.run(embedding, delta=delta)
                ended = True
            except Killed:
                at += 17
    assert files(killed.out) == files(whole.out)
    with torch.no_grad():
        assert all(bool(value.isfinite().all()) for value in served.state_dict().values())


def test_arriving_rows_of_forgotten_users_are_left_out_and_counted(room: Room, tmp_path: Path) -> None:
    store = EventStore(tmp_path / "store")
    room.write("a.parquet", clicks(0))
    assert room.run(forgotten=tmp_path / "store").counts["forgotten"] == 0
    store.forget("u3")
    room.write("b.parquet", clicks(1).filter(pl.col("user") == "u3"))  # nobody is left in this file
    room.write("c.parquet", clicks(2))
    gone = clicks(2).filter(pl.col("user") == "u3").height
    counts = room.run(forgotten=tmp_path / "store").counts
    assert counts["forgotten"] == 2 * gone and counts["rows"] == 180 - gone
    again = room.run(forgotten=tmp_path / "store")
    assert again.counts == counts and again.windows == []
    store.close()
