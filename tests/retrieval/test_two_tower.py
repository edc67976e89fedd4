"""Facts about two-tower retrieval."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch.nn import functional as F

from fullrank.batch import RowGather
from fullrank.data.dataset import Dataset, write_dataset
from fullrank.data.loader import partial_batch
from fullrank.retrieval import RETRIEVERS, Items, Popularity, TwoTower, item_keys
from fullrank.retrieval.exact import ExactIndex, top_k
from fullrank.retrieval.pairing import Pairing
from fullrank.retrieval.two_tower import sampled_softmax_loss
from fullrank.schema import Categorical, EventId, EventNumber, Keys, Label, MultiCategorical, Numeric, Schema, Sequence


def log_schema() -> Schema:
    return Schema(
        features=(
            Categorical(name="user_id", role="user"),
            Categorical(name="item_id", role="item"),
            Numeric(name="price", role="item", missing_indicator=True),
            MultiCategorical(name="tags", role="item"),
            Categorical(name="hour", role="context"),
            Numeric(name="age", role="user"),
            Sequence(name="history", fields=(EventId(name="item", table="item_id"), EventNumber(name="age"))),
        ),
        labels=(Label(name="click"),),
        keys=Keys(user_id="user_id", item_id="item_id", timestamp="time", bid="bid"),
    )


def log_frame(rows: int, seed: int, users: int = 12, items: int = 30) -> pl.DataFrame:
    """Users click on items of their own parity, and see three of each parity."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, users, rows), rng.integers(0, items, rows)
    lengths = rng.integers(0, 4, rows)
    return pl.DataFrame(
        {
            "user_id": [f"u{i}" for i in user],
            "item_id": item,
            "price": [None if i % 7 == 0 else float(i) for i in item],
            "tags": [[f"t{i % 2}", f"t{i % 5}"] if i % 3 else [] for i in item],
            "hour": rng.integers(0, 24, rows),
            "age": user.astype(float),
            "history.item": [list(rng.integers(0, items, n)) for n in lengths],
            "history.age": [list(rng.random(n)) for n in lengths],
            "click": ((user % 2) == (item % 2)).astype(int),
            "time": np.arange(rows),
            "bid": 1.0 + item % 3,
        },
        schema_overrides={"history.item": pl.List(pl.Int64), "history.age": pl.List(pl.Float64)},
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = tmp_path_factory.mktemp("log") / "dataset"
    return write_dataset(out, log_schema(), {"train": [log_frame(3000, 0)], "test": [log_frame(200, 1)]})


def items_of(dataset: Dataset) -> Items:
    catalogue = dataset.catalogue("item")
    return Items(item_keys(catalogue["__item_id"]), partial_batch(catalogue, dataset.schema))


@pytest.fixture(scope="module")
def fitted(dataset: Dataset) -> TwoTower:
    config = TwoTower.Config(hidden=(16,), output_dim=8, batch_size=256, epochs=20, learning_rate=0.01)
    retriever = TwoTower(dataset.schema, config).fit(dataset)
    retriever.index(items_of(dataset))
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


def test_exact_search_equals_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    # Few distinct numbers, so that ties are common.
    vectors = rng.integers(-1, 2, (503, 5)).astype(np.float32)
    queries = rng.integers(-1, 2, (20, 5)).astype(np.float32)
    keys = rng.permutation(2000)[:503]
    order = np.lexsort((keys[None, :].repeat(20, 0), -(queries @ vectors.T)), axis=1)
    for scores_at_once in (4_000_000, 700):
        monkeypatch.setattr("fullrank.retrieval.exact.SCORES_AT_ONCE", scores_at_once)
        index = ExactIndex(5)
        index.add(torch.from_numpy(keys), torch.from_numpy(vectors))
        for k in (1, 7, 100, 503):
            found, scores = index.search(torch.from_numpy(queries), k)
            assert np.array_equal(found.numpy(), keys[order[:, :k]])
            assert np.allclose(scores.numpy(), np.take_along_axis(queries @ vectors.T, order[:, :k], 1))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("levels", [1, 5, 100_000])
@pytest.mark.parametrize("count", [1000, 20_000])
def test_top_k_is_a_stable_sort_cut_off(rows: int, levels: int, count: int) -> None:
    """On the way for few scores, for one long row and for many, with all, many and hardly any ties."""
    generator = torch.Generator().manual_seed(levels)
    scores_BI = torch.randint(0, levels, (rows, count), generator=generator).float()
    # A few far larger scores at the end of one row, which a sample of it may miss.
    scores_BI[0, -7:] += 1e6
    for k in (1, 10, 500, count, count + 5):
        expected = torch.sort(scores_BI, dim=1, descending=True, stable=True)
        found, place_BK = top_k(scores_BI, k)
        assert torch.equal(found, expected.values[:, :k])
        assert torch.equal(place_BK, expected.indices[:, :k])


def test_k_beyond_the_catalogue_returns_all(fitted: TwoTower, dataset: Dataset) -> None:
    users = partial_batch(dataset.catalogue("user"), dataset.schema)
    found = fitted.search(users, 10_000).item_keys_BK
    assert found.shape == (12, 30)
    assert torch.equal(found.sort(1).values, torch.arange(30).expand(12, -1))


def test_k_zero_is_refused(fitted: TwoTower, dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        fitted.search(partial_batch(dataset.catalogue("user"), dataset.schema), 0)


def test_it_learns_who_clicks_what(fitted: TwoTower, dataset: Dataset) -> None:
    catalogue = dataset.catalogue("user")
    found = fitted.search(partial_batch(catalogue, dataset.schema), 10).item_keys_BK
    parity = torch.tensor([int(name[1:]) % 2 for name in catalogue["__user_id"]])
    assert float((found % 2 == parity[:, None]).float().mean()) > 0.95


@pytest.mark.parametrize("kind", RETRIEVERS)
def test_add_and_remove_equal_building_anew(kind: str, dataset: Dataset) -> None:
    retriever = RETRIEVERS[kind](dataset.schema)
    if isinstance(retriever, Popularity):
        retriever.fit(dataset)
    items, users = items_of(dataset), partial_batch(dataset.catalogue("user"), dataset.schema)

    def some(rows: torch.Tensor) -> Items:
        return Items(items.keys_I[rows], RowGather(items.features).take(rows))

    retriever.index(some(torch.arange(20, 30)))
    retriever.add(some(torch.arange(0, 15)))
    retriever.remove(items.keys_I[[3, 25]])
    changed = retriever.search(users, 23)
    retriever.index(some(torch.tensor([i for i in (*range(15), *range(20, 30)) if i not in (3, 25)])))
    anew = retriever.search(users, 23)
    assert retriever.cost() == 23
    assert torch.equal(changed.item_keys_BK, anew.item_keys_BK)
    assert torch.allclose(changed.scores_BK, anew.scores_BK, atol=1e-5)
    with pytest.raises(ValueError, match="item 5 is in the index already"):
        retriever.add(some(torch.tensor([5])))
    with pytest.raises(KeyError, match="item 25 is not in the index"):
        retriever.remove(items.keys_I[[25]])


@pytest.mark.parametrize("kind", RETRIEVERS)
def test_saved_and_loaded_it_searches_alike(kind: str, dataset: Dataset, tmp_path: Path) -> None:
    retriever = RETRIEVERS[kind](dataset.schema)
    if isinstance(retriever, Popularity):
        retriever.fit(dataset)
    retriever.index(items_of(dataset))
    retriever.save(tmp_path)
    again = RETRIEVERS[kind].load(tmp_path, dataset.schema)
    users = partial_batch(dataset.catalogue("user"), dataset.schema)
    for before, after in zip(retriever.search(users, 9), again.search(users, 9), strict=True):
        assert torch.equal(before, after)
    other = next(name for name in RETRIEVERS if name != kind)
    with pytest.raises(ValueError, match=f'of kind "{kind}", expected "{other}"'):
        RETRIEVERS[other].load(tmp_path, dataset.schema)


def test_popularity_ranks_by_clicks(dataset: Dataset) -> None:
    retriever = Popularity(dataset.schema).fit(dataset)
    retriever.index(items_of(dataset))
    clicks = dataset.scan("train").filter(pl.col("click") == 1).group_by("__item_id").len().collect()
    expected = clicks.sort(["len", "__item_id"], descending=[True, False])["__item_id"].to_list()
    users = partial_batch(dataset.catalogue("user"), dataset.schema)
    assert retriever.search(users, 5).item_keys_BK.tolist() == [expected[:5]] * 12


def test_a_vector_that_is_not_finite_is_refused() -> None:
    index = ExactIndex(2)
    with pytest.raises(ValueError, match="vector of item 8 has a NaN"):
        index.add(torch.tensor([7, 8]), torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]))


def test_text_ids_get_keys_that_never_change() -> None:
    assert item_keys(pl.Series(["a", "item 7"])).tolist() == item_keys(pl.Series(["a", "item 7"])).tolist()
    assert item_keys(pl.Series([5, 3])).tolist() == [5, 3]


def rows_equal(batch: object, other: object) -> None:
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(getattr(other, name))), name


def test_pairs_hold_the_columns_of_user_and_item(dataset: Dataset) -> None:
    """Pairing the rows of a log with themselves gives the log back, in any order and multiplicity."""
    frame = dataset.scan("test").collect().drop("__timestamp", "__user_id")
    whole = RowGather(partial_batch(frame.drop("click"), dataset.schema))
    pairing = Pairing.of(dataset.schema)
    rows = torch.randint(0, 200, (333,), generator=torch.Generator().manual_seed(0))
    rows_equal(pairing(whole, rows, whole, rows), whole.take(rows))
    # One user against many items goes another way through the code.
    one = RowGather(whole.batch[17:18])
    pairs = pairing(one, torch.zeros(333, dtype=torch.int64), whole, rows)
    rows_equal(pairs, pairing(whole, torch.full((333,), 17), whole, rows))
