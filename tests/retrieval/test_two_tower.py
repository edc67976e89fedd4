"""Facts about two-tower retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset
from fullrank.data.loader import partial_batch
from fullrank.embeddings.admitted import AdmittedTable
from fullrank.retrieval import Items, TwoTower
from fullrank.retrieval.two_tower import sampled_softmax_loss


@pytest.fixture(scope="module")
def fitted(dataset: Dataset, items: Items) -> TwoTower:
    config = TwoTower.Config(hidden=(16,), output_dim=8, batch_size=256, epochs=20, learning_rate=0.01)
    retriever = TwoTower(dataset.schema, config).fit(dataset)
    retriever.index(items)
    return retriever


ITEMS = 200


@pytest.fixture(scope="module")
def joint_UI() -> torch.Tensor:
    """A known distribution of clicks over 4 users and 200 items of very unequal popularity."""
    generator = torch.Generator().manual_seed(0)
    popularity_I = -0.7 * torch.arange(1, ITEMS + 1).log()
    return torch.softmax((torch.randn(4, ITEMS, generator=generator) + popularity_I).flatten(), 0).view(4, ITEMS)


def trained_scores(joint_UI: torch.Tensor, *, corrected: bool) -> torch.Tensor:
    """A free score for each (user, item), trained on clicks drawn from the distribution."""
    generator = torch.Generator().manual_seed(1)
    marginal_I = joint_UI.sum(0)
    scores_UI = torch.zeros(4, ITEMS, requires_grad=True)
    optimizer = torch.optim.Adam([scores_UI], lr=0.1)
    steps = 2500
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    one_hot_II = torch.eye(ITEMS)
    for _ in range(steps):
        pair = torch.multinomial(joint_UI.flatten(), 16, replacement=True, generator=generator)
        user, item = pair // ITEMS, pair % ITEMS
        loss = sampled_softmax_loss(scores_UI[user], one_hot_II[item], item, marginal_I[item] if corrected else None)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return scores_UI.detach()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Over the 40 most popular items, each user's mean taken away: softmax does not see it."""
    a, b = a[:, :40] - a[:, :40].mean(1, keepdim=True), b[:, :40] - b[:, :40].mean(1, keepdim=True)
    return float((a * b).sum() / (a.norm() * b.norm()))


def test_corrected_scores_converge_to_the_probability_of_the_item_given_the_user(joint_UI: torch.Tensor) -> None:
    scores_UI = trained_scores(joint_UI, corrected=True)
    conditional_UI = joint_UI / joint_UI.sum(1, keepdim=True)
    assert correlation(scores_UI, conditional_UI.log()) > 0.97


def test_uncorrected_scores_lean_to_pointwise_mutual_information(joint_UI: torch.Tensor) -> None:
    scores_UI = trained_scores(joint_UI, corrected=False)
    conditional_UI = joint_UI / joint_UI.sum(1, keepdim=True)
    information_UI = (conditional_UI / joint_UI.sum(0)).log()
    assert correlation(scores_UI, information_UI) > correlation(scores_UI, conditional_UI.log())


def test_equal_frequencies_change_nothing() -> None:
    torch.manual_seed(1)
    user, item, keys = torch.randn(9, 4), torch.randn(9, 4), torch.arange(9)
    plain = sampled_softmax_loss(user, item, keys)
    assert torch.allclose(plain, sampled_softmax_loss(user, item, keys, torch.full((9,), 0.03)))


def test_rare_items_get_the_correction_of_the_paper() -> None:
    """For B q much below 1, log Q = log q + log B, and the constant drops out."""
    torch.manual_seed(1)
    user, item, frequency = torch.randn(9, 4), torch.randn(9, 4), 1e-6 * torch.rand(9)
    expected = F.cross_entropy(user @ item.T - frequency.log(), torch.arange(9))
    assert torch.allclose(sampled_softmax_loss(user, item, torch.arange(9), frequency), expected, atol=1e-4)


def test_a_batch_with_every_item_gives_the_full_softmax() -> None:
    torch.manual_seed(2)
    user, items = torch.randn(70, 4), torch.randn(7, 4)
    own = torch.arange(70) % 7
    expected = F.cross_entropy(user @ items.T, own)
    assert torch.allclose(sampled_softmax_loss(user, items[own], own, torch.full((70,), 1 / 7)), expected)


def test_another_row_with_the_same_item_is_no_negative() -> None:
    torch.manual_seed(3)
    user, item = torch.randn(3, 4), torch.randn(3, 4)
    item[2] = item[0]
    expected = F.cross_entropy(user @ item[:2].T, torch.tensor([0, 1, 0]))
    assert torch.allclose(sampled_softmax_loss(user, item, torch.tensor([5, 6, 5])), expected)


def test_k_beyond_the_catalogue_returns_all(fitted: TwoTower, users: Batch) -> None:
    found = fitted.search(users, 10_000).item_keys_BK
    assert found.shape == (12, 30)
    assert torch.equal(found.sort(1).values, torch.arange(30).expand(12, -1))


def test_it_learns_who_clicks_what(fitted: TwoTower, dataset: Dataset) -> None:
    catalogue = dataset.catalogue("user")
    found = fitted.search(partial_batch(catalogue, dataset.schema), 10).item_keys_BK
    parity = torch.tensor([int(name[1:]) % 2 for name in catalogue["__user_id"]])
    assert float((found % 2 == parity[:, None]).float().mean()) > 0.95


TABLES: dict[str, dict[str, Any]] = {
    "user_id": {"kind": "quotient_remainder", "collisions": 3},
    "item_id": {"kind": "admitted", "capacity": 25, "admit_after": 1},
}


def test_tables_of_any_kind_learn_and_are_saved(dataset: Dataset, items: Items, users: Batch, tmp_path: Path) -> None:
    config = TwoTower.Config(hidden=(16,), output_dim=8, batch_size=256, epochs=20, learning_rate=0.01, tables=TABLES)
    retriever = TwoTower(dataset.schema, config).fit(dataset)
    retriever.index(items)
    kinds = retriever.towers.ids.kinds
    assert {name: kind.config.kind for name, kind in kinds.items()} == {
        "user_id": "quotient_remainder", "item_id": "admitted"
    }  # fmt: skip
    table = kinds["item_id"]
    assert isinstance(table, AdmittedTable) and table.live_ids().numel() == 25
    catalogue = dataset.catalogue("user")
    found = retriever.search(partial_batch(catalogue, dataset.schema), 10).item_keys_BK
    parity = torch.tensor([int(name[1:]) % 2 for name in catalogue["__user_id"]])
    assert float((found % 2 == parity[:, None]).double().mean()) > 0.75
    retriever.save(tmp_path / "saved")
    again = TwoTower.load(tmp_path / "saved", dataset.schema)
    for ours, theirs in zip(retriever.search(users, 10), again.search(users, 10), strict=True):
        assert torch.equal(ours, theirs)


def test_tables_that_cannot_be_are_refused(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match='tables: there is no table "itm"; the schema has user_id'):
        TwoTower(dataset.schema, TwoTower.Config(tables={"itm": "full"}))
