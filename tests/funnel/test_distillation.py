"""Facts about distilling an early stage from the final one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset
from fullrank.data.loader import Loader
from fullrank.funnel import DistillConfig, Distilled, Funnel, FunnelConfig, train_funnel
from fullrank.funnel.catalogue import NO_ROW
from fullrank.funnel.distillation import (
    BID_OF,
    PLACE,
    SOFT,
    VALUE,
    CandidateLists,
    MixedBatches,
    candidate_lists,
    lists_of_batch,
)
from fullrank.funnel.rank_losses import RANK_LOSSES, listwise, pairwise
from fullrank.models import Ranker, RankerSpec
from fullrank.training import Callback, Trainer, TrainerConfig

FORMULA = "bid * click - 0.1 * hide"
DISTILL = DistillConfig(requests=40, candidates=24, random=0.25)
every_loss = pytest.mark.parametrize("name", RANK_LOSSES)


@pytest.fixture(scope="module")
def lists(funnel: Funnel, dataset: Dataset) -> CandidateLists:
    return candidate_lists(funnel, dataset, DISTILL)


def values(seed: int, lists: int = 5, places: int = 12) -> Tensor:
    return torch.randn(lists, places, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The losses of values


def test_the_list_wise_loss_is_zero_only_where_values_differ_by_a_constant() -> None:
    final = values(0)
    shifted = (final + torch.arange(5.0)[:, None]).requires_grad_()
    loss = listwise(final, shifted)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert shifted.grad is not None and float(shifted.grad.abs().max()) < 1e-12
    for other in (values(1), final + 0.01 * values(1), 2 * final):
        assert float(listwise(final, other)) > 1e-6


def test_the_list_wise_loss_is_a_divergence_of_two_softmaxes() -> None:
    final, early = values(0), values(1)
    expected = 0.0
    for final_C, early_C in zip(final.tolist(), early.tolist(), strict=True):
        mean = sum(final_C) / len(final_C)
        scale = math.sqrt(sum((value - mean) ** 2 for value in final_C) / len(final_C))
        p, q = ([math.exp(value / scale) for value in each] for each in (final_C, early_C))
        expected += sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    assert float(listwise(final, early)) == pytest.approx(expected / 5)


@every_loss
def test_a_constant_of_the_list_changes_nothing(name: str) -> None:
    loss, final, early, shift = RANK_LOSSES[name], values(0), values(1), torch.arange(5.0)[:, None]
    expected = float(loss(final, early, None))
    assert float(loss(final + shift, early - shift, None)) == pytest.approx(expected)
    # By default values are in units of their spread.
    assert float(loss(7 * final, 7 * early, None)) == pytest.approx(expected)


@every_loss
def test_places_without_a_candidate_and_lists_without_an_order_teach_nothing(name: str) -> None:
    loss, final, early = RANK_LOSSES[name], values(0), values(1)
    expected = float(loss(final, early, 0.5))
    wide = torch.cat([torch.full((5, 1), -torch.inf), final, torch.full((5, 2), -torch.inf)], 1)
    flat = torch.cat([wide, torch.full((1, 15), 3.7), torch.full((1, 15), -torch.inf)])
    flat[-1, 4] = 1.0
    student = torch.cat([torch.zeros(5, 1), early, torch.full((5, 2), 9.0)], 1)
    student = torch.cat([student, torch.randn(2, 15)]).requires_grad_()
    found = loss(flat, student, 0.5)
    assert float(found) == pytest.approx(expected)
    found.backward()
    assert student.grad is not None and bool((student.grad[flat == -torch.inf] == 0).all())
    assert bool((student.grad[5:] == 0).all()) and bool((student.grad[:5, 1:13] != 0).any())
    assert float(loss(flat[5:], student[5:], 0.5)) == 0


def test_the_pair_wise_loss_is_a_loop_over_pairs() -> None:
    final, early = values(0, 2, 6), values(1, 2, 6)
    expected = 0.0
    for final_C, early_C in zip(final.tolist(), early.tolist(), strict=True):
        order = sorted(range(6), key=lambda place: -early_C[place])
        discount = {place: 1 / math.log2(rank + 2) for rank, place in enumerate(order)}
        pairs = [(i, j) for i in range(6) for j in range(6) if final_C[i] > final_C[j]]
        weights = [(final_C[i] - final_C[j]) * abs(discount[i] - discount[j]) for i, j in pairs]
        losses = [math.log1p(math.exp(-(early_C[i] - early_C[j]) / 0.5)) for i, j in pairs]
        expected += sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert float(pairwise(final, early, 0.5)) == pytest.approx(expected / 2)


@every_loss
def test_following_a_loss_orders_a_list_as_the_final_stage_does(name: str) -> None:
    final = values(0)
    early = values(1).requires_grad_()
    optimizer = torch.optim.Adam([early], 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        RANK_LOSSES[name](final, early, None).backward()
        optimizer.step()
    assert torch.equal(early.argmax(1), final.argmax(1))
    assert float(torch.corrcoef(torch.stack([early.detach()[0], final[0]]))[0, 1]) > 0.9


# The candidates


def test_candidates_are_what_retrieval_hands_on_and_what_the_final_stage_says_of_it(
    funnel: Funnel, lists: CandidateLists
) -> None:
    assert lists.items_RC.shape == (40, 24) and len(lists) == 40
    users = lists.users.batch
    retrieved_RC, found = funnel.stage_values(users)
    for row in range(40):
        items = [item for item in lists.items_RC[row].tolist() if item != NO_ROW]
        value_of = dict(zip(retrieved_RC[row].tolist(), found["final"][row].tolist(), strict=True))
        assert len(set(items)) == len(items)
        # The first 18 are drawn from what is retrieved, and the funnel retrieves 60 of 100.
        assert set(items[:18]) <= value_of.keys()
        for item, value in zip(lists.items_RC[row, :18].tolist(), lists.value_RC[row, :18].tolist(), strict=True):
            assert value == pytest.approx(value_of[item], rel=1e-5)
    best = sum(len(set(retrieved_RC[row, :18].tolist()) & set(lists.items_RC[row].tolist())) for row in range(40))
    assert best < 40 * 14  # not the winners of retrieval, but a draw
    outside = ~(lists.items_RC[:, 18:, None] == retrieved_RC[:, None]).any(2) & (lists.items_RC[:, 18:] != NO_ROW)
    assert bool(outside.any())


def test_lists_are_the_same_for_the_same_seed(funnel: Funnel, dataset: Dataset, lists: CandidateLists) -> None:
    again, other = (candidate_lists(funnel, dataset, DISTILL, seed=seed) for seed in (0, 1))
    assert torch.equal(again.items_RC, lists.items_RC) and torch.equal(again.value_RC, lists.value_RC)
    assert not torch.equal(other.items_RC, lists.items_RC)


def test_a_batch_has_its_impressions_first_and_then_whole_lists(dataset: Dataset, lists: CandidateLists) -> None:
    mixed = MixedBatches(Loader(dataset, "train", 128, shuffle=True), lists, 5)
    plain = next(iter(Loader(dataset, "train", 128, shuffle=True)))
    batch = next(iter(mixed))
    chosen = lists.batch(lists_of_batch(len(lists), 0, 5, seed=0))
    assert len(batch) == 128 + len(chosen)
    assert torch.equal(batch[:128].ids_BF, plain.ids_BF) and torch.equal(batch[:128].labels_BT, plain.labels_BT)
    assert bool((batch.extra[PLACE][:128] == -1).all()) and bool(batch.extra[SOFT][:128].isnan().all())
    assert torch.equal(batch[128:].ids_BF, chosen.ids_BF) and bool(batch[128:].labels_BT.isnan().all())
    assert torch.equal(batch.extra[VALUE][128:], chosen.extra[VALUE])
    assert batch.extra[PLACE].max() < 5 * 24


def test_every_list_comes_as_often_as_any_other() -> None:
    seen = torch.cat([lists_of_batch(40, number, 7, seed=0) for number in range(40)])
    assert torch.equal(seen.bincount(minlength=40), torch.full((40,), 7))
    assert not torch.equal(seen[:40], seen[40:80])


# The learner


def learner(dataset: Dataset, **settings: object) -> Distilled:
    distill = DISTILL.model_copy(update=settings)
    torch.manual_seed(0)
    student = RankerSpec.of({"name": "early_stage", "embedding_init": 0.3})
    return Distilled(dataset.schema, Distilled.Config(student=student, distill=distill, value=FORMULA))


def judged_by(model: Ranker, batch: Batch, formula: Distilled) -> Batch:
    """The candidates of a batch with a ranker's own predictions in the place of the final stage's."""
    with torch.no_grad():
        soft = torch.sigmoid(model(batch).logits_BT)
    columns = {"click": soft[:, 0], "hide": soft[:, 1], "bid": batch.extra[BID_OF]}
    named = {label.name: soft[:, place] for place, label in enumerate(model.schema.labels)}
    return replace(batch, extra={**batch.extra, SOFT: soft, VALUE: formula.formula({**columns, **named})})


@pytest.mark.parametrize("rank", [None, "listwise"])
def test_who_is_its_own_teacher_has_nothing_to_learn(dataset: Dataset, lists: CandidateLists, rank: str | None) -> None:
    """Cross-entropy has its least at the teacher's probability, and the divergence of values is 0."""
    model = learner(dataset, rank=rank)
    batch = judged_by(model.student, lists.batch(torch.arange(6)), model)
    output = model(batch)
    assert float(model.losses(output, batch).rank) == pytest.approx(0, abs=1e-6)
    output.logits_BT.retain_grad()
    model.loss(output, batch).backward()
    assert output.logits_BT.grad is not None and float(output.logits_BT.grad.abs().max()) < 1e-7
    other = judged_by(learner(dataset, candidates=24).student, batch, model)
    other.extra[SOFT].mul_(0.5)
    moved = model(other)
    moved.logits_BT.retain_grad()
    model.loss(moved, other).backward()
    assert moved.logits_BT.grad is not None and float(moved.logits_BT.grad.abs().max()) > 1e-5


