"""Facts about what the server knows of users, and what they may ask for."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from fastapi.testclient import TestClient

from fullrank.funnel import Funnel, Request
from fullrank.funnel.recent_events import Event
from fullrank.retrieval.filters import ItemFilter
from fullrank.serving import create_app


@pytest.fixture(scope="module")
def client(funnel: Funnel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with TestClient(create_app(funnel, store=tmp_path_factory.mktemp("store"))) as client:
        yield client


def recommended(client: TestClient, **body: Any) -> list[Any]:
    answer = client.post("/v1/recommend", json=body)
    assert answer.status_code == 200, answer.text
    return [item["item_id"] for item in answer.json()["items"]]


def fed(client: TestClient, *events: dict[str, Any]) -> list[dict[str, Any]]:
    answer = client.post("/v1/feedback", json={"events": list(events)})
    assert answer.status_code in (201, 207), answer.text
    results: list[dict[str, Any]] = answer.json()["events"]
    return results


def test_feedback_is_in_the_next_answer(client: TestClient, funnel: Funnel) -> None:
    body = {"user_id": "new one", "k": 5}
    before = client.post("/v1/recommend", json=body).json()
    assert [event["status"] for event in fed(client, {"user_id": "new one", "item_id": 7, "labels": {"click": 1}})] == [
        201
    ]
    after = client.post("/v1/recommend", json=body).json()
    assert [item["value"] for item in after["items"]] != [item["value"] for item in before["items"]]
    expected = funnel.recommend([Request("new one", events=[Event("7", int(time.time()), {"click": 1})])], 5)[0]
    assert [item["item_id"] for item in after["items"]] == [item.item_id for item in expected.items]


def test_a_session_counts_as_what_its_user_did(client: TestClient) -> None:
    with_session = client.post(
        "/v1/recommend", json={"session": [{"item_id": 7, "labels": {"click": 1}}], "k": 5}
    ).json()
    without = client.post("/v1/recommend", json={"k": 5}).json()
    assert [item["value"] for item in with_session["items"]] != [item["value"] for item in without["items"]]


def test_a_repeat_is_acknowledged_and_counted_once(client: TestClient) -> None:
    event = {"user_id": 41, "item_id": 3, "labels": {"click": 1}, "event_id": "e-41"}
    assert [status["status"] for status in fed(client, event, event)] == [201, 200]
    assert [status["status"] for status in fed(client, event)] == [200]


@pytest.mark.parametrize(
    ("wrong", "detail"),
    [
        ({"labels": {"klick": 1}}, 'labels: there is no label "klick"; there is click, conversion, hide'),
        ({"labels": {"click": 2}}, "labels.click is 2, expected 0 to 1"),
        ({"timestamp": int(time.time()) + 10_000}, "in the future, expected at most 300"),
        ({"user_id": "a\u0000"}, "user_id: expected at most 1000 characters, none of them NUL"),
    ],
)
def test_a_wrong_event_is_refused_and_the_good_ones_are_kept(
    client: TestClient, wrong: dict[str, Any], detail: str
) -> None:
    good = {"user_id": "g", "item_id": 3, "labels": {"click": 1}}
    answer = client.post("/v1/feedback", json={"events": [good, good | wrong, good]})
    assert answer.status_code == 207
    first, second, third = answer.json()["events"]
    assert (first["status"], second["status"], third["status"]) == (201, 422, 201)
    assert detail in second["detail"] and first["detail"] is None


def test_a_user_is_forgotten(client: TestClient) -> None:
    fed(client, *({"user_id": "gone", "item_id": item, "labels": {"click": 1}} for item in range(5)))
    clicked, answer = recommended(client, user_id="gone"), client.delete("/v1/users/gone")
    assert (
        answer.status_code == 200
        and answer.json()["events"] == 5
        and any("--forgotten" in text for text in answer.json()["pending"])
    )
    assert recommended(client, user_id="gone") == recommended(client, user_id="never came") != clicked or clicked
    assert client.delete("/v1/users/gone").json()["events"] == 0


def test_without_a_store_nothing_is_kept(funnel: Funnel) -> None:
    with TestClient(create_app(funnel)) as client:
        answer = client.post("/v1/feedback", json={"events": [{"user_id": 1, "item_id": 2}]})
        assert answer.status_code == 404 and "--store" in answer.json()["detail"]
        assert client.delete("/v1/users/1").status_code == 404


def test_excluded_items_are_replaced_by_the_next(client: TestClient, funnel: Funnel) -> None:
    first = recommended(client, user_id=3, k=10)
    # More are left out than the final stage gets: others move up through all stages.
    out = recommended(client, user_id=3, k=30)
    rest = recommended(client, user_id=3, k=10, exclude_ids=[*out, "no such item"])
    assert len(rest) == 10 and not set(rest) & set(out)
    # The early stage may hand another one on for it.
    assert set(first[1:]) <= set(recommended(client, user_id=3, k=10, exclude_ids=first[:1]))
    everything = [item for item in funnel.items.ids if item not in first[:3]]
    assert set(recommended(client, user_id=3, k=10, exclude_ids=everything)) == set(first[:3])


def test_seen_items_are_left_out(client: TestClient) -> None:
    now = int(time.time())
    seen = recommended(client, user_id=5, k=6)
    for place, item in enumerate(seen):
        labels = {"click": 1} if place < 2 else {"hide": 1} if place < 4 else {}
        fed(client, {"user_id": 5, "item_id": item, "labels": labels, "timestamp": now - 1000 * place})
    body = {"user_id": 5, "k": 20}

    def left(**how: Any) -> set[Any]:
        return set(seen) - set(recommended(client, **body, exclude_seen=how))

    assert left() == set(seen)
    assert left(types=["click"]) == set(seen[:2]) and left(types=["click", "hide"]) == set(seen[:4])
    assert left(types=["impression"], seconds=2500) == set(seen[:3])
    assert left(max=1) == set(seen[:1])


@pytest.mark.parametrize("share", ["one category", "one item", "none"])
def test_a_filter_never_makes_a_list_shorter_than_there_are_items(
    client: TestClient, funnel: Funnel, share: str
) -> None:
    column = funnel.encoders.vocabularies["category"].values.gather(funnel.items.frame["category"].cast(pl.Int64) - 2)
    wanted = {
        "one category": {"any": {"category": [column[0]]}},
        "one item": {"any": {"item_id": [funnel.items.ids[3]]}},
        "none": {"any": {"category": ["of no item"]}},
    }[share]
    allowed = funnel.attributes.chosen(ItemFilter.of(wanted))
    found = recommended(client, user_id=3, k=10, filter=wanted)
    active = set(funnel.items.active_I.tolist())
    may = {funnel.items.ids[row] for row in range(len(funnel.items)) if allowed[row] and row in active}
    assert set(found) <= may and len(found) == min(10, len(may))
    assert (share == "none") == (not may)


def test_ranges_are_of_the_numbers_of_the_log(client: TestClient, funnel: Funnel) -> None:
    bids = dict(zip(funnel.items.ids, funnel.items.frame["__bid"].to_list(), strict=True))
    middle = sorted(bids.values())[len(bids) // 2]
    found = recommended(client, user_id=3, k=10, filter={"range": {"bid": [middle, None]}})
    assert found and all(bids[item] >= middle for item in found)
    price = dict(zip(funnel.items.ids, funnel.items.frame["price"].to_list(), strict=True))
    found = recommended(client, user_id=3, k=10, filter={"range": {"price": [None, 1.0]}})
    assert found and all(price[item] <= math.log1p(1.0) + 1e-6 for item in found)


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (
            {"filter": {"any": {"colour": ["red"]}}},
            'filter: there is no column "colour" to filter items by; there are item_id',
        ),
        ({"filter": {"any": {"price": [1]}}}, 'filter: "price" is a number: give a range of it'),
        ({"filter": {"any": {"category": "x"}}}, "filter.any.category: expected a list"),
        ({"exclude_seen": {"seconds": 0}}, "exclude_seen.seconds: must be greater than 0, got 0"),
        ({"exclude_seen": {"types": []}}, "exclude_seen.types: "),
        ({"session": [{"item_id": 3, "seconds_ago": 0}]}, "session.0.seconds_ago: must be greater than or equal to 1"),
    ],
)
def test_wrong_wishes_are_one_line(client: TestClient, body: dict[str, Any], detail: str) -> None:
    answer = client.post("/v1/recommend", json=body)
    assert answer.status_code == 422 and answer.json()["detail"].startswith(detail), answer.text


def test_an_answer_explains_itself(client: TestClient, funnel: Funnel) -> None:
    answer = client.post("/v1/recommend", json={"user_id": 3, "k": 4, "explain": True}).json()
    explained = {item["item_id"]: item for item in answer["explained"]}
    assert len(explained) == 50
    kept = sorted(
        (item for item in explained.values() if item["fell_out"] is None), key=lambda item: item["ranks"]["final"]
    )
    assert [item["item_id"] for item in kept] == [item["item_id"] for item in answer["items"]]
    for item in answer["items"]:
        told = explained[item["item_id"]]
        assert told["values"]["final"] == pytest.approx(item["value"], rel=1e-5)
        assert told["predictions"]["final"]["click"] == pytest.approx(item["predictions"]["click"], rel=1e-5)
    early = [item for item in explained.values() if item["fell_out"] == "early"]
    assert len(early) == 30 and all("final" not in item["ranks"] and item["ranks"]["early"] > 20 for item in early)
    assert "early ranked it" in early[0]["reason"] and early[0]["reason"].endswith("of 50, and 20 go on")
    assert answer["model_version"] == "unsaved" and answer["timings"].keys() >= {
        "encode",
        "retrieval",
        "early",
        "final",
    }


def test_events_survive_the_server(funnel: Funnel, tmp_path: Path) -> None:
    event = {"user_id": "back", "item_id": 7, "labels": {"click": 1}}
    with TestClient(create_app(funnel, store=tmp_path)) as client:
        fresh = client.post("/v1/recommend", json={"user_id": "back"}).json()["items"]
        fed(client, event)
    with TestClient(create_app(funnel, store=tmp_path)) as client:
        assert client.post("/v1/recommend", json={"user_id": "back"}).json()["items"] != fresh
