"""Facts about the page at `/`, as the server writes it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

from fullrank.funnel import Funnel, Request, Scorer, save_bundle
from fullrank.serving import ServingConfig, create_app
from fullrank.serving.instruments import Instruments
from fullrank.serving.page_card import model_card
from fullrank.serving.pool import Overloaded, Pool


@pytest.fixture(scope="module")
def client(funnel: Funnel) -> Iterator[TestClient]:
    with TestClient(create_app(funnel)) as client:
        yield client


def words(html: str) -> str:
    """Its text, cells apart."""
    return unescape(re.sub(r"\s+", " ", re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", html, flags=re.DOTALL)))


def listed(html: str) -> list[str]:
    """Items of the list, in its order."""
    return re.findall(r"<td class=place>\d+\. <code>(.*?)</code>", html)


def test_without_a_question_there_is_a_form_and_the_model(client: TestClient, funnel: Funnel) -> None:
    answer = client.get("/")
    assert answer.status_code == 200 and "<section id=answer></section>" in answer.text
    assert "bid * click" in answer.text and f"{funnel.final.num_parameters().total:,}" in answer.text
    assert not re.search(r"https?://|src=|@import|url\(", answer.text)


def test_a_plain_form_gets_the_list_that_a_client_gets(client: TestClient) -> None:
    html = client.get("/?user=3&k=7").text
    said = client.post("/v1/recommend", json={"user_id": 3, "k": 7, "explain": True}).json()
    assert listed(html) == [str(item["item_id"]) for item in said["items"]]
    best = said["items"][0]
    assert f"<td>{best['value']:.4f}<td>{best['predictions']['click']:.4f}" in html
    dropped = next(item for item in said["explained"] if item["fell_out"] == "early")
    assert dropped["reason"] in words(html) and "50 → 20" in html and "20 → 7" in html
    assert html.count("<polyline class='path kept'") == 7


def test_a_described_user_is_asked_for_as_described(client: TestClient, funnel: Funnel) -> None:
    features, context = {"gender": 1}, {"device": 2}
    html = client.get("/", params={"k": "5", "features": json.dumps(features), "context": json.dumps(context)}).text
    expected = funnel.recommend([Request(None, {**features, **context})], 5)[0]
    assert listed(html) == [str(item.item_id) for item in expected.items] and "<details open>" in html
    session = json.dumps([{"item_id": 7, "labels": {"click": 1}}])
    assert client.get("/", params={"session": session}).status_code == 200


def test_a_stranger_is_served_and_told_apart(client: TestClient) -> None:
    stranger, known = (client.get(f"/?user={user}&k=3").text for user in ("nobody", 3))
    assert "does not know this user" in stranger and "does not know this user" not in known
    assert len(listed(stranger)) == len(listed(known)) == 3


def test_nothing_to_recommend_is_said(client: TestClient) -> None:
    html = client.get("/", params={"filter": '{"any": {"category": ["there is none such"]}}'}).text
    assert "Nothing to recommend" in html and not listed(html)


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("k=0", "k: must be greater than or equal to 1"),
        ("k=many", "items is 'many', expected a number"),
        ("k=1001", "items is '1001', expected a number of at most 1000"),
        ("user=1&features={", "features: is not JSON"),
        ("features=[1]", "features: expected an object"),
        ("session=" + "[" * 5000, "session: "),
        (f"context={quote(json.dumps({'devise': 1}))}", 'unknown feature "devise"'),
    ],
)
def test_a_wrong_field_is_named_and_the_form_stays_filled_in(client: TestClient, query: str, detail: str) -> None:
    answer = client.get(f"/?{query}")
    assert answer.status_code == 422 and "role=alert" in answer.text
    assert detail in words(answer.text) and "Traceback" not in answer.text
    assert "What is served" in answer.text


def test_what_is_asked_is_never_markup(client: TestClient) -> None:
    evil = "'\"><script>alert(1)</script>"
    for name in ("user", "k", "features", "session"):
        html = client.get("/", params={name: evil}).text
        assert "<script>alert" not in html and "'\"><" not in html
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_the_page_waits_in_the_same_queue(funnel: Funnel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TestClient(create_app(funnel)).get("/?user=3").status_code == 503  # it was never started
    with TestClient(create_app(funnel, ServingConfig(rows=50))) as client:

        def full(*_: Any) -> Any:
            raise Overloaded(7)

        monkeypatch.setattr(Pool, "admitted", full)
        refused = client.get("/?user=3")
        assert refused.status_code == 429 and refused.headers["retry-after"] == "7"
        assert "Try again in 7 s" in words(refused.text) and client.get("/").status_code == 200


def test_a_fault_of_ours_is_a_500_without_its_detail(funnel: Funnel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret detail")

    with TestClient(create_app(funnel), raise_server_exceptions=False) as client:
        monkeypatch.setattr(funnel, "recommend", fail)
        answer = client.get("/?user=3")
        assert answer.status_code == 500 and "secret" not in answer.text


def test_a_single_ranker_scores_rows(funnel: Funnel) -> None:
    scorer = Scorer(funnel.encoders, funnel.final)
    with TestClient(create_app(scorer)) as client:
        assert client.get("/").text.count("<textarea name=rows") == 1
        html = client.get("/", params={"rows": '[{"device": 1}, {}]'}).text
        rows = scorer.score([{"device": 1}, {}])
        assert all(f"{row.predictions['click']:.4f}" in html for row in rows)
        assert client.get("/?rows=nonsense").status_code == 422


def test_the_card_tells_what_the_bundle_holds(funnel: Funnel, tmp_path: Path) -> None:
    curve = {"predicted": [0.1, 0.4], "observed": [0.12, 0.38], "rows": [100.0, 100.0]}
    stages = {"final": {"click": {"ne": 0.8125, "auc": None, "intervals": {"ne": [0.1, 0.2]}}}}
    about = {"metrics": {"<test>": {"stages": stages, "calibration_curve": curve}}}
    save_bundle(funnel, tmp_path / "bundle", about=about)
    with TestClient(create_app(tmp_path / "bundle")) as client:
        html = client.get("/").text
    assert "&lt;test&gt; final click" in html and "0.8125" in html and html.count("<figure") == 1
    assert "holds no metrics" in model_card(funnel, "1", {"note": "by hand"})


@pytest.mark.parametrize(
    "curve",
    [3, {}, {"predicted": [0.1], "observed": [], "rows": [1]}, {"predicted": "x", "observed": "x", "rows": "x"}],
)
def test_a_curve_that_is_none_is_left_out(funnel: Funnel, curve: Any) -> None:
    assert "<figure" not in model_card(funnel, "1", {"calibration_curve": curve})


def test_quantiles_lie_between_the_bounds_of_their_bucket() -> None:
    instruments = Instruments()
    for _ in range(98):
        instruments.observe_stage("final", 0.003)
    for _ in range(2):
        instruments.observe_stage("final", 0.1)
    count, (half, most) = instruments.quantiles("fullrank_stage_seconds", (0.5, 0.99))["final"]
    assert count == 100 and math.isclose(half, 0.002 + 0.002 * 50 / 98)
    assert math.isclose(most, 0.064 + 0.064 * 0.5)


def test_live_numbers_count_what_was_asked(client: TestClient) -> None:
    def requests() -> int:
        return int(re.findall(r"<b>([\d,]+)</b><span>requests", client.get("/live").text)[0].replace(",", ""))

    before = requests()
    client.post("/v1/recommend", json={"k": 1})
    assert requests() == before + 2  # the one that asked before, too
    assert "/v1/recommend" in client.get("/live").text and "retrieval" in client.get("/live").text
