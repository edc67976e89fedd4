"""Facts about items that come, change and go while they are served."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from sqlite3 import connect
from typing import Any

import polars as pl
import pytest
import torch
from fastapi.testclient import TestClient

from fullrank.funnel import Funnel, Request
from fullrank.funnel.catalogue import ACTIVE, BID
from fullrank.funnel.item_changes import ChangedItems, ItemState
from fullrank.serving import create_app
from fullrank.serving.item_store import ItemStore
from fullrank.serving.live import LOOK, Gate, Live

# Worth more than all others.
GOOD = {"features": {"category": "3", "price": 10.0}, "bid": 1e6}


@pytest.fixture
def client(funnel: Funnel) -> Iterator[TestClient]:
    with TestClient(create_app(funnel)) as client:
        yield client


def top(client: TestClient, **body: Any) -> list[Any]:
    answer = client.post("/v1/recommend", json={"user_id": 3, **body})
    assert answer.status_code == 200, answer.text
    return [item["item_id"] for item in answer.json()["items"]]


def sent(client: TestClient, *items: dict[str, Any]) -> list[tuple[int, str | None]]:
    answer = client.post("/v1/items", json={"items": list(items)})
    assert answer.status_code in (201, 207), answer.text
    return [(item["status"], item["detail"]) for item in answer.json()["items"]]


def test_an_item_is_found_once_it_is_answered_and_not_once_it_is_gone(client: TestClient, funnel: Funnel) -> None:
    before = client.post("/v1/recommend", json={"user_id": 3, "k": 80}).json()
    assert sent(client, {"item_id": 1000, **GOOD}, {"item_id": before["items"][5]["item_id"], **GOOD}) == [
        (201, None),
        (200, None),
    ]
    after = client.post("/v1/recommend", json={"user_id": 3, "k": 81}).json()
    found = [item["item_id"] for item in after["items"]]
    assert set(found[:2]) == {1000, before["items"][5]["item_id"]} and len(found) == 81
    assert (before["index_version"], after["index_version"]) == (0, 2)
    assert 1000 in top(client, filter={"any": {"category": ["3"]}}, k=1 + found.index(1000))
    assert client.delete("/v1/items/1000").status_code == 200
    assert 1000 not in top(client, k=81) and client.delete("/v1/items/1000").status_code == 404
    # Nothing else has changed.
    assert [item["item_id"] for item in before["items"]] == [
        item.item_id for item in funnel.recommend([Request(3)], 80)[0].items
    ]


def test_an_added_item_is_scored_as_the_log_would_have_had_it(client: TestClient, funnel: Funnel) -> None:
    user = {"user_id": 3, "item_ids": [1000]}
    raw = {"category": 3, "price": 10.0}
    sent(client, {"item_id": 1000, "features": raw, "bid": 2.0})
    changed = ChangedItems(funnel)
    row = changed.encoder.encode({"1000": ItemState(features=raw, bid=2.0)})
    expected = funnel.encoders.transform(
        pl.DataFrame({"item_id": ["1000"], "category": ["3"], "price": [10.0]}), allow_missing=True
    )
    for name in set(row.columns) & set(expected.columns) - {funnel.items.frame.columns[0]}:
        assert row[name].to_list() == expected[name].to_list(), name
    first = client.post("/v1/score", json=user).json()["items"][0]
    client.patch("/v1/items/1000", json={"bid": 4.0})
    second = client.post("/v1/score", json=user).json()["items"][0]
    assert second["predictions"] == first["predictions"] and second["value"] == pytest.approx(2 * first["value"])
    client.patch("/v1/items/1000", json={"features": {"price": 500.0}})
    third = client.post("/v1/score", json=user).json()["items"][0]
    assert third["predictions"] != first["predictions"]
    sent(client, {"item_id": 1000, "features": {**raw, "price": 500.0}, "bid": 4.0})
    assert client.post("/v1/score", json=user).json()["items"][0] == third


def test_a_patch_leaves_the_rest_as_the_bundle_has_it(funnel: Funnel) -> None:
    changed, name = ChangedItems(funnel), str(funnel.items.ids[7])
    changed.funnel = changed.prepare({name: ItemState(whole=False, bid=9.0)}, 0).apply()
    before, after = funnel.items.frame.row(7, named=True), changed.funnel.items.frame.row(7, named=True)
    assert after == {**before, BID: 9.0}
    changed.funnel = changed.prepare({name: ItemState(whole=False, features={"price": None}, bid=9.0)}, 0).apply()
    fresh = changed.funnel.items.frame.row(7, named=True)
    assert {key for key in fresh if fresh[key] != before[key]} <= {BID, "price", "price.missing", "price__missing"}


def test_hidden_and_expired_items_are_not_recommended(client: TestClient) -> None:
    sent(client, {"item_id": 1000, **GOOD}, {"item_id": 1001, **GOOD, "expires_at": time.time() + 0.5})
    assert set(top(client, k=2)) == {1000, 1001}
    client.patch("/v1/items/1000", json={"hidden": True})
    assert 1000 not in top(client, k=80)
    assert client.post("/v1/score", json={"item_ids": [1000]}).json()["items"][0]["value"] > 1000
    end = time.monotonic() + 10
    while 1001 in top(client, k=80) and time.monotonic() < end:
        time.sleep(0.05)
    assert 1001 not in top(client, k=80)
    client.patch("/v1/items/1000", json={"hidden": False})
    client.patch("/v1/items/1001", json={"expires_at": None})
    assert set(top(client, k=2)) == {1000, 1001}


@pytest.mark.parametrize(
    ("wrong", "detail"),
    [
        ({"bid": -1}, "bid is -1, expected a number from 0"),
        ({"bid": None}, "bid: the items of this bundle have bids"),
        ({"item_id": "seven"}, "item_id is 'seven', and the ids of this bundle are Int"),
        ({"item_id": "07"}, "item_id is '07', and"),
        ({"item_id": 1000}, "item_id: is in this request already"),
        ({"features": {"colour": "red"}}, 'features: unknown column "colour"; items have'),
        ({"features": {"device": 2}}, 'features: unknown column "device"'),
        ({"features": {"item_id": 2}}, 'features: "item_id" is the id'),
        ({"features": {"price": "dear"}}, "price"),
        ({"features": {"price": [1]}}, 'feature "price" is [1], expected one number'),
    ],
)
def test_a_wrong_item_is_refused_and_the_good_ones_are_there(
    client: TestClient, wrong: dict[str, Any], detail: str
) -> None:
    (first, _), (second, told), (third, _) = sent(
        client, {"item_id": 1000, **GOOD}, {"item_id": 1001, **GOOD, **wrong}, {"item_id": 1002, **GOOD}
    )
    assert (first, second, third) == (201, 422, 201) and told is not None and detail in told
    assert set(top(client, k=2)) == {1000, 1002}


def test_what_is_no_item_is_refused(client: TestClient) -> None:
    assert client.patch("/v1/items/4711", json={"bid": 1}).status_code == 404
    assert client.patch("/v1/items/3", json={"bid": -1}).status_code == 422
    assert client.patch("/v1/items/3", json={"features": {"colour": 1}}).status_code == 422
    assert client.patch("/v1/items/3", content="{}", headers={"content-type": "text/plain"}).status_code == 415
    nan = '{"items": [{"item_id": 1, "bid": NaN}]}'
    answer = client.post("/v1/items", content=nan, headers={"content-type": "application/json"})
    assert answer.status_code == 422 and "finite" in answer.json()["detail"]


def test_all_items_may_go(client: TestClient, funnel: Funnel) -> None:
    for name in funnel.items.ids[:3]:
        client.delete(f"/v1/items/{name}")
    assert len(top(client, k=80)) == 77
    live = Live(funnel, "", ItemStore())
    try:
        live.store.change([], lambda _: {str(name): ItemState(removed=True) for name in funnel.items.ids})
        live.applied(80).result(10)
        with live.reading() as (content, _, changes):
            assert isinstance(content, Funnel) and content.recommend([Request(3)], 5)[0].items == [] and changes == 80
        live.store.change([], lambda _: {"5": ItemState(bid=1.0)})
        live.applied(81).result(10)
        assert [item.item_id for item in live.served.content.recommend([Request(3)], 5)[0].items] == [5]  # type: ignore[union-attr]
    finally:
        live.stop()


def test_changes_survive_the_server_and_reach_another_process(funnel: Funnel, tmp_path: Path) -> None:
    with TestClient(create_app(funnel, store=tmp_path)) as one, TestClient(create_app(funnel, store=tmp_path)) as other:
        sent(one, {"item_id": 1000, **GOOD})
        one.delete(f"/v1/items/{funnel.items.ids[0]}")
        end = time.monotonic() + 10
        while 1000 not in top(other, k=1) and time.monotonic() < end:
            time.sleep(0.05)
        expected = top(one, k=80)
        assert expected[0] == 1000
    with TestClient(create_app(funnel, store=tmp_path)) as again:
        assert top(again, k=80) == expected


@pytest.mark.parametrize("beside", [None, 12, 1000])
def test_many_changes_in_turn_are_the_catalogue_made_at_once(
    funnel: Funnel, monkeypatch: pytest.MonkeyPatch, beside: int | None
) -> None:
    """Whatever the way, vectors of the early stage, bids and the index are those of the items; also in a large
    catalogue, where changes are kept beside what was there."""
    if beside is not None:
        for module in ("fullrank.funnel.item_vectors", "fullrank.retrieval.exact"):
            monkeypatch.setattr(f"{module}.LARGE", 1)
            monkeypatch.setattr(f"{module}.MOST_BESIDE", beside)
    changed, generator = ChangedItems(funnel), torch.Generator().manual_seed(0)
    last: dict[str, ItemState] = {}
    for _ in range(20):
        states = {}
        for number in torch.randint(0, 120, (5,), generator=generator).tolist():
            kind = int(torch.randint(0, 4, (1,), generator=generator))
            bid = float(torch.rand(1, generator=generator))
            states[str(number)] = (
                ItemState(removed=True)
                if kind == 0
                else ItemState(features={"category": str(number % 7), "price": 3.0 * kind}, bid=bid, hidden=kind == 1)
            )
        last.update(states)
        changed.funnel = changed.prepare(states, 0).apply()
    once = ChangedItems(funnel)
    once.funnel = once.prepare(last, 0).apply()
    assert changed.funnel.items.frame.equals(once.funnel.items.frame)
    rebuilt = Funnel(
        encoders=funnel.encoders,
        items=once.funnel.items,
        users=funnel.users,
        context=funnel.context,
        retriever=once.funnel.retriever.fork(),
        early=funnel.early,
        final=funnel.final,
        sizes=funnel.sizes,
    )
    rebuilt.index_active()
    requests = [Request(user) for user in range(10)]
    for one, other, third in zip(
        *(each.recommend(requests, 20) for each in (changed.funnel, once.funnel, rebuilt)), strict=True
    ):
        assert [item.item_id for item in one.items] == [item.item_id for item in other.items]
        assert [item.item_id for item in one.items] == [item.item_id for item in third.items]
        assert [item.value for item in one.items] == pytest.approx([item.value for item in third.items])
    assert set(changed.funnel.items.frame.filter(ACTIVE).to_series(0)) >= {item.item_id for item in one.items}


def test_a_bundle_takes_of_the_changes_what_it_can_have(funnel: Funnel, caplog: pytest.LogCaptureFixture) -> None:
    """As when the bundle that is swapped in has another schema, or does not know an item."""
    store, good = ItemStore(), ItemState(features={"price": 3.0}, bid=1e6)
    states = {
        "1000": good,
        "a name": good,
        "1001": good.model_copy(update={"features": {"colour": "red"}}),
        "1002": ItemState(bid=None),
        "1003": ItemState(whole=False, hidden=False),
    }
    store.change([], lambda _: states)
    live = Live(funnel, "", store)
    try:
        content = live.served.content
        assert isinstance(content, Funnel) and set(content.items.ids) - set(funnel.items.ids) == {1000}
        assert content.recommend([Request(3)], 1)[0].items[0].item_id == 1000
        left = [record.getMessage() for record in caplog.records]
        assert [text.split()[1] for text in left] == ["a", "1001", "1002"]
    finally:
        live.stop()


def test_a_retriever_that_changes_in_place_is_changed_while_nobody_searches(funnel: Funnel) -> None:
    class InPlace(type(funnel.retriever)):  # type: ignore[misc]
        searching = most = 0

        def fork(self) -> InPlace:
            return self

        def search(self, *arguments: Any, **options: Any) -> Any:
            self.searching += 1
            try:
                return super().search(*arguments, **options)
            finally:
                self.searching -= 1

        def add(self, items: Any) -> None:
            InPlace.most = max(InPlace.most, self.searching)
            super().add(items)

    retriever = copy.copy(funnel.retriever.fork())
    retriever.__class__ = InPlace
    with TestClient(create_app(funnel.with_parts(retriever=retriever))) as client, ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(top, client, k=5) for _ in range(60)]
        for number in range(10):
            sent(client, {"item_id": 1000 + number, **GOOD})
            assert 1000 + number in top(client, k=12)
        assert all(len(future.result(20)) == 5 for future in asking)
    assert InPlace.most == 0


def test_a_store_of_items_that_fails_for_a_while_is_asked_again(funnel: Funnel, tmp_path: Path) -> None:
    with TestClient(create_app(funnel, store=tmp_path)) as client, closing(connect(tmp_path / "items.sqlite")) as file:
        file.execute("ALTER TABLE items RENAME TO elsewhere")
        time.sleep(2 * LOOK)
        refused = client.post("/v1/items", json={"items": [{"item_id": 1000, **GOOD}]})
        assert refused.status_code == 503 and "store" in refused.json()["detail"]
        file.execute("ALTER TABLE elsewhere RENAME TO items")
        sent(client, {"item_id": 1000, **GOOD})
        assert 1000 in top(client, k=12)


def test_nobody_reads_while_one_writes() -> None:
    gate, log, go = Gate(), [], threading.Event()

    def write() -> None:
        with gate.writing():
            log.append("write")

    with gate.reading(), gate.reading():
        writer = threading.Thread(target=write)
        writer.start()
        go.wait(0.05)
        log.append("read")
    writer.join(10)
    assert log == ["read", "write"]
