"""Facts about the funnel as a whole: what its stages lose, what they cost, and which sizes are worth their cost."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fullrank.data.dataset import Dataset
from fullrank.data.simulate import World
from fullrank.funnel import Funnel, StageSizes, compare_funnels
from fullrank.funnel.cascade import evaluate_cascade
from fullrank.funnel.cost import Linear, fitted, flops_of, handed
from fullrank.funnel.outcomes import as_sizes, draw, front, outcomes, settings_within, sizes_of
from fullrank.funnel.stages import FINAL, RETRIEVAL
from fullrank.funnel.true_value import true_value, world_of
from fullrank.models import RankerSpec


def sized(funnel: Funnel, sizes: StageSizes) -> Funnel:
    changed = copy.copy(funnel)
    changed.sizes = sizes
    return changed


@pytest.fixture(scope="module")
def several(funnel: Funnel, dataset: Dataset) -> Funnel:
    torch.manual_seed(0)
    changed = sized(funnel, StageSizes(retrieve=60, keep=(30, 15)))
    changed.early = {**funnel.early, "fine": RankerSpec.of({"name": "lr", "embedding_init": 0.5}).build(dataset.schema)}
    return changed


@pytest.fixture(scope="module")
def world(dataset: Dataset) -> World:
    world = world_of(dataset)
    assert world is not None
    return world


def test_one_pass_says_of_every_size_what_the_funnel_does_with_it(several: Funnel, dataset: Dataset) -> None:
    asked = draw(dataset, "test", 12, 0)
    settings = [(60, 30, 15), (40, 20, 12), (25, 25, 11), (100, 100, 100), (40, 20), (12,)]
    found = outcomes(several, asked, settings, k=10)
    everything = several.items.active_I[None].expand(len(asked.users), -1)
    value_UN = several.values_of(FINAL, asked.users, everything)
    for place, setting in enumerate(settings[:4]):
        ranking = sized(several, as_sizes(setting)).rank(asked.users, 10)
        for row in range(len(asked.users)):
            best = everything[row, value_UN[row].topk(10).indices]
            kept = set(ranking.kept_UC[row].tolist())
            assert found.recall_RS[row, place] == pytest.approx(len(kept & set(best.tolist())) / 10)
            assert found.value_RS[row, place] == pytest.approx(float(ranking.value_UK[row].sum()), abs=1e-4)
            assert found.whole_R[row] == pytest.approx(float(value_UN[row].topk(10).values.sum()), abs=1e-4)
    assert (found.recall_RS[:, 3] == 1).all() and found.share(settings[3]) == pytest.approx(1.0)
    assert (found.recall_RS[:, 4] >= found.recall_RS[:, 1]).all()  # before the last cut
    assert found.true_RS is None


def test_what_is_lost_stage_by_stage_is_what_is_missing_from_the_best_list(
    funnel: Funnel, dataset: Dataset, world: World
) -> None:
    report = evaluate_cascade(funnel, dataset, requests=25, seed=1, world=world)
    stages, best = report["stages"], report["best"]["true_value"]
    assert list(stages) == ["retrieval", "early", "final"]
    assert report["whole"]["value"] - sum(stage["lost"] for stage in stages.values()) == pytest.approx(
        stages["final"]["value"]
    )
    earned = best - sum(stage["true_lost"] for stage in stages.values())
    judged = true_value(funnel, dataset, world, requests=25, seed=1)
    assert earned == pytest.approx(judged["funnel"]) == pytest.approx(stages["final"]["true_value"])
    assert best == pytest.approx(judged["best"])
    assert stages["retrieval"]["recall"] >= stages["early"]["recall"] == stages["final"]["recall"]
    assert 0 < stages["early"]["share"] <= stages["retrieval"]["share"] <= 1
    low, high = stages["early"]["intervals"]["value"]
    assert low < stages["early"]["value"] < high
    low, high = stages["early"]["intervals"]["share"]
    assert low < stages["early"]["share"] < high <= 1


def test_a_funnel_that_keeps_everything_loses_nothing(funnel: Funnel, dataset: Dataset) -> None:
    whole = sized(funnel, StageSizes(retrieve=500, keep=500))
    report = evaluate_cascade(whole, dataset, requests=5)
    for stage in report["stages"].values():
        assert (
            stage["recall"] == 1 and stage["share"] == pytest.approx(1) and stage["lost"] == pytest.approx(0, abs=1e-5)
        )
    assert "best" not in report and "true_lost" not in report["stages"]["final"]
    assert report["stages"]["early"]["flops"] == 0  # it drops nothing, and is not asked


def test_flops_are_those_of_matrix_products_of_the_candidates(several: Funnel, dataset: Dataset) -> None:
    users = draw(dataset, "test", 1, 0).users
    flops = flops_of(several, users)
    early, vectors = several.prepared["early"]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        early.score(users, vectors.whole()[None, :37])
    assert flops["early"](37) == pytest.approx(counter.get_total_flops())
    assert flops["early"].fixed > flops["early"].each > 0
    assert flops["fine"] == Linear(0.0, several.early["fine"].flops_per_example())
    assert flops[FINAL](15) == 15 * several.final.flops_per_example()
    width = several.retriever.width  # type: ignore[attr-defined]
    assert flops[RETRIEVAL].each == 0 and flops[RETRIEVAL].fixed > 2 * width * len(several.items)
    report = evaluate_cascade(several, dataset, requests=4)
    assert {name: stage["candidates"] for name, stage in report["stages"].items()} == {
        "retrieval": len(several.items),
        "early": 60,
        "fine": 30,
        "final": 15,
    }
    total = flops[RETRIEVAL](0) + flops["early"](60) + flops["fine"](30) + flops[FINAL](15)
    assert report["total"]["flops"] == pytest.approx(total)
    assert report["total"]["milliseconds"]["p50"] > 0


def test_a_stage_that_drops_nothing_costs_nothing() -> None:
    assert handed((1000, 200), 5000) == [1000, 200]
    assert handed((300, 300, 50), 5000) == [0, 300, 50]
    assert handed((1000, 200), 120) == [0, 120]
    assert handed((40,), 5000) == [40]


def test_the_front_has_no_setting_that_another_beats(funnel: Funnel, dataset: Dataset) -> None:
    settings = settings_within(funnel, most=60)
    assert len(settings) <= 60 and all(keep <= retrieve for retrieve, keep in settings)
    assert settings[0] == (10, 10) and settings[-1] == (len(funnel.items), len(funnel.items))
    found = outcomes(funnel, draw(dataset, "test", 6, 0), settings)
    costs = {setting: float(sum(handed(setting, 100))) for setting in settings}
    kept = front(found, costs)
    value = dict(zip(settings, found.value_RS.mean(0), strict=True))
    for cheap, dear in pairwise(kept):
        assert costs[cheap] < costs[dear] and value[cheap] < value[dear]
    for setting in settings:
        assert any(costs[one] <= costs[setting] and value[one] >= value[setting] for one in kept)
    assert sizes_of(sized(funnel, as_sizes((50, 20)))) == (50, 20)


def test_a_request_needs_no_more_memory_than_the_catalogue_has_items(funnel: Funnel, dataset: Dataset) -> None:
    rows: list[int] = []
    hook = funnel.final.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        outcomes(funnel, draw(dataset, "test", 7, 0), [(60, 20)])
    finally:
        hook.remove()
    assert sum(rows) == 7 * (len(funnel.items) + 60) and max(rows) <= len(funnel.items)


def test_a_line_through_times_has_no_negative_number() -> None:
    assert fitted({10: 3.0, 20: 5.0, 30: 7.0}) == Linear(pytest.approx(1.0), pytest.approx(0.2))
    assert fitted({10: 3.0, 20: 2.0}) == Linear(2.5, 0.0)
    steep = fitted({10: 1.0, 20: 4.0})
    assert steep.fixed == 0 and steep.each == pytest.approx(90 / 500)
    assert fitted({7: 3.0}) == Linear(3.0, 0.0)


def test_requests_are_drawn_from_all_rows(dataset: Dataset) -> None:
    asked = draw(dataset, "test", 10**6, 0)
    assert len(asked.users) == dataset.rows("test")
    assert torch.equal(draw(dataset, "test", 20, 3).users.ids_BF, draw(dataset, "test", 20, 3).users.ids_BF)
    assert not np.array_equal(draw(dataset, "test", 20, 3).users.ids_BF, draw(dataset, "test", 20, 4).users.ids_BF)


def test_two_funnels_are_compared_by_what_their_stages_leave(funnel: Funnel, dataset: Dataset, world: World) -> None:
    narrow = sized(funnel, StageSizes(retrieve=60, keep=6))
    report = compare_funnels(narrow, funnel, dataset, requests=500, world=world)["cascade"]
    assert report["requests"] == 25
    same, cut = report["recall"]["retrieval"], report["recall"]["early"]
    assert same["difference"] == 0 and same["interval"] == [0, 0]
    assert cut["verdict"] == "B is better" and cut["a"] <= 0.6
    whole = evaluate_cascade(funnel, dataset, requests=25, world=world)["stages"]["early"]
    assert cut["b"] == pytest.approx(whole["recall"])
    assert report["value"]["early"]["interval"][0] > 0
    assert report["true_value"]["list"]["b"] == pytest.approx(whole["true_value"])
    assert "true_value" not in compare_funnels(narrow, funnel, dataset, requests=40)["cascade"]
