"""Facts about the HTTP application."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pytest import approx

from fullrank.funnel import Funnel, Request, save_bundle
from fullrank.serving import ServingConfig, create_app


@pytest.fixture(scope="module")
def client(funnel: Funnel) -> Iterator[TestClient]:
    with TestClient(create_app(funnel)) as client:
        yield client


def metric(client: TestClient, line: str) -> float:
    found = re.search(rf"^{re.escape(line)} ([0-9.e+-]+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found.group(1)) if found else 0.0


def until(there: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def test_the_answer_is_the_funnels(client: TestClient, funnel: Funnel) -> None:
    body = {"user_id": 3, "features": {"gender": 1}, "context": {"device": 2}, "k": 7}
    answer = client.post("/v1/recommend", json=body)
    assert answer.status_code == 200
    expected = funnel.recommend([Request(3, {"gender": 1, "device": 2})], 7)[0]
    assert answer.json()["candidates"] == expected.candidates
    for found, item in zip(answer.json()["items"], expected.items, strict=True):
        assert found == {
            "item_id": item.item_id,
            "value": item.value,
            "predictions": item.predictions,
            "propensity": 1.0,
            "payment": None,
        }


def test_scores_come_in_the_order_of_the_request(client: TestClient, funnel: Funnel) -> None:
    answer = client.post("/v1/score", json={"user_id": 3, "item_ids": [9, "new", 4]})
    assert answer.status_code == 200
    expected = funnel.score(Request(3), [9, "new", 4])
    assert [item["item_id"] for item in answer.json()["items"]] == [9, "new", 4]
    assert [item["predictions"] for item in answer.json()["items"]] == [item.predictions for item in expected]


@pytest.mark.parametrize("body", [{}, {"user_id": None}, {"user_id": "never seen"}, {"user_id": -1}, {"k": 1}])
def test_strangers_are_served(client: TestClient, body: dict[str, Any]) -> None:
    answer = client.post("/v1/recommend", json=body)
    assert answer.status_code == 200
    assert len(answer.json()["items"]) == body.get("k", 10)


def test_k_beyond_the_catalogue_returns_all(client: TestClient, funnel: Funnel) -> None:
    items = client.post("/v1/recommend", json={"k": 2**31 - 1}).json()["items"]
    assert len({item["item_id"] for item in items}) == len(items) == len(funnel.items)


HISTORY = {"history.item": [1], "history.category": [1], "history.age": [3.0]}


@pytest.mark.parametrize(
    ("path", "body", "detail"),
    [
        ("recommend", {"k": 0}, "k: must be greater than or equal to 1, got 0"),
        ("recommend", {"k": -3}, "k: must be greater than or equal to 1, got -3"),
        ("recommend", {"k": "3"}, "k: expected an integer, got '3'"),
        ("recommend", {"k": 2.5}, "k: expected an integer, got 2.5"),
        ("recommend", {"k": True}, "k: expected an integer, got True"),
        ("recommend", {"k": None}, "k: expected an integer, got None"),
        ("recommend", {"user_id": [3]}, "user_id: expected an integer or text"),
        ("recommend", {"user_id": 3.5}, "user_id: expected an integer or text"),
        ("recommend", {"features": [1]}, "features: expected an object"),
        ("recommend", {"features": {"gender": {"a": 1}}}, "features.gender: expected"),
        ("recommend", {"kk": 1}, "kk: unknown key"),
        ("recommend", {"context": {"devise": 1}}, 'unknown feature "devise"; expected one of'),
        ("recommend", {"context": {"price": 1}}, '"price" is a feature of items'),
        ("recommend", {"features": {"history.item": [1]}}, '"history.item" is given without'),
        ("recommend", {"features": {**HISTORY, "history.age": ["x"]}}, "history.age"),
        ("recommend", [], "body: expected an object"),
        ("recommend", "x", "body: expected an object"),
        ("score", {"user_id": 3}, "expected either item_ids or rows, got neither"),
        ("score", {"item_ids": [1], "rows": [{}]}, "expected either item_ids or rows, got both"),
        ("score", {"user_id": 3, "rows": [{}]}, "rows hold all features of each row; user_id belongs to item_ids"),
        ("score", {"rows": []}, "rows: "),
        ("score", {"rows": [{"device": {"a": 1}}]}, "rows.0.device: expected"),
        ("score", {"rows": [{"device": 1}, {"devise": 1}]}, 'row 2: unknown column "devise"; expected user_id, age'),
        ("score", {"item_ids": []}, "item_ids: "),
        ("score", {"item_ids": [1.5]}, "item_ids.0: expected an integer or text"),
        ("score", {"item_ids": list(range(10_001))}, "item_ids: "),
    ],
)
def test_a_wrong_request_gets_one_clear_line(client: TestClient, path: str, body: Any, detail: str) -> None:
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == 422
    assert answer.json() == {"detail": answer.json()["detail"], "request_id": answer.headers["x-request-id"]}
    assert answer.json()["detail"].startswith(detail) or detail in answer.json()["detail"]
    assert "\n" not in answer.json()["detail"]
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b'{"k":1',
        b"\xff\xfe",
        b'{"k":NaN}',
        b'{"context":{"device":Infinity}}',
        b"[" * 100_000,
        b'{"user_id":1e999}',
    ],
)
def test_what_is_not_proper_json_is_refused(client: TestClient, content: bytes) -> None:
    answer = client.post("/v1/recommend", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    "content", ["[" * 400_000, '{"user_id":1' + "0" * 5000 + "}", '{"features":{"x":' + "[" * 99_000]
)
def test_json_that_no_parser_takes_is_explained(client: TestClient, content: str) -> None:
    answer = client.post("/v1/recommend", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    assert "the body is not JSON" in answer.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        {"user_id": 10**30},
        {"user_id": "😀\u0000ü"},
        {"context": {"device": -(2**70)}},
        {"features": {"history.item": [], "history.category": [], "history.age": []}},
        {"features": {"history.item": [1, "2"], "history.category": ["a", 2], "history.age": [1, 2.5]}},
    ],
)
def test_odd_but_proper_values_are_served(client: TestClient, body: dict[str, Any]) -> None:
    answer = client.post("/v1/recommend", json={**body, "k": 3})
    assert answer.status_code == 200
    assert len(answer.json()["items"]) == 3


def test_half_a_surrogate_pair_is_refused_wherever_it_stands(client: TestClient) -> None:
    half = '"\\ud800"'
    for path, body in (
        ("recommend", f'{{"user_id": {half}}}'),
        ("recommend", f'{{"context": {{"device": {half}}}}}'),
        ("score", f'{{"item_ids": [{half}]}}'),
        ("score", f'{{"rows": [{{"device": {half}}}]}}'),
    ):
        answer = client.post(f"/v1/{path}", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 422
        assert answer.json()["detail"] == ("a text holds half of a surrogate pair, expected valid Unicode")


def test_an_error_quotes_no_more_than_a_thousand_characters(client: TestClient) -> None:
    answer = client.post("/v1/score", json={"rows": [{"price": 10**4000}]})
    assert answer.status_code == 422
    assert len(answer.json()["detail"]) < 1100


def test_a_large_body_is_refused_whatever_its_headers_say(client: TestClient) -> None:
    large = b'{"user_id":"' + b"x" * 10_000_000 + b'"}'
    assert client.post("/v1/recommend", content=large).status_code == 413

    def pieces() -> Iterator[bytes]:
        yield from (large[i : i + 65_536] for i in range(0, len(large), 65_536))

    answer = client.post("/v1/recommend", content=pieces())
    assert answer.status_code == 413
    assert answer.json()["detail"] == "the request body is larger than 1,000,000 bytes"
    just_fits = json.dumps({"user_id": "x" * 900_000}).encode()
    assert (
        client.post("/v1/recommend", content=just_fits, headers={"content-type": "application/json"}).status_code == 200
    )


def test_wrong_paths_and_methods(client: TestClient) -> None:
    assert client.get("/v1/recommend").status_code == 405
    assert client.post("/v1/nothing", json={}).status_code == 404


def test_ready_only_between_start_and_stop(funnel: Funnel) -> None:
    app = create_app(funnel)
    cold = TestClient(app)
    assert cold.get("/readyz").status_code == 503
    assert cold.get("/healthz").json() == {"status": "ok"}
    with TestClient(app) as warm:
        assert warm.get("/readyz").json() == {"status": "ready"}
    assert cold.get("/readyz").status_code == 503


def test_metrics_count_requests_and_stages(client: TestClient) -> None:
    ok, wrong = (f'fullrank_requests_total{{path="/v1/recommend",status="{status}"}}' for status in (200, 422))
    stages = [f'fullrank_stage_seconds_count{{stage="{s}"}}' for s in ("encode", "retrieval", "early", "final")]
    before = [metric(client, line) for line in (ok, wrong, *stages)]
    for k in (1, 2, 0):
        client.post("/v1/recommend", json={"k": k})
    client.get("/some/path/of/a/scanner")
    after = [metric(client, line) for line in (ok, wrong, *stages)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [2, 1, 2, 2, 2, 2]
    assert metric(client, 'fullrank_requests_total{path="other",status="404"}') >= 1
    assert "scanner" not in client.get("/metrics").text
    assert metric(client, "fullrank_requests_in_flight") == 1  # the one that asks


def test_more_work_than_may_wait_is_refused(funnel: Funnel, monkeypatch: pytest.MonkeyPatch) -> None:
    release, recommend = threading.Event(), funnel.recommend

    def slow(*arguments: Any, **options: Any) -> Any:
        if len(arguments) > 2:  # not the warm-up
            release.wait(10)
        return recommend(*arguments, **options)

    monkeypatch.setattr(funnel, "recommend", slow)
    app = create_app(funnel, ServingConfig(workers=1, rows=50, share=1))
    with TestClient(app) as client, ThreadPoolExecutor(2) as pool:
        # A list counts as the 20 rows that the final stage scores.
        started = [pool.submit(client.post, "/v1/recommend", json={"k": 1}) for _ in range(2)]
        until(lambda: metric(client, "fullrank_rows_admitted") >= 40)
        refused = client.post("/v1/recommend", json={"k": 1})
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
        assert client.post("/v1/score", json={"item_ids": list(range(11))}).status_code == 429
        small = pool.submit(client.post, "/v1/score", json={"item_ids": [1, 2]})
        release.set()
        assert [future.result().status_code for future in (*started, small)] == [200, 200, 200]
        # What is larger than all that may wait is let in alone.
        assert len(client.post("/v1/score", json={"item_ids": list(range(70))}).json()["items"]) == 70
        assert metric(client, "fullrank_requests_refused_total") == 2
        assert metric(client, "fullrank_rows_admitted") == 0


def test_one_client_does_not_hold_more_than_its_share(funnel: Funnel, monkeypatch: pytest.MonkeyPatch) -> None:
    release, recommend = threading.Event(), funnel.recommend

    def slow(*arguments: Any, **options: Any) -> Any:
        if len(arguments) > 2:
            release.wait(10)
        return recommend(*arguments, **options)

    monkeypatch.setattr(funnel, "recommend", slow)
    app = create_app(funnel, ServingConfig(workers=2, rows=70, share=0.5))
    with TestClient(app) as one, ThreadPoolExecutor(2) as pool:
        other = TestClient(app, client=("10.0.0.2", 1))
        started = [pool.submit(one.post, "/v1/recommend", json={"k": 1})]
        until(lambda: metric(one, "fullrank_rows_admitted") >= 20)
        assert one.post("/v1/recommend", json={"k": 1}).status_code == 429
        other.portal = one.portal
        started.append(pool.submit(other.post, "/v1/recommend", json={"k": 1}))
        until(lambda: metric(one, "fullrank_rows_admitted") >= 40)
        release.set()
        assert [future.result().status_code for future in started] == [200, 200]


def test_what_comes_too_late_is_dropped(funnel: Funnel, monkeypatch: pytest.MonkeyPatch) -> None:
    recommend, begun = funnel.recommend, []

    def slow(*arguments: Any, **options: Any) -> Any:
        if len(arguments) > 2:
            begun.append(arguments)
            time.sleep(0.5)
        return recommend(*arguments, **options)

    monkeypatch.setattr(funnel, "recommend", slow)
    app = create_app(funnel, ServingConfig(workers=1, seconds=0.25))
    with TestClient(app) as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, "/v1/recommend", json={})
        until(lambda: bool(begun))
        late = client.post("/v1/recommend", json={})
        assert late.status_code == 503 and "deadline" in late.json()["detail"]
        assert first.result().status_code == 200 and len(begun) == 1


def test_every_answer_has_an_id_and_a_line_in_the_log(funnel: Funnel) -> None:
    noted: list[dict[str, Any]] = []
    with TestClient(create_app(funnel, note=noted.append)) as client:
        own = client.post("/v1/recommend", json={"k": 0}, headers={"x-request-id": "from.me-1"})
        assert own.headers["x-request-id"] == own.json()["request_id"] == "from.me-1"
        made = client.post("/v1/score", json={"item_ids": [1, 2]}, headers={"x-request-id": 'no "good"\t'})
        assert re.fullmatch("[0-9a-f]{16}", made.headers["x-request-id"])
    first, second = noted
    assert (first["request_id"], first["route"], first["status"]) == ("from.me-1", "/v1/recommend", 422)
    assert second["request_id"] == made.headers["x-request-id"] and second["rows"] == 2
    assert second.keys() == {"request_id", "client", "method", "route", "status", "seconds", "rows"}


def test_a_large_request_is_scored_in_turns_and_says_which_row_is_wrong(client: TestClient) -> None:
    rows: list[dict[str, Any]] = [{"user_id": row % 7} for row in range(2500)]
    items = client.post("/v1/score", json={"rows": rows}).json()["items"]
    assert len(items) == 2500
    few = client.post("/v1/score", json={"rows": rows[2400:2407]}).json()["items"]
    assert [item["predictions"] for item in items[2400:2407]] == [approx(item["predictions"]) for item in few]
    rows[2000] = {"price": "dear"}
    refused = client.post("/v1/score", json={"rows": rows}).json()["detail"]
    assert refused.startswith('row 2001: column "price" is "dear"')


def test_the_description_stands_alone_and_names_every_status(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "/v1/recommend" in page and "RecommendRequest" not in page.split("Answers")[0]
    assert not re.search(r"https?://|src=|@import|url\(|<script", page)
    listed = client.get("/openapi.json").json()["paths"]["/v1/score"]["post"]["responses"]
    assert set(listed) == {"200", "400", "408", "413", "415", "422", "429", "500", "503"}
    assert listed["422"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Problem"}


def test_an_error_of_ours_shows_no_traceback(funnel: Funnel, monkeypatch: pytest.MonkeyPatch) -> None:
    with TestClient(create_app(funnel), raise_server_exceptions=False) as client:

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("secret detail")

        monkeypatch.setattr(funnel, "recommend", fail)
        answer = client.post("/v1/recommend", json={})
        assert answer.status_code == 500
        assert "secret" not in answer.text and "Traceback" not in answer.text
        assert metric(client, 'fullrank_requests_total{path="/v1/recommend",status="500"}') == 1


def test_requests_at_the_same_time_get_their_own_answers(client: TestClient, funnel: Funnel) -> None:
    users = [user for user in funnel.users.ids[:20]] if funnel.users else []

    def ask(user: int | str) -> Any:
        answer = client.post("/v1/recommend", json={"user_id": user})
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
        return answer.json()

    expected = {user: ask(user) for user in users}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, users * 5))
    for user, answer in zip(users * 5, answers, strict=True):
        for name in ("candidates", "degraded"):
            assert answer[name] == expected[user][name]
        for found, item in zip(answer["items"], expected[user]["items"], strict=True):
            assert found == {**item, "value": approx(item["value"]), "predictions": approx(item["predictions"])}


def test_a_saved_bundle_is_served_and_a_changed_one_is_not(funnel: Funnel, tmp_path: Path) -> None:
    save_bundle(funnel, tmp_path / "bundle")
    with TestClient(create_app(tmp_path / "bundle")) as client:
        assert client.post("/v1/recommend", json={"user_id": 1}).status_code == 200
    weights = tmp_path / "bundle" / "final.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"final.safetensors does not match its hash"):
        create_app(tmp_path / "bundle")


def test_the_page_stands_alone(client: TestClient) -> None:
    page = client.get("/").text
    assert "bid * click" in page
    assert not re.search(r"https?://|src=|@import|url\(", page)


def test_the_description_names_every_endpoint(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        "/v1/recommend",
        "/v1/score",
        "/v1/feedback",
        "/v1/users/{user_id}",
        "/v1/items",
        "/v1/items/{item_id}",
        "/v1/experiment",
        "/healthz",
        "/readyz",
        "/metrics",
    }
