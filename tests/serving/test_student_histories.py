"""Facts about students behind a server: it reads of a user what training did."""

from __future__ import annotations

import logging
import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from fullrank.cli import main as command
from fullrank.data.dataset import Dataset
from fullrank.data.loader import batch_from_frame
from fullrank.data.planted import planted_dataset
from fullrank.funnel import Funnel, FunnelConfig, load_bundle, save_bundle, train_funnel
from fullrank.funnel.decoded import Decoder
from fullrank.funnel.scorer import Scorer
from fullrank.serving import create_app
from fullrank.serving.embedding_store import EmbeddingStore
from fullrank.training.recipe import parse_recipe
from fullrank.training.stream import Window
from fullrank.transfer import EmbeddingLog, run
from fullrank.transfer.config import read_transfer
from fullrank.transfer.histories import AGE, CODES
from fullrank.transfer.keys import key_of
from fullrank.transfer.lookup import SECOND

DAY = 86_400
RANKER = {"name": "dcn_v2", "hidden": [8, 8], "num_cross_layers": 1, "embedding_dim": 4}
SECTION = {
    "private": [f"elsewhere_{k}" for k in range(4)],
    "teacher": {"model": RANKER, "warm_up": 2, "refresh": None, "delay": 3600},
    "embeddings": {"layers": ["parallel.layers.1"], "dim": 6, "prefix_dims": [3], "days": 2},
    "student": {"model": RANKER},
    "students": {"loopfm": {"without": ["history"], "history": {"pooling": "sum", "length": 5, "prefix": 3}}},
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    place = tmp_path_factory.mktemp("log") / "data"
    return planted_dataset(place, "cross-domain", 1500, seed=7, users=30, ads=20, days=5)


@pytest.fixture(scope="module")
def transfer(log: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("transfer") / "out"
    recipe = parse_recipe({"data": {"dataset": str(log.path)}, "transfer": SECTION, "threads": 1})
    config = read_transfer(recipe, "recipe")
    run.score(recipe, config, out, "recipe")
    run.train(recipe, config, out, "recipe")
    assert (
        CliRunner().invoke(command.app, ["transfer", "store", str(out / "embeddings"), str(out / "store")]).exit_code
        == 0
    )
    return out, config


@pytest.fixture(scope="module")
def served(transfer: tuple[Path, Any]) -> Scorer:
    scorer = load_bundle(transfer[0] / "served" / "loopfm")
    assert isinstance(scorer, Scorer)
    return scorer


@pytest.fixture(scope="module")
def funnel(log: Dataset, transfer: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A funnel of the same dataset with the student as its final stage."""
    place, small = tmp_path_factory.mktemp("funnel"), {"model": {"name": "dcn_v2", "hidden": [4]}}
    config = FunnelConfig(retrieval={"name": "popularity"}, early=small, final=small)
    save_bundle(train_funnel(log, config)[0], place / "before")
    student = transfer[0] / "served" / "loopfm"
    arguments = ["funnel", "replace", str(place / "before"), "final", str(student), str(place / "bundle")]
    assert CliRunner().invoke(command.app, arguments).exit_code == 0
    return place / "bundle"


def test_rows_of_the_log_are_scored_as_in_training_bit_for_bit(
    log: Dataset, transfer: tuple[Path, Any], served: Scorer
) -> None:
    out, config = transfer
    hook = run.TransferColumns(config, "loopfm", log, out)
    frame = pl.concat([log.scan(split).collect() for split in log.splits]).sort("__timestamp").tail(200)
    frame = hook.rows(Window(hook.begin, hook.begin + 99 * DAY), frame)
    batch = batch_from_frame(frame, log.schema, extra=(CODES, AGE))
    assert bool((~batch.extra[AGE].isnan()).any(1).float().mean() > 0.5), "most have a history"
    rows = Decoder(log.encoders, {"user", "item", "context"})(batch)
    for row, (event, user, then) in zip(
        rows, frame.select("__request_id", "__user_id", "__timestamp").iter_rows(), strict=True
    ):
        row |= {"request_id": event, "user_id": user, "timestamp": then}
        row |= {name: None for name in row if name.startswith(("history", "elsewhere"))}
    with TestClient(create_app(out / "served" / "loopfm", embeddings=out / "store")) as client:
        said = client.post("/v1/score", json={"rows": rows}).json()
        unknown = client.post("/v1/score", json={"rows": [{"item_id": 1}]}).json()
        late = client.post("/v1/score", json={"rows": [{"timestamp": "noon"}]})
    with torch.inference_mode():
        expected = served.model(batch).logits_BT.sigmoid()[:, 0].tolist()
        without = served.model(batch_from_frame(frame, log.schema)).logits_BT.sigmoid()[:, 0].tolist()
    assert [item["predictions"]["click"] for item in said["items"]] == expected
    assert sum(a != b for a, b in zip(expected, without, strict=True)) > 100 and said["degraded"] == []
    assert 0 < unknown["items"][0]["predictions"]["click"] < 1
    assert late.status_code == 422
    assert late.json()["detail"] == "row 1: column \"timestamp\" is 'noon', expected a time as the log has it"


def test_a_list_is_made_with_what_the_store_has_now(transfer: tuple[Path, Any], funnel: Path, tmp_path: Path) -> None:
    out, _ = transfer
    codes, content = EmbeddingLog(out / "embeddings"), load_bundle(funnel)
    assert isinstance(content, Funnel)
    version = next(iter(codes.versions))
    store = EmbeddingStore.of(tmp_path / "store", codes, version)
    asked = {"user_id": 3, "k": 5}
    with TestClient(create_app(funnel, embeddings=tmp_path / "store", store=tmp_path / "events")) as client:

        def answer() -> dict[int, float]:
            said = client.post("/v1/recommend", json={**asked, "explain": True}).json()
            assert said["degraded"] == []
            lists = {item["item_id"]: item["predictions"]["click"] for item in said["items"]}
            explained = {item["item_id"]: item["predictions"]["final"]["click"] for item in said["explained"]}
            named = client.post("/v1/score", json={"user_id": 3, "item_ids": list(lists)}).json()
            for item in named["items"]:
                assert lists[item["item_id"]] == pytest.approx(item["predictions"]["click"], abs=1e-6)
                assert lists[item["item_id"]] == pytest.approx(explained[item["item_id"]], abs=1e-6)
            return lists

        before = answer()  # the log's events are older than the two days of a history
        now, rng = int(time.time()) * SECOND, np.random.default_rng(0)
        codes_3 = rng.integers(0, 256, (3, 3), dtype=np.uint8)
        store.append([3] * 3, [-1, -2, -3], [now - DAY * SECOND] * 3, codes_3, [now - SECOND] * 3, version)
        after = answer()
        assert all(abs(before[item] - after[item]) > 1e-6 for item in before.keys() & after.keys())
        with torch.inference_mode():
            from fullrank.funnel.requests import Request
            from fullrank.serving.student_histories import StudentHistories

            requests, _ = StudentHistories(store).known(content, [Request(3), Request(4)])
            both = content.recommend(requests, 5)
        found = {item.item_id: item.predictions["click"] for item in both[0].items}
        assert found == pytest.approx(after, abs=1e-5), "an age of a day and some seconds does not matter to a sum"
        # Who is forgotten stays so, whatever is copied from the log again.
        deleted = client.delete("/v1/users/3").json()
        assert deleted["embeddings"] > 3 and answer() == pytest.approx(before, abs=1e-6)
        size = len(store)
        assert len(EmbeddingStore.of(tmp_path / "store", codes, version)) == size
        with sqlite3.connect(store.path) as connection:
            connection.execute("DROP TABLE codes")
        said = client.post("/v1/recommend", json=asked).json()
        assert said["degraded"] == ["embeddings"] and len(said["items"]) == 5


def test_what_a_student_cannot_read_is_refused(
    transfer: tuple[Path, Any], funnel: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, _ = transfer
    bundle = out / "served" / "loopfm"
    with pytest.raises(ValueError, match="is no store of embeddings: make one by `fullrank transfer store`"):
        create_app(bundle, embeddings=tmp_path / "none")
    EmbeddingStore(tmp_path / "wide", 8)
    with pytest.raises(ValueError, match="has codes of dim 8 in 4 bits, and the bundle's student reads dim 6 in 4"):
        create_app(bundle, embeddings=tmp_path / "wide")
    EmbeddingStore(tmp_path / "empty", 6)
    with pytest.raises(ValueError, match=r"has no embeddings of version \S+, which .* reads; it has none"):
        create_app(funnel, embeddings=tmp_path / "empty")
    with caplog.at_level(logging.WARNING):
        create_app(bundle)
    assert "start with --embeddings" in caplog.text


def test_a_stage_is_replaced_by_a_ranker_of_the_same_dataset_only(funnel: Path, tmp_path: Path) -> None:
    before, student = funnel.parent / "before", load_bundle(funnel)
    assert isinstance(student, Funnel) and student.final.name == "student"
    planted_dataset(tmp_path / "data", "cross-domain", 200, seed=1, users=10, ads=20, days=5)
    other, config = Dataset.open(tmp_path / "data"), {"name": "dcn_v2", "hidden": [4]}
    from fullrank.models import RankerSpec

    save_bundle(Scorer(other.encoders, RankerSpec.of(config).build(other.schema)), tmp_path / "ranker")
    for arguments, words in (
        ([before, "final", tmp_path / "ranker"], "reads other columns or ids than"),
        ([before, "last", tmp_path / "ranker"], 'has no ranker "last"; it has early, final'),
        ([before, "final", before], "is the bundle of a funnel, expected that of a single ranker"),
        ([tmp_path / "ranker", "final", before], "it has no stages"),
    ):
        found = CliRunner().invoke(command.app, ["funnel", "replace", *map(str, arguments), str(tmp_path / "out")])
        assert words in str(found.exception or found.output) and not (tmp_path / "out").exists()


def test_ids_are_filed_as_the_log_has_them() -> None:
    assert [key_of(value, "number") for value in (7, "7", 7.0, "-3", "x", "", 10**30)] == [
        7,
        7,
        7,
        -3,
        None,
        None,
        None,
    ]
    assert key_of("7", "text") == key_of(7, "text") != key_of("8", "text")
