"""Facts about serving a single ranker, over HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from fastapi.testclient import TestClient

from fullrank.data.importing import import_dataset
from fullrank.data.splits import SplitSpec
from fullrank.funnel import Scorer, save_bundle
from fullrank.models import MODELS
from fullrank.schema import Categorical, Label, Numeric, Schema
from fullrank.serving import create_app
from fullrank.serving.page import blank_row

ROWS = [{"C1": "a", "I1": 3}, {"C1": "never seen"}, {"I1": None, "label": 1}, {"C1": "b", "I1": "2.5"}]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    place, rng = tmp_path_factory.mktemp("log"), np.random.default_rng(0)
    columns = {"label": rng.integers(0, 2, 200), "C1": rng.choice(["a", "b", "c"], 200), "I1": rng.random(200)}
    pl.DataFrame(columns).write_csv(place / "log.csv")
    schema = Schema(features=(Categorical(name="C1"), Numeric(name="I1")), labels=(Label(name="label"),))
    split = SplitSpec(kind="none")
    dataset = import_dataset("csv", place / "log.csv", place / "data", schema=schema, split=split)
    torch.manual_seed(0)
    return Scorer(dataset.encoders, MODELS["deepfm"].from_config(dataset.schema, {"hidden": [8]}))


@pytest.fixture(scope="module")
def client(scorer: Scorer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    path: Path = tmp_path_factory.mktemp("bundles") / "model"
    save_bundle(scorer, path)
    with TestClient(create_app(path)) as client:
        yield client


def test_rows_get_the_scorers_predictions_in_their_order(client: TestClient, scorer: Scorer) -> None:
    answer = client.post("/v1/score", json={"rows": ROWS})
    assert answer.status_code == 200
    expected = [{"item_id": None, "value": row.value, "predictions": row.predictions} for row in scorer.score(ROWS)]
    said = answer.json()
    assert said.pop("model_version") and said == {"items": expected, "degraded": [], "arm": None}
    assert len({row["value"] for row in expected}) == len(ROWS)


def test_without_a_catalogue_there_is_nothing_to_recommend(client: TestClient) -> None:
    answer = client.post("/v1/recommend", json={"k": 3})
    assert answer.status_code == 404
    assert answer.json()["detail"] == "this bundle has no catalogue of items to recommend; POST /v1/score scores rows"
    answer = client.post("/v1/score", json={"item_ids": [1]})
    assert answer.status_code == 422
    assert answer.json()["detail"] == "item_ids: this bundle has no catalogue of items; give rows"


def test_wrong_rows_are_one_line(client: TestClient) -> None:
    answer = client.post("/v1/score", json={"rows": [{"C1": "a"}, {"I1": "cheap"}]})
    assert answer.status_code == 422
    assert answer.json()["detail"] == 'row 2: column "I1" is "cheap": not a number'


def test_a_body_of_another_type_is_told_what_to_be(client: TestClient) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}
    for headers, named in (({}, "not given"), (form, "application/x-www-form-urlencoded")):
        answer = client.post("/v1/score", content=json.dumps({"rows": ROWS}), headers=headers)
        assert answer.status_code == 415
        assert answer.json()["detail"] == f"the content type is {named}, expected application/json"


def test_it_is_ready_and_counts_its_stages(client: TestClient) -> None:
    assert client.get("/readyz").json() == {"status": "ready"}
    before, after = client.get("/metrics").text, ""
    client.post("/v1/score", json={"rows": ROWS})
    after = client.get("/metrics").text
    for stage in ("encode", "final"):
        line = rf'^fullrank_stage_seconds_count{{stage="{stage}"}} ([0-9.]+)$'
        counts = [re.search(line, text, re.MULTILINE) for text in (before, after)]
        assert float(counts[1][1]) == (float(counts[0][1]) if counts[0] else 0) + 1  # type: ignore[index]


def test_the_page_offers_a_row_that_can_be_scored(client: TestClient, scorer: Scorer) -> None:
    page = client.get("/").text
    assert not re.search(r"https?://|src=|@import|url\(", page)
    row = blank_row(scorer)
    assert row == {"C1": None, "I1": None}
    assert "&quot;C1&quot;: null" in page
    assert client.post("/v1/score", json={"rows": [row]}).status_code == 200
