"""Facts about two-tower retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import save as to_safetensors
from torch.nn import functional as F

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset, write_dataset
from fullrank.data.importing import import_dataset
from fullrank.data.loader import partial_batch
from fullrank.embeddings.admitted import AdmittedTable
from fullrank.retrieval import Items, Popularity, TwoTower
from fullrank.retrieval.base import item_keys
from fullrank.retrieval.recent_clicks import best_clicks
from fullrank.retrieval.two_tower import positive_rows, sampled_softmax_loss
from fullrank.retrieval.vectors import VectorIndexSpec
from fullrank.schema import Categorical, Keys, Label, Schema


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


def test_popularity_weighs_what_ranks_later_clicks_best() -> None:
    """Nothing where vectors know who clicks what and popularity misleads, much where they know nothing."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.arange(1000)
    likes = torch.eye(1000)
    uneven = torch.multinomial(1 / torch.arange(1, 1001), 4000, replacement=True, generator=generator)
    even = torch.randint(500, 1000, (400,), generator=generator)
    known = best_clicks(torch.cat([uneven, even]), 4000, 3 * likes[even], (likes[even], even), (likes, keys))
    assert not known.scores_I.any()
    like_before = torch.multinomial(1 / torch.arange(1, 1001), 400, replacement=True, generator=generator)
    noise = torch.randn(400, 8, generator=generator), torch.randn(1000, 8, generator=generator)
    clicks = torch.cat([uneven, like_before])
    unknown = best_clicks(clicks, 4000, noise[0], (noise[1][like_before], like_before), (noise[1], keys))
    assert unknown(torch.tensor([0])) > 8 and unknown(torch.tensor([-5])) == 0


def test_clicks_of_long_ago_count_less_where_items_come_and_go() -> None:
    """The most clicked of all are clicked no more; what was clicked last goes on."""
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randint(0, 100, (3000,), generator=generator)]
    parts += [torch.randint(500, 560, (rows,), generator=generator) for rows in (600, 400)]
    keys_P, later = torch.cat(parts), parts[-1]
    noise = torch.randn(400, 4, generator=generator), torch.randn(1000, 4, generator=generator)
    clicks = best_clicks(keys_P, 3600, noise[0], (noise[1][later], later), (noise[1], torch.arange(1000)))
    assert clicks(torch.arange(500, 560)).mean() > 1.1 * clicks(torch.arange(100)).mean()


@pytest.fixture(scope="module")
def arbitrary(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Clicks that depend on the item alone: few and very popular ones of many."""
    rng = np.random.default_rng(0)
    weight = 1 / np.arange(1, 601)
    frame = pl.DataFrame(
        {
            "user": rng.integers(0, 300, 4000),
            "item": rng.choice(600, 4000, p=weight / weight.sum()),
            "clicked": 1,
            "time": np.arange(4000),
        }
    )
    path = tmp_path_factory.mktemp("arbitrary")
    frame.write_csv(path / "log.csv")
    features = (Categorical(name="user", role="user"), Categorical(name="item", role="item"))
    keys = Keys(user_id="user", item_id="item", timestamp="time")
    schema = Schema(features=features, labels=(Label(name="clicked"),), keys=keys)
    import_dataset("csv", path / "log.csv", path / "data", schema=schema)
    return Dataset.open(path / "data")


def test_it_is_no_worse_than_popularity_where_there_is_nothing_else(arbitrary: Dataset) -> None:
    catalogue = arbitrary.catalogue("item")
    items = Items(item_keys(catalogue["__item_id"]), partial_batch(catalogue, arbitrary.schema))
    users, keys_P = positive_rows(arbitrary, "test")

    def recall(retriever: Popularity | TwoTower) -> float:
        retriever.fit(arbitrary).index(items)
        return float((retriever.search(users, 50).item_keys_BK == keys_P[:, None]).any(1).double().mean())

    popularity = recall(Popularity(arbitrary.schema))
    assert recall(TwoTower(arbitrary.schema)) > popularity - 0.02
    assert recall(TwoTower(arbitrary.schema, TwoTower.Config(popularity=False))) < popularity - 0.03


def test_an_index_is_given_vectors_of_users_who_clicked_and_keeps_them(
    fitted: TwoTower, items: Items, tmp_path: Path
) -> None:
    assert fitted.typical_QD is not None and len(fitted.typical_QD) > 100
    assert bool((fitted.typical_QD[:, -1] == 1).all())  # the users', whose last number is that of the bias
    config = fitted.config.model_copy(update={"index": VectorIndexSpec.of({"name": "ivf", "exact_below": 10})})
    approximate = TwoTower(fitted.schema, config)
    approximate.towers, approximate.typical_QD = fitted.towers, fitted.typical_QD
    approximate.index(items)
    approximate.save(tmp_path)
    again = TwoTower.load(tmp_path, fitted.schema)
    for typical_QD in (again.typical_QD, again.vectors.typical_QD):
        assert typical_QD is not None and torch.equal(typical_QD, fitted.typical_QD)


def test_what_was_saved_before_popularity_opens_without_it(fitted: TwoTower, users: Batch, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    state = {name: value for name, value in fitted.state().items() if not name.startswith("clicks.")}
    (tmp_path / "retriever.safetensors").write_bytes(to_safetensors(state))
    old = TwoTower.load(tmp_path, fitted.schema)
    assert torch.equal(old.search(users, 10).item_keys_BK, fitted.search(users, 10).item_keys_BK)
    assert not len(old.clicks.keys_I)


def test_clicks_that_contradict_one_another_are_refused(fitted: TwoTower, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    state = fitted.state()
    state["clicks.keys"] = torch.tensor([3, 1])
    state["clicks.scores"] = torch.ones(2)
    (tmp_path / "retriever.safetensors").write_bytes(to_safetensors(state))
    with pytest.raises(ValueError, match="not in ascending order"):
        TwoTower.load(tmp_path, fitted.schema)


def test_a_log_without_times_that_lies_user_by_user_is_not_judged_by_its_last_users(tmp_path: Path) -> None:
    """Ids alone say nothing of users who have no other rows: only popularity would be left."""
    schema = Schema(
        features=(Categorical(name="user_id", role="user"), Categorical(name="item_id", role="item")),
        labels=(Label(name="click"),),
        keys=Keys(user_id="user_id", item_id="item_id"),
    )
    # As many users of each parity, and items whose popularity is uneven.
    random = np.random.default_rng(0)
    user = np.repeat(np.arange(60), 40)
    item = 2 * (random.geometric(0.1, len(user)) % 40) + user % 2
    frame = pl.DataFrame({"user_id": user, "item_id": item, "click": np.ones(len(user))})
    log = write_dataset(tmp_path / "log", schema, {"train": [frame]})
    config = TwoTower.Config(hidden=(), output_dim=8, batch_size=256, epochs=30, learning_rate=0.02)
    retriever = TwoTower(log.schema, config).fit(log)
    catalogue = log.catalogue("item")
    retriever.index(Items(item_keys(catalogue["__item_id"]), partial_batch(catalogue, log.schema)))
    users = log.catalogue("user")
    found = retriever.search(partial_batch(users, log.schema), 10).item_keys_BK
    parity = torch.from_numpy(users["__user_id"].cast(pl.Int64).to_numpy() % 2)
    assert float((found % 2 == parity[:, None]).double().mean()) > 0.95
