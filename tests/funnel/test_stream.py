"""A funnel is kept fresh window by window: rankers as single ones are, items as in the log; killed, it goes on to the
same. Deltas lead from bundle to bundle, and early stages learn from the final one as they do without a stream."""

from __future__ import annotations

import itertools
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))

from streams import KillAt, Killed, files

from fullrank.data.dataset import Dataset
from fullrank.data.loader import batch_from_frame
from fullrank.data.simulate import DAY, START, simulate_dataset
from fullrank.funnel import (
    Distilled,
    Funnel,
    FunnelConfig,
    Request,
    StageSizes,
    load_bundle,
    save_bundle,
    train_funnel,
)
from fullrank.funnel.catalogue import SEEN
from fullrank.funnel.deltas import with_deltas
from fullrank.funnel.distillation import lists_for, with_lists
from fullrank.training.deltas import position_of, state_of
from fullrank.training.learner import Fitted, fresh_ranker
from fullrank.training.publishing import read_pointer
from fullrank.training.stream import StreamReport, stream

LEARNING = {"batch_size": 64, "learning_rate": 5e-3}
DISTILL = {"requests": 150, "candidates": 8, "random": 0.25, "lists_per_batch": 5}
SETTINGS: dict[str, dict[str, Any]] = {
    "bundles": {},
    "deltas": {"delta": DAY // 2, "distill": DISTILL},
}


def recipe(data: Path, distill: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    return {
        "data": {"dataset": str(data)},
        "funnel": {
            "retrieval": {"epochs": 1},
            "early": {"training": LEARNING, "distill": distill},
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
def streams(log: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, StreamReport]]:
    """The streams of `SETTINGS` that nobody interrupted."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("whole")
    return {
        name: (place / name, stream(recipe(log.path, **settings), place / name, source="recipe"))
        for name, settings in SETTINGS.items()
    }


@pytest.fixture(scope="module")
def whole(streams: dict[str, tuple[Path, StreamReport]]) -> tuple[Path, StreamReport]:
    return streams["bundles"]


def funnel_of(path: Path) -> Funnel:
    funnel = load_bundle(path)
    assert isinstance(funnel, Funnel)
    return funnel


def state_of_all(funnel: Funnel) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in state_of(funnel.rankers).items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


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
        funnel = funnel_of(bundle)
        until = rows.filter(pl.col("__timestamp") < START + (day + 1) * DAY)
        last = until.sort("__timestamp", maintain_order=True).group_by("__item_id").last().sort("__item_id")
        items = funnel.items.frame.sort("__item_id")
        assert items["__item_id"].to_list() == last["__item_id"].to_list()
        assert items["__bid"].to_list() == last["__bid"].to_list()
        assert items[SEEN].to_list() == last["__timestamp"].to_list()
        newest = int(until["__timestamp"].max())  # type: ignore[arg-type]
        assert funnel.until == newest
        active = set(last.filter(pl.col("__timestamp") >= newest - DAY)["__item_id"].to_list())
        found = funnel.retriever.search(funnel.encode([Request()]), 1000)
        assert {funnel.items.ids[row] for row in funnel.items.places(found.item_keys_BK)[0].tolist()} == active
    assert bundle.name == Path(pointer.bundle).name


@pytest.mark.parametrize("name", SETTINGS)
def test_killed_it_goes_on_to_the_same(
    name: str,
    log: Dataset,
    streams: dict[str, tuple[Path, StreamReport]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place, _ = streams[name]
    at, ended = 30, False
    while not ended:
        with monkeypatch.context() as patched:
            KillAt(patched, at)
            try:
                stream(recipe(log.path, **SETTINGS[name]), tmp_path / "out", source="recipe")
                ended = True
            except Killed:
                at += 61
        if read_pointer(tmp_path / "out") is not None:
            pointer = read_pointer(tmp_path / "out")
            assert pointer is not None
            bundle, deltas = tmp_path / "out" / pointer.bundle, [tmp_path / "out" / name for name in pointer.deltas]
            assert with_deltas(funnel_of(bundle), deltas, position_of(bundle))[1].number == len(deltas)
    assert files(tmp_path / "out") == files(place)


def test_it_goes_on_from_a_bundle_of_a_stream_or_of_training(
    log: Dataset, whole: tuple[Path, StreamReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FunnelConfig.model_validate(recipe(log.path)["funnel"])
    save_bundle(train_funnel(log, config)[0], tmp_path / "trained")
    monkeypatch.setattr("fullrank.funnel.stream.fresh_ranker", None)  # no ranker is made to be thrown away
    for number, bundle in enumerate((min((whole[0] / "bundles").iterdir()), tmp_path / "trained")):
        report = stream(recipe(log.path), tmp_path / f"{number}", start=bundle)
        first = report.windows[0]
        assert first["served"] == "0-start" and first["metrics"]["click"]["rows"] == first["rows"]


def test_a_bundle_and_its_deltas_are_the_funnel_saved_in_full(
    streams: dict[str, tuple[Path, StreamReport]], tmp_path: Path
) -> None:
    """Between the last delta and the next bundle nothing is learnt: its weights, with the catalogue and the index of
    the bundle before, are the funnel of that moment."""
    place, report = streams["deltas"]
    assert [window["deltas"] for window in report.windows] == [0, 2, 2, 2]
    names = sorted(path.name for path in (place / "bundles").iterdir())
    requests = [Request(user) for user in (None, *range(10))]
    for before, after in itertools.pairwise(names):
        base, position = funnel_of(place / "bundles" / before), position_of(place / "bundles" / before)
        began, answers = state_of_all(base), base.recommend(requests, 5)
        deltas = sorted((place / "deltas" / before).iterdir())
        served, position = with_deltas(base, deltas[:1], position)
        served, _ = with_deltas(served, deltas[1:], position)
        assert isinstance(served, Funnel)
        newer = funnel_of(place / "bundles" / after)
        save_bundle(base.with_parts(early=newer.early, final=newer.final), tmp_path / after)
        full = funnel_of(tmp_path / after)
        assert same(state_of_all(served), state_of_all(full))
        for name, (_, seen) in full.prepared.items():
            assert torch.equal(served.prepared[name][1].whole(), seen.whole())
        assert served.recommend(requests, 5) == full.recommend(requests, 5) != answers
        # What it was made from is as it was.
        assert same(began, state_of_all(base)) and base.recommend(requests, 5) == answers


def test_an_early_stage_learns_what_the_final_one_of_its_time_says_of_candidates(log: Dataset, tmp_path: Path) -> None:
    """By hand: the final stage of each bundle is the teacher, over the catalogue and index of the bundle before; those
    of the first window are there at its end only."""
    settings = recipe(log.path, DISTILL, window=DAY, keep=10)
    stream(settings, tmp_path / "out")
    config = FunnelConfig.model_validate(settings["funnel"])
    (early,) = config.early
    assert early.distill is not None
    student = fresh_ranker(early.model, log.encoders, config.seed)
    fitted = Fitted(Distilled.around(student, early.distill, None), early.training, early.embedding)
    rows = pl.concat([log.scan(split).collect() for split in log.splits]).sort("__timestamp", maintain_order=True)
    bundles = sorted((tmp_path / "out" / "bundles").iterdir())
    for day, bundle in enumerate(bundles[:3]):
        mine = rows.filter((pl.col("__timestamp") - START) // DAY == day)
        seed = (START // DAY + day) % (1 << 31)
        now, place = funnel_of(bundle), funnel_of(bundles[max(0, day - 1)])
        teacher = place.with_parts(early={}, final=now.final, sizes=StageSizes(retrieve=config.sizes.retrieve))
        generator = torch.Generator().manual_seed(seed)
        count = math.ceil(mine.height / LEARNING["batch_size"]) * early.distill.lists_per_batch
        chosen = mine[torch.randperm(mine.height, generator=generator)[:count].sort().values.tolist()]
        lists = lists_for(teacher, batch_from_frame(chosen, log.schema), early.distill, generator)
        below = partial(with_lists, lists=lists, count=early.distill.lists_per_batch, seed=seed)
        fitted.learn(mine, seed, below)
        assert same(dict(student.state_dict()), dict(now.early["early"].state_dict()))


def test_items_that_come_within_a_window_are_served_by_its_deltas_from_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each hour's second half there are users and items that nobody knew when it began."""
    (tmp_path / "log").mkdir()
    for hour in range(4):
        for half in (0, 1):
            numbers = range(45 * half, 45 * half + 45)
            frame = pl.DataFrame(
                {
                    "user": [f"u{k % 7 + 7 * half * hour}" for k in numbers],
                    "item": [f"i{k % 8 + 8 * half * hour}" for k in numbers],
                    "click": [int(k * 7919 % 10 < 4) for k in numbers],
                    "time": [START + hour * 3600 + k * 40 for k in numbers],
                }
            )
            frame.write_csv(tmp_path / "log" / f"{hour}{half}.csv")
    kinds = {"user": "user", "item": "item"}
    features = [{"kind": "categorical", "name": name, "role": role} for name, role in kinds.items()]
    keys = {"user_id": "user", "item_id": "item", "timestamp": "time"}
    schema = {"features": features, "labels": [{"name": "click"}], "keys": keys}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    source = {"format": "csv", "path": str(tmp_path / "log"), "schema_file": str(tmp_path / "schema.json")}
    settings = recipe(tmp_path / "none", DISTILL, window=3600, delta=900, arrivals=True)
    settings["data"]["source"] = source
    report = stream(settings, tmp_path / "whole", source="recipe")
    assert [window["deltas"] for window in report.windows] == [0, 4, 4]
    pointer = report.pointer
    assert pointer is not None and pointer.bundle.endswith("-ids") and len(pointer.deltas) == 3  # of the fourth
    bundle = tmp_path / "whole" / pointer.bundle
    base = funnel_of(bundle)
    assert base.schema.tables()["item"] > funnel_of(min((bundle.parent).iterdir())).schema.tables()["item"]
    served, _ = with_deltas(base, [tmp_path / "whole" / name for name in pointer.deltas], position_of(bundle))
    assert isinstance(served, Funnel) and served.recommend([Request("u3")], 3)[0].items
    at, ended = 60, False
    while not ended:
        with monkeypatch.context() as patched:
            KillAt(patched, at)
            try:
                stream(settings, tmp_path / "out", source="recipe")
                ended = True
            except Killed:
                at += 137
    for part in ("bundles", "deltas", "checkpoints", "learner"):
        assert files(tmp_path / "out" / part) == files(tmp_path / "whole" / part)
    assert (tmp_path / "out" / "current.json").read_text() == (tmp_path / "whole" / "current.json").read_text()