def test_the_loss_is_the_weighted_sum_of_its_parts(dataset: Dataset, lists: CandidateLists) -> None:
    model = learner(dataset, hard=0.5, soft=2.0, rank="pairwise", rank_weight=3.0)
    batch = next(iter(MixedBatches(Loader(dataset, "train", 128), lists, 5)))
    output = model(batch)
    parts = model.losses(output, batch)
    assert float(model.loss(output, batch)) == pytest.approx(
        0.5 * float(parts.hard) + 2 * float(parts.soft) + 3 * float(parts.rank)
    )
    impressions = batch[:128]
    expected = model.student.loss(model.student(impressions), impressions)
    assert float(parts.hard) == pytest.approx(float(expected), rel=1e-5)
    pairs = batch[128:]
    logits = model(pairs).logits_BT
    weights = torch.tensor([label.weight for label in dataset.schema.labels])
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, pairs.extra[SOFT], reduction="none")
    assert float(parts.soft) == pytest.approx(float((bce.mean(0) * weights).sum()), rel=1e-5)
    bare = replace(impressions, extra={})
    assert float(model.loss(model(bare), bare)) == pytest.approx(0.5 * float(expected), rel=1e-5)


class Killed(Exception):
    pass


class KillAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, step: int, loss: Tensor) -> None:
        if step == self.step:
            raise Killed


