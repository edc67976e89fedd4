"""Facts about the lists of a funnel with a slate: exploration, rules, prices, in Python and over HTTP."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from fullrank.data.dataset import Dataset
from fullrank.funnel import (
    Funnel,
    Request,
    Shown,
    SlateConfig,
    StageSizes,
    ValueFormula,
    load_bundle,
    propensities,
    save_bundle,
)
from fullrank.funnel.slate_making import check_slate
from fullrank.schema import FIRST_VOCABULARY_ID
from fullrank.serving import create_app
from fullrank.training import run as runs


def with_slate(funnel: Funnel, slate: dict[str, Any], value: str | None = None) -> Funnel:
    return funnel.with_parts(
        value=value or funnel.value.text,
        sizes=StageSizes(retrieve=1000, keep=1000),
        slate=SlateConfig.model_validate(slate),
    )


def ids(funnel: Funnel, request: Request, k: int = 6) -> list[int | str]:
    return [item.item_id for item in funnel.recommend([request], k)[0].items if item.item_id is not None]


def feature_of(funnel: Funnel, name: str) -> dict[int | str, int]:
    place = [feature.name for feature in funnel.schema.categorical].index(name)
    return dict(zip(funnel.items.ids, funnel.items.rows.batch.ids_BF[:, place].tolist(), strict=True))


@pytest.fixture(scope="module")
def plain(funnel: Funnel) -> Funnel:
    return with_slate(funnel, {})


def test_by_default_nothing_is_drawn_or_priced(plain: Funnel) -> None:
    for item in plain.recommend([Request(3)], 10)[0].items:
        assert (item.propensity, item.payment) == (1.0, None)


@pytest.mark.parametrize("policy", [{"name": "epsilon", "epsilon": 0.5}, {"name": "thompson", "pseudo_counts": 5}])
def test_what_is_logged_is_the_propensity_of_the_list(funnel: Funnel, policy: dict[str, Any]) -> None:
    exploring = with_slate(funnel, {"policy": policy, "diversity": {"by": "category", "at_most": 2}})
    requests = [Request(user) for user in range(8)]
    drawn, again = (exploring.recommend(requests, 5, generator=torch.Generator().manual_seed(2)) for _ in range(2))
    assert drawn == again != exploring.recommend(requests, 5)
    users = exploring.encode(requests)
    items_UC, values = exploring.stage_values(users)
    row_of = {name: row for row, name in enumerate(exploring.items.ids)}
    listed_UK = torch.tensor(
        [[row_of[item.item_id] for item in answer.items if item.item_id is not None] for answer in drawn]
    )
    places_UK = (items_UC[:, None] == listed_UK[:, :, None]).int().argmax(2)
    make = exploring._make_slate
    spread_UC = None
    if make.policy.pseudo_counts is not None:
        with torch.inference_mode():
            logits_UCT = exploring._pair_logits(exploring.final, users, items_UC, True)
            spread_UC = make.scorer.spreads(logits_UCT, exploring._bid_I[items_UC], 5.0)
    chances = propensities(
        values["final"], places_UK, policy=make.policy, rules=make._rules(items_UC, None), spread_UC=spread_UC
    )
    logged = [[item.propensity for item in answer.items] for answer in drawn]
    torch.testing.assert_close(torch.tensor(logged, dtype=torch.float64), chances, rtol=1e-4, atol=1e-6)
    assert 0 < float(chances.min()) < 0.5


def test_ranking_without_a_generator_does_not_explore(funnel: Funnel, plain: Funnel) -> None:
    """What evaluation asks for: the same whenever it is asked."""
    exploring = with_slate(funnel, {"policy": {"name": "softmax", "temperature": 10}})
    users = plain.encode([Request(user) for user in range(5)])
    found, greedy = exploring.rank(users, 10), plain.rank(users, 10)
    assert torch.equal(found.items_UK, greedy.items_UK) and bool((found.propensity_UK == 1).all())


def test_the_spread_is_the_slope_times_that_of_the_probabilities(funnel: Funnel) -> None:
    scorer = with_slate(funnel, {}, "bid ** 2 * click * conversion - log1p(hide) + 0.5").scorer
    logits_BT = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double()
    bid_B = torch.linspace(0.1, 3, 40).double()
    with torch.inference_mode():
        spread_B = scorer.spreads(logits_BT, bid_B, 99)
    p_BT = torch.sigmoid(logits_BT)
    columns = {"bid": bid_B, **dict(zip(scorer.tasks, p_BT.unbind(1), strict=True))}
    variance_B = torch.zeros(40, dtype=torch.float64)
    for task, name in enumerate(scorer.tasks):
        step = {**columns, name: columns[name] + 1e-6}
        slope_B = (scorer.value(step) - scorer.value(columns)) / 1e-6
        variance_B += slope_B.square() * p_BT[:, task] * (1 - p_BT[:, task]) / 100
    torch.testing.assert_close(spread_B, variance_B.sqrt(), rtol=1e-4, atol=1e-9)
    assert not with_slate(funnel, {}, "bid").scorer.spreads(logits_BT, bid_B, 99).any()


def test_neighbours_differ_where_they_have_to(funnel: Funnel, plain: Funnel) -> None:
    category = feature_of(funnel, "category")
    diverse = with_slate(funnel, {"diversity": {"by": "category", "at_most": 1, "slots": 3}})
    listed = ids(diverse, Request(3), 12)
    assert listed != ids(plain, Request(3), 12) and len(listed) == 12
    kinds = [category[name] for name in listed]
    assert all(len(set(kinds[i : i + 3])) == 3 for i in range(10))
    assert len(ids(diverse, Request(3), 1000)) == len(funnel.items)


def test_what_was_shown_often_is_not_shown_again(funnel: Funnel, plain: Funnel) -> None:
    campaign = feature_of(funnel, "campaign")
    best = ids(plain, Request(3), 6)
    capped = with_slate(funnel, {"frequency": {"at_most": 2, "seconds": 3600}})
    assert ids(capped, Request(3), 6) == best
    once, twice = [Shown(best[0], 60.0)], [Shown(str(best[0]), 60.0), Shown(best[0], 3600.0)]
    assert ids(capped, Request(3, shown=[*once, Shown("never heard of")])) == best
    assert ids(capped, Request(3, shown=twice), 5) == best[1:]
    assert ids(capped, Request(3, shown=[*once, Shown(best[0], 3601.0)])) == best
    by_campaign = with_slate(funnel, {"frequency": {"by": "campaign", "at_most": 2}})
    everything = ids(by_campaign, Request(3), 1000)
    counts = [campaign[name] for name in everything if campaign[name] >= FIRST_VOCABULARY_ID]
    assert max(counts.count(one) for one in counts) == 2 and len(everything) < len(funnel.items)
    after = ids(by_campaign, Request(3, shown=twice), 1000)
    assert not any(campaign[name] == campaign[best[0]] for name in after)
    assert len(after) == len(everything) - 2


def test_an_item_pays_what_keeps_its_slot(funnel: Funnel) -> None:
    priced = with_slate(funnel, {"auction": {}}, "bid * click - 0.01 * hide")
    items = priced.recommend([Request(3)], 10)[0].items
    bid_of = dict(zip(priced.items.ids, priced.items.bid_I.tolist(), strict=True))  # type: ignore[union-attr]
    for item, below in pairwise(items):
        assert item.payment is not None and item.item_id is not None
        at_payment = item.payment * item.predictions["click"] - 0.01 * item.predictions["hide"]
        assert at_payment == pytest.approx(below.value, abs=1e-6)
        assert item.payment <= bid_of[item.item_id]


def test_users_in_turn_get_what_they_get_together(funnel: Funnel, monkeypatch: pytest.MonkeyPatch) -> None:
    slate = {"diversity": {"by": "brand", "at_most": 1}, "frequency": {"at_most": 1}, "auction": {"reserve": 0.9}}
    strict = with_slate(funnel, slate)
    requests = [Request(user, shown=[Shown(item) for item in range(user * 9)]) for user in range(6)]
    together = strict.recommend(requests, 60)
    assert len({len(answer.items) for answer in together}) > 1
    monkeypatch.setattr("fullrank.funnel.funnel.PAIRS_AT_ONCE", 2000)
    for one, other in zip(strict.recommend(requests, 60), together, strict=True):
        assert [item.item_id for item in one.items] == [item.item_id for item in other.items]
        payments = [item.payment for item in other.items]
        assert [item.payment for item in one.items] == pytest.approx(payments, abs=1e-4)


def test_a_bundle_keeps_the_slate_and_one_without_is_greedy(funnel: Funnel, plain: Funnel, tmp_path: Path) -> None:
    slate = {"policy": "softmax", "frequency": [{"at_most": 1}], "auction": {"slot_effects": [1, 0.5]}}
    save_bundle(with_slate(funnel, slate), tmp_path / "bundle")
    opened = load_bundle(tmp_path / "bundle")
    assert isinstance(opened, Funnel) and opened.slate == SlateConfig.model_validate(slate)
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    del manifest["slate"]
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps(manifest))
    older = load_bundle(tmp_path / "bundle")
    assert isinstance(older, Funnel)
    assert ids(older, Request(3)) == ids(plain, Request(3))


@pytest.mark.parametrize(
    ("slate", "value", "message"),
    [
        (
            {"diversity": {"by": "colour", "at_most": 1}},
            "click",
            'slate.diversity.by: "colour" is no single-id feature',
        ),
        ({"diversity": {"by": "price", "at_most": 1}}, "click", "there are item_id, category, brand, campaign"),
        ({"frequency": {"by": "device", "at_most": 1}}, "click", 'slate.frequency.by: "device" is no'),
        ({"auction": {}}, "bid ** 2 * click", "is not linear in the bid"),
        ({"auction": {}}, "min(bid, 2) * click", "is not linear in the bid"),
        ({"auction": {}}, "click / bid", "is not linear in the bid"),
        ({"auction": {}}, "click - hide", "does not rise with the bid"),
        ({"auction": {}}, "(click - hide) * bid", "does not rise with the bid"),
    ],
)
def test_a_slate_that_does_not_fit_is_refused(
    dataset: Dataset, slate: dict[str, Any], value: str, message: str
) -> None:
    config = SlateConfig.model_validate(slate)
    formula = ValueFormula(value, ["bid", "click", "conversion", "hide"])
    with pytest.raises(ValueError, match="slate") as caught:
        check_slate(config, dataset.schema, formula)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="slate") as caught:  # before anything is trained
        runs.run({"data": {"dataset": dataset.path}, "funnel": {"slate": slate, "value": value}})
    assert message in str(caught.value)
    without = dataset.schema.model_copy(update={"keys": dataset.schema.keys.model_copy(update={"bid": None})})
    with pytest.raises(ValueError, match="names no column of bids"):
        check_slate(SlateConfig.model_validate({"auction": {}}), without, formula)


def test_the_server_says_how_likely_and_what_price(funnel: Funnel) -> None:
    served = with_slate(
        funnel,
        {"policy": {"name": "epsilon", "epsilon": 0.5}, "frequency": {"at_most": 1}, "auction": {"reserve": 0.2}},
    )
    with TestClient(create_app(served)) as client:
        names = [item["item_id"] for item in client.post("/v1/recommend", json={"user_id": 3, "k": 50}).json()["items"]]
        body = {"user_id": 3, "k": 1000, "shown": [{"item_id": names[0]}, {"item_id": names[1], "seconds_ago": 9.5}]}
        items = client.post("/v1/recommend", json=body).json()["items"]
        assert items and not {item["item_id"] for item in items} & set(names[:2])
        assert all(0 < item["propensity"] <= 1 and item["payment"] >= 0.2 for item in items)
        assert min(item["propensity"] for item in items[:-1]) < 0.5
        again = client.post("/v1/recommend", json=body).json()["items"]
        assert [item["item_id"] for item in items] != [item["item_id"] for item in again]
        schemas = client.get("/openapi.json").json()["components"]["schemas"]
        assert {"propensity", "payment"} <= schemas["RecommendedItem"]["properties"].keys()
        for wrong in ([{"seconds_ago": 1}], [{"item_id": 1, "seconds_ago": "1"}], [1], {}):
            assert client.post("/v1/recommend", json={"shown": wrong}).status_code == 422
        for bid, reason in ((-1, "negative bid"), ("inf", "not a finite number"), ("-0.5", "negative bid")):
            answer = client.post("/v1/score", json={"rows": [{"bid": 1}, {"bid": bid}]})
            assert answer.status_code == 422
            assert answer.json()["detail"].startswith('row 2: column "bid" is ') and reason in answer.json()["detail"]


def test_bids_that_are_none_are_refused_where_values_are_made(funnel: Funnel) -> None:
    scorer = funnel.scorer
    with pytest.raises(ValueError, match="a bid is -0.5, expected a number >= 0"):
        scorer.values(torch.zeros(2, 3), torch.tensor([1.0, -0.5]))
    with pytest.raises(ValueError, match='row 2: column "bid" is NaN'):
        scorer.score([{"bid": 1.0}, {"bid": float("nan")}])
    assert scorer.score([{"bid": 1.0}, {}])[1].value is None
