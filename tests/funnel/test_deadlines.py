"""Facts about stages that are late or fail: what stands in for them, and that the answer says so."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from fullrank.data.dataset import Dataset
from fullrank.funnel import Funnel, FunnelConfig, Request, StageSizes, evaluate_funnel, load_bundle, save_bundle
from fullrank.funnel.deadline import behind
from fullrank.funnel.stages import FINAL
from fullrank.models import RankerSpec
from fullrank.serving import create_app

AT_ONCE = 8


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def slow(funnel: Funnel, dataset: Dataset, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Funnel]:
    """Two early stages, and a clock: retrieval takes 5 ms, `early` 1 ms, `fine` 1 ms and the final stage 2 ms for each
    8 candidates."""
    monkeypatch.setattr("fullrank.funnel.funnel.AT_ONCE", AT_ONCE)
    torch.manual_seed(0)
    fine = RankerSpec.of({"name": "lr", "embedding_init": 0.5}).build(dataset.schema)
    made = funnel.with_parts(
        retriever=copy.copy(funnel.retriever),
        early={**funnel.early, "fine": fine},
        sizes=StageSizes(retrieve=60, keep=(40, 20)),
    )
    made.clock = clock

    def taking(work: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def later(*arguments: Any) -> Any:
            done = work(*arguments)
            clock.now += seconds
            return done

        return later

    monkeypatch.setattr(made.retriever, "search", taking(made.retriever.search, 0.005))
    early = made.prepared["early"][0]
    monkeypatch.setattr(early, "score", taking(early.score, 0.001))
    hooks = [
        ranker.register_forward_hook(lambda *_, cost=cost: setattr(clock, "now", clock.now + cost))  # type: ignore[misc]
        for ranker, cost in ((fine, 0.001), (made.final, 0.002))
    ]
    yield made
    for hook in hooks:
        hook.remove()


def test_a_deadline_that_is_met_changes_nothing(slow: Funnel) -> None:
    users = slow.encode([Request(3), Request("stranger")])
    expected = slow.rank(users, 5)
    # 5 + 1 + five parts of `fine` + three of the final stage.
    found = slow.rank(users, 5, deadline_ms=5 + 1 + 5 + 6.001)
    assert expected.degraded == found.degraded == {}
    assert torch.equal(found.items_UK, expected.items_UK)
    assert torch.allclose(found.value_UK, expected.value_UK, atol=1e-6)


def test_a_late_final_stage_has_scored_the_best_of_the_stage_before(slow: Funnel, clock: Clock) -> None:
    users, begin = slow.encode([Request(3)]), clock.now
    whole = slow.rank(users, 20)
    begin = clock.now
    found = slow.rank(users, 20, deadline_ms=5 + 1 + 5 + 5)  # two of its three parts
    assert clock.now - begin <= 0.016 + 1e-9
    assert {stage: late.tolist() for stage, late in found.degraded.items()} == {FINAL: [True]}
    assert torch.equal(found.kept_UC, whole.kept_UC)
    first, rest = found.kept_UC[0, : 2 * AT_ONCE].tolist(), found.kept_UC[0, 2 * AT_ONCE :].tolist()
    value_of = dict(zip(whole.items_UK[0].tolist(), whole.value_UK[0].tolist(), strict=True))
    assert found.items_UK[0].tolist() == sorted(first, key=lambda row: -value_of[row]) + rest
    values = found.value_UK[0].tolist()
    assert values[:16] == pytest.approx([value_of[row] for row in found.items_UK[0, :16].tolist()], abs=1e-6)
    assert all(math.isnan(value) for value in values[16:])
    answer = slow.recommend([Request(3)], 20, deadline_ms=16)[0]
    assert answer.degraded == (FINAL,)
    assert [item.item_id for item in answer.items] == [slow.items.ids[row] for row in found.items_UK[0].tolist()]
    assert all(item.value is None and item.predictions == {} for item in answer.items[16:])


@pytest.mark.parametrize(
    ("deadlines", "total", "degraded"),
    [
        ({"early": 0.0}, None, ["early"]),
        ({"fine": 2.5}, None, ["fine"]),
        ({"early": 0.5, "final": 3.0}, None, ["final"]),  # one part is begun in time and ends late
        ({"retrieval": 4.0}, None, ["retrieval"]),
        ({}, 5.5, ["fine", "final"]),  # `early` is begun in time
        ({}, 4.0, ["retrieval", "early", "fine", "final"]),
        ({}, 0.0, ["retrieval", "early", "fine", "final"]),
    ],
)
def test_a_stage_that_cannot_finish_hands_on_what_it_was_handed(
    slow: Funnel, clock: Clock, deadlines: dict[str, float], total: float | None, degraded: list[str]
) -> None:
    slow.deadlines = deadlines
    users = slow.encode([Request(3), Request(5)])
    begin = clock.now
    found = slow.rank(users, 4, deadline_ms=total)
    assert list(found.degraded) == degraded
    assert found.degradations() == [degraded, degraded]
    retrieved, coarse, fine = found.passed.values()
    if "early" in degraded:
        assert torch.equal(coarse, retrieved[:, :40])
    if degraded[0] == "fine":
        # Two of its parts are scored; the unscored stay as they were, behind.
        assert torch.equal(fine[:, 16:], coarse[:, 16:20])
    if total is not None:
        assert torch.equal(found.items_UK, coarse[:, :4]) and bool(found.value_UK.isnan().all())
        assert clock.now - begin == pytest.approx({5.5: 0.006, 4.0: 0.005, 0.0: 0.0}[total])
    if total == 0:
        shown = slow.encoders.vocabularies["item_id"].id_counts
        place = [feature.name for feature in slow.schema.categorical].index("item_id")
        counts = shown[slow.items.rows.batch.ids_BF[retrieved[0], place]]
        assert (counts[:-1] >= counts[1:]).all() and found.cost_U.tolist() == [0, 0]


def test_a_stage_that_raises_is_named_and_stepped_over(slow: Funnel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no memory")

    users = slow.encode([Request(3)])
    monkeypatch.setattr(slow.early["fine"], "forward", broken)
    found = slow.rank(users, 5)
    assert list(found.degraded) == ["fine"]
    assert torch.equal(found.kept_UC, found.passed["early"][:, :20])
    assert bool(found.value_UK.isfinite().all())
    monkeypatch.setattr(slow.retriever, "search", broken)
    assert list(slow.rank(users, 5).degraded) == ["retrieval", "fine"]


def test_a_user_whose_predictions_are_all_nan_gets_the_order_of_the_stage_before(
    slow: Funnel, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = slow.encode([Request(3), Request(5)])
    expected = slow.rank(users, 5)
    whole = slow.final.forward

    def spoilt(batch: Any) -> Any:
        output = whole(batch)
        output.logits_BT[: len(batch) // 2] = torch.nan  # pairs of the first user
        return output

    monkeypatch.setattr(slow.final, "forward", spoilt)
    found = slow.rank(users, 5)
    assert found.degraded[FINAL].tolist() == [True, False]
    assert torch.equal(found.items_UK[0], found.kept_UC[0, :5])
    assert torch.equal(found.items_UK[1], expected.items_UK[1])


def test_what_was_not_scored_stands_behind_and_what_has_no_value_keeps_none() -> None:
    value = torch.tensor([[1e7, 3e6, torch.nan, torch.nan, -torch.inf], [torch.nan, torch.nan, 0.0, 0.0, 0.0]])
    scored = torch.tensor([[True, True, False, False, True], [False] * 5])
    found = behind(value, scored)
    assert found.argsort(1, descending=True).tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert found[0, 4] == -torch.inf and torch.equal(found[0, :2], value[0, :2])


def test_deadlines_are_in_the_bundle_and_old_bundles_have_none(funnel: Funnel, tmp_path: Path) -> None:
    timed = copy.copy(funnel)
    timed.deadlines = {"retrieval": 20.0, "final": 7.5}
    save_bundle(timed, tmp_path / "bundle")
    opened = load_bundle(tmp_path / "bundle")
    assert isinstance(opened, Funnel) and opened.deadlines == timed.deadlines
    manifest = tmp_path / "bundle" / "manifest.json"
    values = json.loads(manifest.read_text())
    del values["deadlines"]
    manifest.write_text(json.dumps(values))
    old = load_bundle(tmp_path / "bundle")
    assert isinstance(old, Funnel) and old.deadlines == {}
    for wrong, message in (({"coarse": 3}, 'a deadline is given for "coarse"'), ({"final": -1}, "at least 0")):
        manifest.write_text(json.dumps({**values, "deadlines": wrong}))
        with pytest.raises(ValueError, match=message):
            load_bundle(tmp_path / "bundle")


def test_a_recipe_gives_each_stage_its_deadline() -> None:
    values = {"early": {"deadline_ms": 2}, "final": {"deadline_ms": 9.5}, "retrieval_deadline_ms": 20}
    assert FunnelConfig.model_validate(values).deadlines == {"retrieval": 20.0, "early": 2.0, "final": 9.5}
    assert FunnelConfig().deadlines == {}
    with pytest.raises(ValueError, match=r"early\.0\.deadline_ms"):
        FunnelConfig.model_validate({"early": {"deadline_ms": 0}})


@pytest.mark.parametrize("deadline", [-1.0, math.nan, math.inf])
def test_a_deadline_is_a_time(funnel: Funnel, deadline: float) -> None:
    with pytest.raises(ValueError, match="expected a number of milliseconds, at least 0"):
        funnel.recommend([Request(3)], 5, deadline_ms=deadline)


def test_the_http_answer_says_what_was_late(funnel: Funnel) -> None:
    with TestClient(create_app(funnel)) as client:
        whole = client.post("/v1/recommend", json={"user_id": 3, "deadline_ms": 60_000}).json()
        assert whole["degraded"] == [] and len(whole["items"]) == 10
        late = client.post("/v1/recommend", json={"user_id": 3, "deadline_ms": 1e-6}).json()
        assert late["degraded"] == ["retrieval", "early", "final"]
        assert len(late["items"]) == 10 and late["items"][0]["value"] is None
        assert 'fullrank_stage_degraded_total{stage="final"} 1.0' in client.get("/metrics").text
        assert client.post("/v1/recommend", json={"deadline_ms": 0}).status_code == 422
        answer = client.get("/openapi.json").json()["components"]["schemas"]["RecommendResponse"]
        assert "degraded" in answer["properties"]


def test_what_is_evaluated_has_all_the_time_that_it_needs(slow: Funnel, dataset: Dataset, clock: Clock) -> None:
    users = slow.encode([Request(3), Request(5)])
    hurried = copy.copy(slow)
    hurried.deadlines = {FINAL: 1.0}
    assert hurried.rank(users, 5).degraded and not hurried.without_deadlines().rank(users, 5).degraded
    assert (
        evaluate_funnel(hurried, dataset, requests=20)["recall"]
        == evaluate_funnel(slow, dataset, requests=20)["recall"]
    )
    assert hurried.deadlines == {FINAL: 1.0}
