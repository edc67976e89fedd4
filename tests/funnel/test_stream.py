"""A funnel is kept fresh window by window: rankers as single ones are, items as in the log; killed, it goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))

from streams import KillAt, Killed, files

from fullrank.data.dataset import Dataset
from fullrank.data.simulate import DAY, START, simulate_dataset
from fullrank.funnel import Funnel, Request, load_bundle
from fullrank.funnel.stream import SEEN
from fullrank.training.publishing import read_pointer
from fullrank.training.stream import StreamReport, stream

LEARNING = {"batch_size": 64, "learning_rate": 5e-3}


def recipe(data: Path, **settings: Any) -> dict[str, Any]:
    return {
        "data": {"dataset": str(data)},
        "funnel": {
            "retrieval": {"epochs": 1},
            "early": {"training": LEARNING},
            "final": {"model": {"name": "deepfm", "hidden": [8], "embedding_dim": 4}, "training": LEARNING},
            "sizes": {"retrieve": 20, "keep": 10},
            "active_days": 1,
        },
        "stream": {"window": DAY, "retrieval_every": 2, "retrieval_windows": 2, "rollback": None, **settings},
    }


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return simulate_dataset(tmp_path_factory.mktemp("log") / "data", 1600, days=4, items=60, users=40)


@pytest.fixture(scope="module")
def whole(log: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StreamReport]:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("whole") / "out"
    return place, stream(recipe(log.path), place, source="recipe")


def test_the_final_stage_learns_as_it_does_alone(
    log: Dataset, whole: tuple[Path, StreamReport], tmp_path: Path
) -> None:
    _, report = whole
    alone = recipe(log.path)
    final = alone.pop("funnel")["final"]
    alone |= {"model": final["model"], "training": LEARNING}
    ranker = stream(alone, tmp_path / "alone")
    assert [window["metrics"] for window in ranker.windows] == [window["metrics"] for window in report.windows]
    assert len(report.windows) == 4 and report.counts["trained"] == sum(log.rows(split) for split in log.splits)


def test_the_catalogue_is_what_the_log_said_last_and_only_what_was_shown_today_is_found(
    log: Dataset, whole: tuple[Path, StreamReport]
) -> None:
    place, _ = whole
    pointer = read_pointer(place)
    assert pointer is not None
    rows = pl.concat([log.scan(split).collect() for split in log.splits])
    for day, bundle in enumerate(sorted((place / "bundles").iterdir()), 1):  # the last three of four days
        funnel = load_bundle(bundle)
        assert isinstance(funnel, Funnel)
        until = rows.filter(pl.col("__timestamp") < START + (day + 1) * DAY)
        last = until.sort("__timestamp", maintain_order=True).group_by("__item_id").last().sort("__item_id")
        items = funnel.items.frame.sort("__item_id")
        assert items["__item_id"].to_list() == last["__item_id"].to_list()
        assert items["__bid"].to_list() == last["__bid"].to_list()
        assert items[SEEN].to_list() == last["__timestamp"].to_list()
        newest = int(until["__timestamp"].max())  # type: ignore[arg-type]
        active = set(last.filter(pl.col("__timestamp") >= newest - DAY)["__item_id"].to_list())
        found = funnel.retriever.search(funnel.encode([Request()]), 1000)
        assert {funnel.items.ids[row] for row in funnel.items.places(found.item_keys_BK)[0].tolist()} == active
    assert bundle.name == Path(pointer.bundle).name


def test_killed_it_goes_on_to_the_same(
    log: Dataset, whole: tuple[Path, StreamReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, _ = whole
    at, ended = 30, False
    while not ended:
        with monkeypatch.context() as patched:
            KillAt(patched, at)
            try:
                stream(recipe(log.path), tmp_path / "out", source="recipe")
                ended = True
            except Killed:
                at += 41
        if read_pointer(tmp_path / "out") is not None:
            pointer = read_pointer(tmp_path / "out")
            assert pointer is not None and load_bundle(tmp_path / "out" / pointer.bundle)
    assert files(tmp_path / "out") == files(place)


def test_it_goes_on_from_a_bundle_and_has_no_deltas(
    log: Dataset, whole: tuple[Path, StreamReport], tmp_path: Path
) -> None:
    place, _ = whole
    bundle = min((place / "bundles").iterdir())
    report = stream(recipe(log.path), tmp_path / "out", start=bundle)
    first = report.windows[0]
    assert first["served"] == "0-start" and first["metrics"]["click"]["rows"] == first["rows"]
    with pytest.raises(ValueError, match=r"stream.delta is for a single ranker"):
        stream(recipe(log.path, delta=DAY // 2), tmp_path / "other")
    assert json.loads((place / "current.json").read_text())["deltas"] == []
