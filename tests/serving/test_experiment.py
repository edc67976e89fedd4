"""Facts about bundles that are served side by side."""

from __future__ import annotations

import math
import os
import random
import signal
import sqlite3
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from fullrank.funnel import Funnel
from fullrank.funnel.recent_events import Event
from fullrank.funnel.slate import SlateConfig
from fullrank.serving import arm_counts, create_app
from fullrank.serving.arm_counts import ArmCounts, CountedList
from fullrank.serving.experiment import Experiment
from fullrank.serving.item_store import ItemStore
from fullrank.serving.live import Live
from fullrank.serving.store import Feedback


@pytest.fixture(scope="module")
def other(funnel: Funnel) -> Funnel:
    """At most one item of a category."""
    return funnel.with_slate(SlateConfig.model_validate({"diversity": [{"by": "category", "at_most": 1}]}))


@pytest.fixture
def client(funnel: Funnel, other: Funnel, tmp_path: Path) -> Iterator[TestClient]:
    with TestClient(create_app(funnel, store=tmp_path, arms={"varied": (other, 0.3)}, salt="s")) as client:
        yield client


@pytest.fixture(scope="module")
def live(funnel: Funnel) -> Iterator[Live]:
    live = Live(funnel, "", ItemStore())
    yield live
    live.stop()