def test_a_run_that_was_killed_goes_on_to_the_same_weights(
    dataset: Dataset, lists: CandidateLists, tmp_path: Path
) -> None:
    config = TrainerConfig(batch_size=512, epochs=2, checkpoint_every=3)

    def fit(place: Path, *callbacks: Callback, resume: bool = False) -> dict[str, Tensor]:
        model = learner(dataset)
        batches = MixedBatches(Loader(dataset, "train", 512, shuffle=True), lists, 3)
        Trainer(config, callbacks=callbacks).fit(model, batches, run_directory=place, resume=resume)
        return model.student.state_dict()

    whole = fit(tmp_path / "whole")
    with pytest.raises(Killed):
        fit(tmp_path / "killed", KillAt(13))
    resumed = fit(tmp_path / "killed", resume=True)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_recipe_distils_a_stage_from_the_final_one(dataset: Dataset) -> None:
    """The rank loss alone, on enough lists, makes the stage order candidates as the final stage does."""
    training = {"batch_size": 256, "epochs": 2, "learning_rate": 5e-3}
    base = {
        "retrieval": "popularity",
        "final": {"model": {"name": "lr", "embedding_init": 0.3}, "training": training},
        "sizes": {"retrieve": 100, "keep": 10},
        "value": FORMULA,
    }
    kept = {}
    distill = {"requests": 500, "candidates": 50, "lists_per_batch": 10, "rank_weight": 10.0}
    for name, settings in {"alone": None, "distilled": distill}.items():
        early = {"training": {**training, "epochs": 4}, "distill": settings}
        funnel, results = train_funnel(dataset, FunnelConfig.model_validate({**base, "early": early}))
        assert list(results) == ["early", "final"] and funnel.early["early"].name == "early_stage"
        assert bool(results["early"].best) == (settings is None)
        users = candidate_lists(funnel, dataset, DistillConfig(requests=100), split="test").users.batch
        _, found = funnel.stage_values(users)
        best, first = (found[stage].argsort(1, descending=True)[:, :10] for stage in ("final", "early"))
        kept[name] = float((best[:, :, None] == first[:, None]).any(2).double().mean())
    assert kept["distilled"] > kept["alone"] + 0.02 and kept["distilled"] > 0.8


def test_what_makes_no_sense_is_refused(dataset: Dataset) -> None:
    for values in ({"candidates": 1}, {"rank": "best"}, {"temperature": 0}, {"random": 1.5}, {"soft": math.inf}):
        with pytest.raises(ValueError, match=f"early.0.distill.{next(iter(values))}"):
            FunnelConfig.model_validate({"early": {"distill": values}})
