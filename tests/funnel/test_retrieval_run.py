"""A recipe that trains a retriever alone, its bundle, and the command that asks it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fullrank.cli.main import app
from fullrank.funnel.bundle import load_bundle, load_searcher
from fullrank.funnel.report import run_page
from fullrank.funnel.requests import Request
from fullrank.retrieval import Popularity
from fullrank.retrieval.all_ranking import evaluate_all_ranking, training_items
from fullrank.training.run import Report, run

USERS, ITEMS = 40, 30


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users take items of their own parity; item i30 is in the test part alone."""
    place = tmp_path_factory.mktemp("interactions")
    generator = torch.Generator().manual_seed(0)
    train, test = [], ["u1 i30"]
    for user in range(USERS):
        own = torch.arange(user % 2, ITEMS, 2)[torch.randperm(ITEMS // 2, generator=generator)]
        train.append(" ".join([f"u{user}", *(f"i{item}" for item in own[:9].tolist())]))
        test.append(" ".join([f"u{user}", *(f"i{item}" for item in own[9:12].tolist())]))
    (place / "train.txt").write_text("\n".join(train))
    (place / "test.txt").write_text("\n".join(test))
    return place


def recipe(log: Path, **retrieval: Any) -> dict[str, Any]:
    source = {"format": "interactions", "path": str(log)}
    return {"data": {"dataset": str(log / "dataset"), "source": source}, "retrieval": retrieval}


@pytest.fixture(scope="module")
def report(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    wanted = recipe(log, name="lightgcn", dim=8, batch_size=8, epochs=20, learning_rate=0.05)
    return run(wanted, tmp_path_factory.mktemp("runs") / "run", page=run_page)


def test_a_run_measures_the_retriever_and_popularity(report: Report) -> None:
    assert report.directory is not None
    metrics = json.loads((report.directory / "metrics.json").read_text())
    popularity = Popularity(report.dataset.schema).fit(report.dataset)
    popularity.index(training_items(report.dataset))
    expected = evaluate_all_ranking(popularity, report.dataset, ks=(20,))
    assert metrics["test"]["popularity"]["ndcg_at_20"] == pytest.approx(expected["ndcg_at_20"])
    assert metrics["test"]["retriever"]["ndcg_at_20"] > metrics["test"]["popularity"]["ndcg_at_20"] + 0.1
    assert metrics["retriever"] == "lightgcn" and metrics["items"] == ITEMS + 1
    page = (report.directory / "report.html").read_text()
    assert f"{metrics['test']['retriever']['recall_at_20']:.4f}" in page and "40 users" in page


def test_the_bundle_searches_as_the_run_did(report: Report) -> None:
    assert report.bundle is not None
    asked = [Request(user_id="u7"), Request(user_id="nobody"), Request()]
    lists = load_searcher(report.bundle).search(asked, 5)
    assert lists == report.content.search(asked, 5)
    assert all(int(str(item)[1:]) % 2 == 1 for item, _ in lists[0])
    assert lists[1] == lists[2] != lists[0]
    assert len(load_searcher(report.bundle).search(asked, 100)[0]) == ITEMS + 1


def test_the_bundle_of_a_retriever_is_no_funnel(report: Report, tmp_path: Path) -> None:
    assert report.bundle is not None
    with pytest.raises(ValueError, match="bundle of a retriever alone"):
        load_bundle(report.bundle)
    damaged = shutil.copytree(report.bundle, tmp_path / "damaged")
    (damaged / "retrieval" / "retriever.safetensors").write_bytes(b"0")
    with pytest.raises(ValueError, match="does not match its hash"):
        load_searcher(damaged)


def test_a_retriever_that_does_not_beat_popularity_is_noted(log: Path) -> None:
    report = run(recipe(log, name="popularity"))
    assert report.bundle is None
    assert len(report.notes) == 1 and "recall@20 is 0." in report.notes[0]


def test_only_a_ranker_goes_on_from_a_bundle(log: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave out --from"):
        run(recipe(log, name="popularity"), start=tmp_path)
    with pytest.raises(ValueError, match='retrieval.dims: .*did you mean "dim"'):
        run(recipe(log, name="simplex", dims=3))
    with pytest.raises(ValueError, match="training and embedding belong to model; a retriever has its own"):
        run({**recipe(log, name="popularity"), "training": {"epochs": 1}})


def test_retrieve_prints_the_lists(report: Report, tmp_path: Path) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"user_id": "u4"}\n\n{"features": {"user_id": "u4"}}\n')
    told = CliRunner().invoke(
        app, ["retrieve", str(report.directory), "--user", "u7", "--requests", str(requests), "-k", "3", "--json"]
    )
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    assert [line["user"] for line in lines] == ["u7", "u4", None]
    assert [len(line["items"]) for line in lines] == [3, 3, 3]
    assert lines[1]["items"] == lines[2]["items"] != lines[0]["items"]
    table = CliRunner().invoke(app, ["retrieve", str(report.bundle), "--user", "stranger"]).stdout
    assert "user stranger (not in the log)" in table


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("[1]", 'line 1: expected {"user_id": ..., "features": {...}}, got [1]'),
        ('{"user": 1}', "line 1: expected"),
        ('{"user_id": true}', "expected an id and a mapping"),
        ('{"features": {"item_id": 3}}', '"item_id" is a feature of items'),
    ],
)
def test_bad_requests_are_told(report: Report, tmp_path: Path, line: str, text: str) -> None:
    (tmp_path / "requests.jsonl").write_text(line + "\n")
    told = CliRunner().invoke(app, ["retrieve", str(report.directory), "--requests", str(tmp_path / "requests.jsonl")])
    assert isinstance(told.exception, ValueError) and text in str(told.exception)


def test_nobody_asked(report: Report) -> None:
    told = CliRunner().invoke(app, ["retrieve", str(report.directory)])
    assert "nobody to find items for" in str(told.exception)
