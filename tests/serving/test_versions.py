"""Facts about bundles that come while others are served."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from fullrank.funnel import Funnel, save_bundle
from fullrank.funnel.scorer import Scorer
from fullrank.serving import create_app, shared_versions
from fullrank.serving.instruments import Instruments
from fullrank.serving.item_store import ItemStore
from fullrank.serving.live import Live
from fullrank.serving.shared import Shared, SharedArm
from fullrank.serving.shared_versions import SharedVersions, opened_alike
from fullrank.serving.versions import Opened, Target
from fullrank.training.deltas import Position, position_of, state_of, write_delta
from fullrank.training.publishing import POINTER, Pointer, write_pointer

TOKEN = "secret"


def point(place: Path, number: int, bundle: str, deltas: tuple[str, ...] = ()) -> None:
    base = position_of(place / bundle).base
    until = int(time.time()) - 100
    write_pointer(place, Pointer(number=number, bundle=bundle, base=base, deltas=deltas, until=until, reason="test"))


def until(there: Callable[[], bool], seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


@pytest.fixture
def place(funnel: Funnel, tmp_path: Path) -> Path:
    for name in ("one", "two"):
        save_bundle(funnel, tmp_path / name, about={"name": name})
    point(tmp_path, 1, "one")
    return tmp_path


def served(place: Path) -> TestClient:
    return TestClient(create_app(place, token=TOKEN), headers={"Authorization": f"Bearer {TOKEN}"})


def asked(client: TestClient, **body: Any) -> Any:
    answer = client.post("/v1/recommend", json={"user_id": 3, "k": 1, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def told(client: TestClient, what: str) -> tuple[str, str]:
    answer = client.post(f"/v1/admin/{what}")
    assert answer.status_code == 200, answer.text
    return answer.json()["outcome"], answer.json()["model_version"]


def test_a_new_bundle_is_served_without_a_request_less(place: Path) -> None:
    versions = {name: position_of(place / name).base[:12] for name in ("one", "two")}
    with served(place) as client:
        client.post("/v1/items", json={"items": [{"item_id": 1000, "bid": 1e6}]})
        assert asked(client)["model_version"] == versions["one"]
        stop, answers = threading.Event(), []

        def ask() -> None:
            while not stop.is_set() and len(answers) < 5000:
                answers.append(client.post("/v1/recommend", json={"user_id": 3, "k": 1}))

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            point(place, 2, "two")
            until(lambda: bool(answers) and answers[-1].json()["model_version"] == versions["two"])
        finally:
            stop.set()
            asking.join(10)
        assert {answer.status_code for answer in answers} == {200}
        # Items that came in between are there, in every answer.
        assert {answer.json()["items"][0]["item_id"] for answer in answers} == {1000}
        metrics = client.get("/metrics").text
        assert f'fullrank_model{{version="{versions["two"]}"}} 1.0' in metrics and versions["one"] not in metrics
        (age,) = (line for line in metrics.splitlines() if line.startswith("fullrank_model_age_seconds "))
        assert 90 < float(age.split()[1]) < 200
        assert "fullrank_items 81.0" in metrics


def test_a_bad_bundle_is_refused_and_the_old_one_stays(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = place / "two" / "final.safetensors"
    good = weights.read_bytes()
    one, two = (position_of(place / name).base[:12] for name in ("one", "two"))
    with served(place) as client:
        weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        point(place, 2, "two")
        until(lambda: 'fullrank_swaps_total{outcome="refused"} 1.0' in client.get("/metrics").text)
        assert asked(client)["model_version"] == one and "does not match its hash" in caplog.text
        outcome, version = told(client, "reload")
        assert "does not match its hash" in outcome and version == one
        weights.write_bytes(good)
        assert told(client, "reload") == ("swapped", two) and asked(client)["model_version"] == two
        (place / POINTER).write_text("{")
        assert "is damaged" in told(client, "reload")[0] and asked(client)["model_version"] == two


def test_rolling_back_holds_until_there_is_another_bundle(place: Path) -> None:
    one, two = (position_of(place / name).base[:12] for name in ("one", "two"))
    with served(place) as client:
        versions = client.app.state.versions["control"]  # type: ignore[attr-defined]
        assert client.post("/v1/admin/rollback").status_code == 404
        point(place, 2, "two")
        until(lambda: asked(client)["model_version"] == two)
        assert told(client, "rollback") == ("rolled back", one) and asked(client)["model_version"] == one
        assert versions.look() == "unchanged" and asked(client)["model_version"] == one
        assert told(client, "reload") == ("swapped", two)
        versions.roll_back()
        versions.look_soon()
        until(lambda: asked(client)["model_version"] == two)


def test_a_swap_is_of_one_arm(place: Path, tmp_path: Path, funnel: Funnel) -> None:
    one, two = (position_of(place / name).base[:12] for name in ("one", "two"))
    other = tmp_path / "other"
    for name in ("one", "two"):
        save_bundle(funnel, other / name, about={"name": name})
    point(other, 1, "one")
    app = create_app(place, token=TOKEN, arms={"new": (other, 0.5), "still": (place / "one", 0.1)})
    with TestClient(app, headers={"Authorization": f"Bearer {TOKEN}"}) as client:

        def versions() -> list[str]:
            return [asked(client, experiment=arm)["model_version"] for arm in ("control", "new", "still")]

        assert versions() == [one, one, one]
        point(other, 2, "two")
        until(lambda: versions() == [one, two, one])
        assert told(client, "rollback?arm=new") == ("rolled back", one) and versions() == [one, one, one]
        assert told(client, "reload?arm=new") == ("swapped", two)
        assert told(client, "reload") == ("unchanged", one) and told(client, "reload?arm=still") == ("unchanged", one)
        for wrong in ("rollback", "rollback?arm=still", "rollback?arm=nwe", "reload?arm=nwe"):
            assert client.post(f"/v1/admin/{wrong}").status_code == 404
        # The metrics are of the control.
        assert f'fullrank_model{{version="{one}"}} 1.0' in client.get("/metrics").text


class Alike:
    """Two processes that serve what the directory wants, the first of `wanted`.

    Attributes:
        gone: bundles that are not there any more.
        broken: processes that cannot open anything more; their attempts.
        ended: how often one did.
    """

    def __init__(self, funnel: Funnel, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place = place
        self.wanted = [Target(place / name, name, (), 0.0) for name in ("one", "two", "three")]
        self.gone, self.broken, self.ended = set[Path](), dict[SharedArm, int](), 0

        def opened(target: Target, shared: SharedArm) -> Opened:
            if shared in self.broken:
                self.broken[shared] += 1
                raise ValueError("no memory left")
            return Opened(target, funnel, Position(target.base))

        def ends() -> None:
            self.ended += 1

        for module in ("versions", "shared_versions"):
            monkeypatch.setattr(f"fullrank.serving.{module}.target_of", lambda place: self.wanted[0])
        monkeypatch.setattr(shared_versions, "opened", opened)
        bases = lambda bundle: Position("" if bundle in self.gone else bundle.name)  # noqa: E731
        monkeypatch.setattr(shared_versions, "position_of", bases)
        monkeypatch.setattr(shared_versions, "PAUSES", (0.01, 0.01))
        monkeypatch.setattr(shared_versions, "_end", ends)
        self.areas = [Shared(place / "shared").arm("control") for _ in range(2)]
        store = ItemStore()
        self.lives = [Live(funnel, "", store) for _ in self.areas]
        self.made = [
            SharedVersions(place, opened_alike(place, area), live, Instruments(), area)
            for area, live in zip(self.areas, self.lives, strict=True)
        ]

    def stop(self) -> None:
        for each in (*self.made, *self.lives):
            each.stop()


@pytest.fixture
def look() -> float:
    """Seconds between two looks."""
    return 1e6


@pytest.fixture
def alike(funnel: Funnel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: float) -> Iterator[Alike]:
    monkeypatch.setattr("fullrank.serving.versions.LOOK", look)
    alike = Alike(funnel, tmp_path, monkeypatch)
    yield alike
    alike.stop()


def test_a_rollback_of_processes_is_to_what_was_served_last_whoever_is_asked(alike: Alike) -> None:
    (one, two, three), (first, second) = alike.wanted, alike.made
    assert first.now == second.now == one
    for _ in range(2):
        del alike.wanted[0]
        assert first.look() == "swapped"
    # It has not seen that there was another one between.
    assert second.now == one and second.roll_back() and second.now == two
    assert first.look() == "unchanged" and first.now == two
    assert first.roll_back() and first.now == three


@pytest.mark.parametrize("look", [0.02])
def test_a_process_that_cannot_open_what_was_agreed_ends_and_the_others_stay_with_it(
    alike: Alike, caplog: pytest.LogCaptureFixture
) -> None:
    (_, two, _), (first, second), (_, area) = alike.wanted, alike.made, alike.areas
    (alike.place / POINTER).touch()  # so that both look by themselves
    alike.broken[area] = 0
    del alike.wanted[0]
    first.look()
    until(lambda: bool(alike.ended))
    assert alike.broken[area] == 3
    lines = [record.message for record in caplog.records]
    assert sum("cannot be opened: no memory left; it is tried again" in line for line in lines) == 2
    assert sum("cannot be opened: no memory left; process" in line for line in lines) == 1
    # Nor does it decide anything while it answers what it was asked.
    assert "no memory left" in second.look(again=True)
    with pytest.raises(ValueError, match="no memory left"):
        second.roll_back()
    # The one that takes its place may not be able to either; the other one goes on.
    with pytest.raises(ValueError, match="what the other processes serve cannot be opened: no memory left"):
        opened_alike(alike.place, area)
    assert first.now == two and first.look() == "unchanged" and alike.areas[0].agreed().now == two
    alike.broken.clear()
    assert opened_alike(alike.place, area).target == two and alike.ended == 1


def test_what_is_not_there_any_more_gives_way_to_what_is_wanted_unless_that_was_given_up(alike: Alike) -> None:
    (one, _, three), (first, _), (_, area) = alike.wanted, alike.made, alike.areas
    del alike.wanted[0]
    assert first.look() == "swapped" and first.roll_back() and first.now == one
    alike.gone.add(one.bundle)
    # One that begins now.
    with pytest.raises(ValueError, match="one is not one any more, and two was refused or rolled back"):
        opened_alike(alike.place, area)
    assert first.look() == "unchanged" and first.now == one
    del alike.wanted[0]
    assert opened_alike(alike.place, area).target == three
    assert first.look() == "unchanged" and first.now == three


def test_without_the_token_nobody_is_answered(place: Path) -> None:
    with TestClient(create_app(place, token=TOKEN)) as client:
        for sent in ({}, {"Authorization": "Bearer secrets"}, {"Authorization": TOKEN}):
            for method, path in (("POST", "/v1/recommend"), ("POST", "/v1/admin/rollback"), ("DELETE", "/v1/items/3")):
                answer = client.request(method, path, headers=sent)
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["request_id"] == answer.headers["x-request-id"]
        assert client.get("/healthz").status_code == client.get("/metrics").status_code == 200
        document = client.get("/openapi.json").json()
        for path, operations in document["paths"].items():
            for operation in operations.values():
                assert ("401" in operation["responses"]) == path.startswith("/v1/")
    with TestClient(create_app(place)) as client:
        assert client.post("/v1/admin/rollback").status_code == 404
        assert "/v1/admin/rollback" not in client.get("/openapi.json").json()["paths"]


def test_deltas_are_applied_beside_what_is_served(funnel: Funnel, tmp_path: Path) -> None:
    scorer = Scorer(funnel.encoders, funnel.final)
    save_bundle(scorer, tmp_path / "bundle")
    point(tmp_path, 1, "bundle")
    position = position_of(tmp_path / "bundle")
    states = [{name: value.detach().clone() for name, value in funnel.final.state_dict().items()}]
    name = next(name for name, value in states[0].items() if value.is_floating_point() and value.ndim == 2)
    for number in (1, 2):
        states.append({**states[-1], name: states[-1][name] + 0.1})
        path = tmp_path / f"{number}"
        position = write_delta(path, *states[-2:], position, schema=funnel.schema, until=5)
    assert isinstance(position, Position) and position.number == 2
    body = {"rows": [{"price": 3.0}, {}]}
    with served(tmp_path) as client:
        before = client.post("/v1/score", json=body).json()["items"]
        for number in (1, 2):
            point(tmp_path, 1 + number, "bundle", tuple(f"{n}" for n in range(1, number + 1)))
            # The thread that looks every second may have been the first.
            assert told(client, "reload")[1] == f"{position.base[:12]}+{number}"
        after = client.post("/v1/score", json=body).json()["items"]
        told(client, "rollback")
        assert client.post("/v1/score", json=body).json()["items"] not in (before, after)
    with served(tmp_path) as again:
        assert again.post("/v1/score", json=body).json()["items"] == after != before
    assert all(torch.equal(value, funnel.final.state_dict()[key]) for key, value in states[0].items())


def moved(funnel: Funnel, by: float) -> Funnel:
    """The funnel with tables and other matrices of all its rankers moved."""
    rankers = {name: copy.deepcopy(ranker) for name, ranker in funnel.rankers.items()}
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in state_of(rankers).values():
            if value.is_floating_point() and value.ndim == 2:
                value += by * torch.randn(value.shape, generator=draw)
    return funnel.with_rankers(rankers)


def test_deltas_of_a_funnel_are_taken_up_without_a_request_less(place: Path, funnel: Funnel) -> None:
    """Beside them items change; what is answered at the end is what a server of the funnel saved in full says."""
    last = [funnel, moved(funnel, 0.1), moved(funnel, 0.2)]
    position, base = position_of(place / "one"), position_of(place / "one").base[:12]
    for number in (1, 2):
        before, after = (state_of(each.rankers) for each in last[number - 1 : number + 1])
        position = write_delta(place / f"{number}", before, after, position, schema=funnel.schema, until=5)
    save_bundle(last[2], place / "full")
    users, items = (3, 5, 9999), [{"item_id": 1000 + number, "bid": 2.5 - number} for number in (0, 1)]
    with served(place) as client:
        began = [asked(client, user_id=user, k=10)["items"] for user in users]
        stop, answers = threading.Event(), []

        def ask() -> None:
            while not stop.is_set() and len(answers) < 5000:
                answers.append(client.post("/v1/recommend", json={"user_id": 3, "k": 10}))

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            point(place, 2, "one", ("1",))
            until(lambda: bool(answers) and answers[-1].json()["model_version"] == f"{base}+1")
            assert client.post("/v1/items", json={"items": items[:1]}).status_code == 201
            point(place, 3, "one", ("1", "2"))
            until(lambda: answers[-1].json()["model_version"] == f"{base}+2")
        finally:
            stop.set()
            asking.join(10)
        assert {answer.status_code for answer in answers} == {200}
        # No answer is of half a delta: with one catalogue each version gives one list.
        lists: dict[str, set[str]] = {}
        for answer in answers:
            lists.setdefault(answer.json()["model_version"], set()).add(json.dumps(answer.json()["items"]))
        assert len(lists[base]) == len(lists[f"{base}+2"]) == 1 and lists[base] != lists[f"{base}+2"]
        assert client.post("/v1/items", json={"items": items[1:]}).status_code == 201
        found = [asked(client, user_id=user, k=10)["items"] for user in users]
        assert "fullrank_items 82.0" in client.get("/metrics").text
        assert told(client, "rollback") == ("rolled back", f"{base}+1")
        assert told(client, "reload") == ("swapped", f"{base}+2")
        assert [asked(client, user_id=user, k=10)["items"] for user in users] == found
    for name, expected in (("full", found), ("one", began)):
        with served(place / name) as client:
            if name == "full":
                client.post("/v1/items", json={"items": items})
            assert [asked(client, user_id=user, k=10)["items"] for user in users] == expected
    with served(place) as again:  # from the bundle and both deltas at once
        again.post("/v1/items", json={"items": items})
        assert [asked(again, user_id=user, k=10)["items"] for user in users] == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("gap", "is delta 2, and the model has had 0"),
        ("foreign", "is for another bundle"),
        ("grown", "with another schema"),
        ("flip", "does not match its hash"),
        ("stage", "the model has no tensor for"),
        ("nan", "has a NaN or infinite number"),
    ],
)
def test_a_bad_delta_of_a_funnel_is_refused_and_the_next_bundle_is_taken(
    change: str, message: str, place: Path, funnel: Funnel, caplog: pytest.LogCaptureFixture
) -> None:
    good, position = state_of(funnel.rankers), position_of(place / "one")
    name = next(name for name in good if name.startswith("early|") and good[name].ndim == 2)
    new = {**good, name: good[name] + (torch.nan if change == "nan" else 0.1)}
    if change == "gap":
        position = Position(position.base, 1, "0" * 64)
    elif change == "foreign":
        position = position_of(place / "two")
    elif change == "stage":
        good, new = ({each.replace("early|", "first|"): value for each, value in all_.items()} for all_ in (good, new))
    schema = funnel.schema
    if change == "grown":
        schema = schema.model_copy(update={"labels": schema.labels[:1]})
    write_delta(place / "delta", good, new, position, schema=schema, until=5)
    if change == "flip":
        tensors = place / "delta" / "tensors.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-1] + bytes([tensors.read_bytes()[-1] ^ 1]))
    one, two = (position_of(place / each).base[:12] for each in ("one", "two"))
    with served(place) as client:
        before = asked(client, k=10)["items"]
        point(place, 2, "one", ("delta",))
        outcome, version = told(client, "reload")
        assert message in outcome and version == one
        lines = [record.getMessage() for record in caplog.records if "is refused" in record.getMessage()]
        assert lines and all(message in line and "\n" not in line for line in lines)
        now = asked(client, k=10)
        assert now["model_version"] == one and now["items"] == before
        point(place, 3, "two")
        assert told(client, "reload")[1] == asked(client)["model_version"] == two
