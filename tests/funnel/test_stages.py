"""Facts about funnels of other stages than one of each: no early one, several, and a retriever that finds little."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from torch import Tensor

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset
from fullrank.data.simulate import World
from fullrank.funnel import (
    Funnel,
    FunnelConfig,
    Request,
    StageSizes,
    evaluate_funnel,
    load_bundle,
    save_bundle,
    train_funnel,
)
from fullrank.funnel.report import render
from fullrank.funnel.true_value import true_value
from fullrank.models import Ranker, RankerSpec
from fullrank.retrieval import NO_ITEM, RETRIEVERS, Items, Popularity, Retriever, SearchResult, TwoTower, register
from fullrank.retrieval.exact import top_k
from fullrank.serving import create_app
from fullrank.training import TrainerConfig


class Uneven(Popularity):
    """Finds none, 3, 6 or 9 items for a user, by the first id of the user."""

    name = "uneven"

    @staticmethod
    def number(users: Batch) -> Tensor:
        return 3 * (users.ids_BF[:, 0] % 4)

    def search(self, users: Batch, k: int, *, allowed: Tensor | None = None) -> SearchResult:
        best = super().search(users, k)
        beyond_BK = torch.arange(best.item_keys_BK.shape[1]) >= self.number(users)[:, None]
        return SearchResult(
            best.item_keys_BK.masked_fill(beyond_BK, NO_ITEM),
            best.scores_BK.masked_fill(beyond_BK, -torch.inf),
            self.number(users),
        )


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    register(Uneven)
    yield
    RETRIEVERS.unregister("uneven")


def made(funnel: Funnel, early: Mapping[str, Ranker], sizes: StageSizes, retriever: Retriever | None = None) -> Funnel:
    made = funnel.with_parts(early=early, sizes=sizes, retriever=retriever or funnel.retriever)
    if retriever is not None:
        made.index_active()
    return made


@pytest.fixture(scope="module")
def uneven(funnel: Funnel, dataset: Dataset) -> Funnel:
    return made(funnel, funnel.early, StageSizes(retrieve=60, keep=5), Uneven(dataset.schema).fit(dataset))


@pytest.fixture(scope="module")
def several(funnel: Funnel, dataset: Dataset) -> Funnel:
    """An early-stage ranker, then one that scores pairs, whose weights are those of no training."""
    torch.manual_seed(0)
    linear = RankerSpec.of({"name": "lr", "embedding_init": 0.5}).build(dataset.schema)
    return made(funnel, {**funnel.early, "fine": linear}, StageSizes(retrieve=60, keep=(30, 10)))


def requests_of(funnel: Funnel, numbers: tuple[int, ...]) -> list[Request]:
    """Users for whom `Uneven` finds so many."""
    assert funnel.users is not None
    found = {int(Uneven.number(funnel.encode([Request(name)]))): Request(name) for name in funnel.users.ids}
    return [found[number] for number in numbers]


def test_a_user_with_fewer_candidates_gets_a_shorter_list(uneven: Funnel) -> None:
    numbers = (9, 3, 0, 6)
    requests = requests_of(uneven, numbers)
    together = uneven.recommend(requests, 8)
    for number, request, answer in zip(numbers, requests, together, strict=True):
        # A list of 8 widens the share of the early stage, which is 5.
        assert answer.candidates == {"retrieval": number, "early": number, "final": min(number, 8)}
        assert len(answer.items) == min(number, 8)
        alone = uneven.recommend([request], 8)[0]
        assert [item.item_id for item in answer.items] == [item.item_id for item in alone.items]
        popular = uneven.retriever.search(uneven.encode([request]), 60).item_keys_BK[0, :number]
        assert {item.item_id for item in answer.items} <= set(popular.tolist())


def test_no_place_without_an_item_is_scored(uneven: Funnel, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[int] = []
    hook = uneven.final.register_forward_pre_hook(lambda _, inputs: scored.append(len(inputs[0])))
    try:
        ranking = uneven.rank(uneven.encode(requests_of(uneven, (3, 0, 6))), 5)
    finally:
        hook.remove()
    assert sum(scored) == 3 + 0 + 5
    assert (ranking.items_UK >= 0).sum(1).tolist() == [3, 0, 5]
    assert torch.equal(ranking.items_UK >= 0, ranking.value_UK > -torch.inf)
    assert torch.equal(ranking.items_UK >= 0, ~ranking.probabilities_UKT[..., 0].isnan())
    monkeypatch.setattr("fullrank.funnel.funnel.PAIRS_AT_ONCE", 6)
    in_turn = uneven.rank(uneven.encode(requests_of(uneven, (3, 0, 6))), 5)
    assert torch.equal(in_turn.items_UK, ranking.items_UK)
    assert in_turn.counts() == ranking.counts()


def test_short_results_are_evaluated_saved_and_served(uneven: Funnel, dataset: Dataset, tmp_path: Path) -> None:
    report = evaluate_funnel(uneven, dataset, requests=60)
    assert 0 <= report["recall"]["final_at_10"] <= report["recall"]["early"] <= report["recall"]["retrieval"] < 1
    assert report["cost"]["largest"] == 9 and 0 < report["cost"]["mean"] < 9
    assert 0 < report["early_recall"]["top_10"] <= 1
    world = World.load(dataset.path / "world.npz")
    value = true_value(uneven, dataset, world, requests=30)
    assert 0 < value["funnel"] < value["best"]
    assert all(item["item_id"] >= 0 for sample in value["samples"] for item in sample["items"])
    save_bundle(uneven, tmp_path / "bundle")
    requests = requests_of(uneven, (3, 0, 6))
    opened = load_bundle(tmp_path / "bundle")
    assert isinstance(opened, Funnel)
    assert opened.recommend(requests, 8) == uneven.recommend(requests, 8)
    with TestClient(create_app(opened)) as client:
        answer = client.post("/v1/recommend", json={"user_id": requests[0].user_id, "k": 8}).json()
        assert len(answer["items"]) == 3 and answer["candidates"]["final"] == 3
        assert client.post("/v1/recommend", json={"user_id": requests[1].user_id}).json()["items"] == []


def test_without_early_stages_the_final_one_sorts_all_that_was_retrieved(funnel: Funnel, dataset: Dataset) -> None:
    bare = made(funnel, {}, StageSizes(retrieve=40))
    requests = [Request(3), Request("stranger")]
    ranking = bare.rank(bare.encode(requests), 10)
    _, values = bare.stage_values(bare.encode(requests))
    assert values.keys() == {"final"}
    assert torch.allclose(ranking.value_UK, top_k(values["final"], 10)[0])
    assert bare.recommend(requests, 10)[0].candidates == {"retrieval": len(funnel.items), "final": 40}
    report = evaluate_funnel(bare, dataset, requests=20)
    assert report["stages"].keys() == {"final"} and report["early_recall"] == {}
    assert "after the" not in render("bare", report, {})


def test_each_of_several_stages_sees_what_the_one_before_kept(several: Funnel) -> None:
    seen: list[str] = []
    users = several.encode([Request(3), Request("stranger")])
    ranking = several.rank(users, 5, lambda stage, _: seen.append(stage))
    assert seen == ["retrieval", "early", "fine", "final"]
    assert [rows.shape[1] for rows in ranking.passed.values()] == [60, 30, 10]
    retrieved_UC, values = several.stage_values(users)
    assert torch.equal(ranking.retrieved_UC, retrieved_UC)
    for user in range(2):
        value_of = {
            name: dict(zip(retrieved_UC[user].tolist(), v[user].tolist(), strict=True)) for name, v in values.items()
        }
        candidates = retrieved_UC[user].tolist()
        for stage, keep in (("early", 30), ("fine", 10), ("final", 5)):
            candidates = sorted(candidates, key=lambda row, stage=stage: -value_of[stage][row])[:keep]  # type: ignore[misc]
            passed = ranking.items_UK if stage == "final" else ranking.passed[stage]
            assert passed[user].tolist() == candidates
    assert several.recommend([Request(3)], 5)[0].candidates == {
        "retrieval": len(several.items),
        "early": 60,
        "fine": 30,
        "final": 10,
    }


def test_several_stages_are_evaluated_saved_and_served(several: Funnel, dataset: Dataset, tmp_path: Path) -> None:
    report = evaluate_funnel(several, dataset, requests=60)
    assert list(report["stages"]) == ["early", "fine", "final"]
    recall = report["recall"]
    assert recall["fine"] <= recall["early"] <= recall["retrieval"]
    page = render("several", report, {})
    assert "fine stage" in page and "after the fine stage" in page
    save_bundle(several, tmp_path / "bundle")
    assert (tmp_path / "bundle" / "fine.safetensors").is_file()
    opened = load_bundle(tmp_path / "bundle")
    assert isinstance(opened, Funnel)
    assert list(opened.early) == ["early", "fine"] and opened.sizes == several.sizes
    assert opened.recommend([Request(3)], 5) == several.recommend([Request(3)], 5)
    with TestClient(create_app(opened)) as client:
        client.post("/v1/recommend", json={"user_id": 3})
        assert 'stage="fine"' in client.get("/metrics").text
        assert "fine" in client.get("/").text


def test_what_cannot_be_loaded_is_not_saved(funnel: Funnel, dataset: Dataset, tmp_path: Path) -> None:
    class Mine(Popularity):
        name = "mine"

    class Other(Popularity):
        name = "two_tower"

    for kind, message in ((Mine, "it is not registered"), (Other, 'another class is registered as "two_tower"')):
        strange = made(funnel, funnel.early, funnel.sizes, kind(dataset.schema).fit(dataset))
        with pytest.raises(ValueError, match=f"{message}: .* register it with fullrank.retrieval.register"):
            save_bundle(strange, tmp_path / "bundle")
        assert list(tmp_path.iterdir()) == []


def config(**values: Any) -> FunnelConfig:
    return FunnelConfig.model_validate(values)


def test_a_recipe_may_leave_out_the_names_of_the_usual_kinds() -> None:
    short = config(
        retrieval={"epochs": 3},
        early={"model": {"hidden": [8]}, "training": {"epochs": 2}},
        sizes={"retrieve": 50, "keep": 7},
    )
    assert short == config(
        retrieval={"name": "two_tower", "epochs": 3},
        early=[
            {"name": "early", "model": {"name": "early_stage", "hidden": [8]}, "training": {"epochs": 2}, "keep": None}
        ],
        sizes={"retrieve": 50, "keep": 7},
    )
    assert short.early[0].training == TrainerConfig(epochs=2)
    assert short.retrieval.config == TwoTower.Config(epochs=3)
    assert config(retrieval=TwoTower.Config(epochs=3)).retrieval == short.retrieval
    assert short.stage_sizes == StageSizes(retrieve=50, keep=7)
    assert FunnelConfig.model_validate(short.model_dump()) == short


def test_a_stage_says_how_many_it_keeps_or_the_sizes_do() -> None:
    stages = [{"name": "coarse", "keep": 300}, {"name": "fine", "model": "dcn_v2", "keep": 50}]
    assert config(early=stages).stage_sizes.keep == (300, 50)
    del stages[1]["keep"]
    assert config(early=stages, sizes={"keep": [400, 60]}).stage_sizes.keep == (300, 60)
    assert config(early={"keep": 9}).stage_sizes.keep == 9
    assert config(early=[]).stage_sizes.keeps(0) == ()


def test_every_stage_of_a_recipe_is_trained(dataset: Dataset) -> None:
    training = {"batch_size": 512}
    funnel, results = train_funnel(
        dataset,
        config(
            retrieval="popularity",
            early=[
                {"name": "coarse", "training": training, "keep": 30},
                {"name": "fine", "model": {"name": "dcn_v2", "hidden": [8]}, "training": training, "keep": 10},
            ],
            final={"model": "lr", "training": training},
            sizes={"retrieve": 60},
        ),
    )
    assert results.keys() == {"coarse", "fine", "final"}
    assert [ranker.name for ranker in funnel.early.values()] == ["early_stage", "dcn_v2"]
    counts = {"retrieval": len(funnel.items), "coarse": 60, "fine": 30, "final": 10}
    assert funnel.recommend([Request(3)], 5)[0].candidates == counts


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"early": [{"name": "a", "keep": 3}, {"name": "b"}]}, "each of several early stages needs a keep"),
        ({"early": [{"name": "a"}, {"name": "a"}], "sizes": {"keep": [3, 2]}}, 'two stages are called "a"'),
        ({"early": {"name": "final"}}, 'a stage cannot be called "final"'),
        ({"early": {"name": "total"}}, 'a stage cannot be called "total"'),  # of the seconds of a run
        ({"early": {"name": "../x"}}, "is no name of a stage"),
        ({"sizes": {"keep": [3, 2]}}, "keep has 2 sizes for 1 early stages"),
        ({"early": {"model": {"name": "wukon"}}}, 'did you mean "wukong"'),
        ({"early": {"model": {"name": "lr", "hidden": [3]}}}, "early.0.model.hidden"),
        ({"final": {"model": {"name": "dcn_v2", "hidden": [-3]}}}, "final.model.hidden.0"),
        ({"retrieval": {"output_dim": 0}}, "retrieval.output_dim"),
        ({"retrieval": {"name": "popularity", "epochs": 3}}, "retrieval.epochs"),
    ],
)
def test_stages_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**values)


def test_items_outside_the_catalogue_are_no_candidates(funnel: Funnel, dataset: Dataset) -> None:
    retriever = Popularity(dataset.schema).fit(dataset)
    odd = made(funnel, funnel.early, StageSizes(retrieve=300, keep=300), retriever)
    retriever.add(Items(torch.tensor([10**6, -5]), funnel.items.rows.batch[:2]))
    answer = odd.recommend([Request(3)], 300)[0]
    assert sorted(map(str, (item.item_id for item in answer.items))) == sorted(map(str, funnel.items.ids))
    assert answer.candidates["final"] == len(funnel.items)