def asked(client: TestClient, user: int | None, **body: Any) -> Any:
    answer = client.post("/v1/recommend", json={"user_id": user, "k": 8, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def ids(answer: Any) -> list[Any]:
    return [item["item_id"] for item in answer["items"]]


def click(impression: str | None, value: float = 1.0) -> Feedback:
    return Feedback(1, Event(1, 0, {"click": value}, {}), None, impression)


def test_users_are_split_by_their_shares_and_by_salts_independently(live: Live) -> None:
    arms = {"a": (live, 0.1), "b": (live, 0.25)}
    one, again, salted = (Experiment(live, arms, salt, "click") for salt in ("x", "x", "y"))
    users, pairs = 40_000, Counter[tuple[str, str]]()
    for user in range(users):
        arm = one.arm_of(f"user {user}")
        assert arm == again.arm_of(f"user {user}")
        pairs[arm, salted.arm_of(f"user {user}")] += 1
    for first, share in one.shares.items():
        for second, other_share in one.shares.items():
            expected = share * other_share
            error = math.sqrt(expected * (1 - expected) / users)
            assert abs(pairs[first, second] / users - expected) < 4 * error


def test_each_user_is_answered_by_the_arm_of_the_hash(client: TestClient, funnel: Funnel, other: Funnel) -> None:
    forced = {
        name: [asked(client, user, experiment=name) for user in range(30)] for name in ("control", "varied", "none")
    }
    split = [asked(client, user) for user in range(30)]
    assert {answer["arm"] for answer in split} == {"control", "varied"}
    for user, answer in enumerate(split):
        assert ids(answer) == ids(forced[answer["arm"]][user]) and asked(client, user)["arm"] == answer["arm"]
        assert forced["none"][user]["arm"] is None and ids(forced["none"][user]) == ids(forced["control"][user])
    assert any(ids(one) != ids(two) for one, two in zip(forced["control"], forced["varied"], strict=True))
    wrong = client.post("/v1/recommend", json={"experiment": "varie"})
    assert wrong.status_code == 422
    assert wrong.json()["detail"] == 'experiment: there is no arm "varie"; there are varied, control and none'
    with TestClient(create_app(funnel)) as plain:
        assert asked(plain, 3, experiment="none")["arm"] is None
        assert plain.post("/v1/recommend", json={"experiment": "varied"}).status_code == 422
        assert plain.get("/v1/experiment").status_code == 404


def test_scores_are_those_of_the_users_arm(funnel: Funnel) -> None:
    arms = {"once": (funnel.with_parts(value="click"), 0.3), "twice": (funnel.with_parts(value="2 * click"), 0.3)}
    times = {"once": 1, "twice": 2}
    with TestClient(create_app(funnel, arms=arms, salt="s")) as client:

        def arm_of_score(**body: Any) -> Any:
            said = client.post("/v1/score", json=body).json()
            (item,) = said["items"]
            found = item["value"] / item["predictions"]["click"]
            assert all((found == pytest.approx(factor)) == (said["arm"] == arm) for arm, factor in times.items())
            return said["arm"]

        for user in range(20):
            assert arm_of_score(user_id=user, item_ids=[3]) == asked(client, user)["arm"]
        assert {arm_of_score(user_id=user, item_ids=[3]) for user in range(20)} == {"control", *times}
        for _ in range(5):
            assert arm_of_score(item_ids=[3]) == arm_of_score(rows=[{"bid": 3.0}]) == "control"
        assert arm_of_score(user_id=1, item_ids=[3], experiment="twice") == "twice"
        assert arm_of_score(rows=[{"bid": 3.0}], experiment="once") == "once"
        assert arm_of_score(user_id=1, item_ids=[3], experiment="none") is None
        assert client.post("/v1/score", json={"item_ids": [3], "experiment": "twic"}).status_code == 422
        # Only lists are counted.
        assert sum(arm["lists"] for arm in client.get("/v1/experiment").json()["arms"]) == 20


def test_rewards_are_those_of_the_list_that_they_name(client: TestClient) -> None:
    split = [asked(client, user) for user in range(40)]
    asked(client, 5, experiment="varied")
    clicks = []
    for answer in split[:20]:
        event = {"user_id": 1, "item_id": ids(answer)[0], "labels": {"click": 1}, "impression_id": answer["request_id"]}
        # Only the first click of a list counts, and none that names no list.
        clicks += [event, event, {**event, "impression_id": None}, {**event, "impression_id": "x"}]
    clicks.append({"user_id": 1, "item_id": 1, "labels": {"click": 0}, "impression_id": split[30]["request_id"]})
    assert client.post("/v1/feedback", json={"events": clicks}).status_code == 201
    found = client.get("/v1/experiment").json()
    for arm in found["arms"]:
        mine = [answer["arm"] == arm["arm"] for answer in split]
        assert (arm["lists"], arm["users"], arm["rewarded"]) == (sum(mine), sum(mine), sum(mine[:20]))
        assert arm["rate"] == pytest.approx(sum(mine[:20]) / sum(mine))
    assert found["reward"] == "click" and 0.01 < found["shares_p_value"] <= 1
    metrics = client.get("/metrics").text
    assert f'fullrank_arm_rewarded_total{{arm="control"}} {found["arms"][1]["rewarded"]:.1f}' in metrics
    assert 'fullrank_arm_seconds_count{arm="varied"}' in metrics


def test_a_difference_between_arms_is_seen(live: Live) -> None:
    experiment = Experiment(live, {"better": (live, 0.5)}, "", "click")
    for user in range(4000):
        arm, counts = experiment.chosen(user, f"r{user}", None)
        assert counts
        experiment.answered([(arm, user, f"r{user}")])
        if user % 10 < (5 if arm == "better" else 2):
            assert experiment.rewarded([click(f"r{user}")]) == [arm]
    better, control = experiment.results()["arms"]
    assert better["p_value"] < 0.01 and better["low"] > 0 and better["low"] < 0.3 < better["high"]
    assert control["p_value"] is None and control["rate"] == pytest.approx(0.2, abs=0.03)


def test_several_processes_count_as_one(live: Live, tmp_path: Path) -> None:
    """Whoever answered, was told what came of it, or is asked."""
    draw = random.Random(0)
    alone = Experiment(live, {"new": (live, 0.4)}, "", "click")
    several = [Experiment(live, {"new": (live, 0.4)}, "", "click", tmp_path / "counts") for _ in range(3)]
    for number in range(0, 1200, 4):
        lists = []
        for place in range(number, number + draw.randint(1, 4)):
            user = draw.choice([None, draw.randrange(300)])
            lists.append((alone.chosen(user, f"r{place}", None)[0], user, f"r{place}"))
        events = [click(f"r{draw.randrange(1200)}", draw.choice([0, 1])) for _ in range(5)]
        events += [events[0], click(None)]
        for one in (alone, draw.choice(several)):
            one.answered(lists)
        assert alone.rewarded(events) == draw.choice(several).rewarded(events)
    expected = alone.results()
    assert 0 < expected["arms"][0]["rewarded"] < expected["arms"][0]["lists"]
    assert expected["arms"][0]["p_value"] is not None
    assert all(one.results() == expected for one in several)


@pytest.mark.parametrize("name", [None, "counts"])
def test_the_last_lists_are_waited_for_and_the_first_users_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    monkeypatch.setattr(arm_counts, "LISTS", 10)
    monkeypatch.setattr(arm_counts, "USERS", 5)
    counts = ArmCounts(1, name and tmp_path / name)
    for number in range(30):
        counts.answered([CountedList(number, 0, 7, number // 2 - 8)])
    assert counts.rewarded(range(30)) == [0] * 10
    (totals,) = counts.totals()
    assert totals.lists[7] == 30 and totals.rewarded[7] == 10 and totals.users == 5


@pytest.mark.skipif(sys.platform != "linux", reason="as --processes")
def test_a_process_that_is_killed_while_it_counts_holds_nobody_up(tmp_path: Path) -> None:
    counts = ArmCounts(1, tmp_path / "counts")
    counts.answered([CountedList(10, 0, 0, 1)])

    def killed() -> Iterator[CountedList]:
        yield CountedList(11, 0, 0, 2)
        os.kill(os.getpid(), signal.SIGKILL)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which do nothing here
        child = os.fork()
    if not child:
        try:
            ArmCounts(1, tmp_path / "counts").answered(killed())
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    begin = time.monotonic()
    counts.answered([CountedList(12, 0, 0, 3)])
    assert time.monotonic() - begin < 1
    # What was not finished is not there, and what was is.
    assert counts.rewarded([10, 11, 12]) == [0, 0]
    (totals,) = ArmCounts(1, tmp_path / "counts").totals()
    assert (totals.lists[0], totals.rewarded[0], totals.users) == (2, 2, 2)


def test_counts_that_cannot_be_written_cost_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    counts = ArmCounts(1, tmp_path / "counts")
    with closing(sqlite3.connect(tmp_path / "counts")) as other:
        other.execute("DROP TABLE lists")
    for number in range(3):
        counts.answered([CountedList(number, 0, 0, None)])
    assert [record.message for record in caplog.records] == [
        "what comes of the arms cannot be counted: no such table: lists"
    ]
    assert counts.totals()[0].lists[0] == 0


def test_items_change_in_every_arm(client: TestClient) -> None:
    client.post("/v1/items", json={"items": [{"item_id": 1000, "bid": 1e6}]})
    for name in ("control", "varied"):
        assert ids(asked(client, 3, experiment=name))[0] == 1000
    client.delete("/v1/items/1000")
    for name in ("control", "varied"):
        assert 1000 not in ids(asked(client, 3, experiment=name))


@pytest.mark.parametrize(
    ("arms", "text"),
    [
        ({"a": 0.5, "b": 0.5}, "nothing is left for the control"),
        ({"control": 0.5}, "is no name for an arm"),
        ({"a": 1.5}, "--arm a: the share is 1.5"),
    ],
)
def test_wrong_shares_are_one_line(live: Live, arms: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Experiment(live, {name: (live, share) for name, share in arms.items()}, "", "click")
