"""Facts about every retriever, and about how they are named."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch

from fullrank.batch import Batch, RowGather
from fullrank.data.dataset import Dataset
from fullrank.retrieval import (
    NO_ITEM,
    RETRIEVERS,
    Items,
    Popularity,
    RetrieverSpec,
    TwoTower,
    item_keys,
    register,
)


@pytest.mark.parametrize("kind", RETRIEVERS)
def test_add_and_remove_equal_building_anew(kind: str, dataset: Dataset, items: Items, users: Batch) -> None:
    retriever = RETRIEVERS[kind](dataset.schema)
    if isinstance(retriever, Popularity):
        retriever.fit(dataset)

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
def test_saved_and_loaded_it_searches_alike(
    kind: str, dataset: Dataset, items: Items, users: Batch, tmp_path: Path
) -> None:
    retriever = RETRIEVERS[kind](dataset.schema)
    if isinstance(retriever, Popularity):
        retriever.fit(dataset)
    retriever.index(items)
    retriever.save(tmp_path)
    again = RETRIEVERS[kind].load(tmp_path, dataset.schema)
    for before, after in zip(retriever.search(users, 9), again.search(users, 9), strict=True):
        assert torch.equal(before, after)
    other = next(name for name in RETRIEVERS if name != kind)
    with pytest.raises(ValueError, match=f'of kind "{kind}", expected "{other}"'):
        RETRIEVERS[other].load(tmp_path, dataset.schema)


@pytest.mark.parametrize("kind", RETRIEVERS)
def test_k_zero_is_refused(kind: str, dataset: Dataset, users: Batch) -> None:
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        RETRIEVERS[kind](dataset.schema).search(users, 0)


@pytest.mark.parametrize("kind", [name for name in RETRIEVERS if RETRIEVERS[name].filters])
def test_only_allowed_items_are_found(kind: str, dataset: Dataset, items: Items, users: Batch) -> None:
    retriever = RETRIEVERS[kind](dataset.schema)
    retriever.index(items)
    every_other = items.keys_I[::2]
    found = retriever.search(users, 30, allowed=every_other)
    assert torch.equal(found.item_keys_BK.sort(1).values, every_other.sort().values.expand(len(users), -1))
    assert found.cost_B.tolist() == [15] * len(users)
    own = torch.full((len(users), 2), NO_ITEM)
    own[:, 0], own[0, 1] = items.keys_I[: len(users)], items.keys_I[20]
    found = retriever.search(users, 5, allowed=own)
    for row in range(len(users)):
        assert set(found.item_keys_BK[row][found.found_BK[row]].tolist()) == set(own[row].tolist()) - {NO_ITEM}


def test_a_spec_builds_the_retriever_that_it_names(dataset: Dataset) -> None:
    spec = RetrieverSpec.of({"name": "two_tower", "output_dim": 8})
    retriever = spec.build(dataset.schema)
    assert isinstance(retriever, TwoTower)
    assert retriever.config == TwoTower.Config(output_dim=8)
    assert RetrieverSpec.of(spec.model_dump()) == spec
    with pytest.raises(ValueError, match="hidden.0"):
        RetrieverSpec.of({"name": "two_tower", "hidden": [-3]})
    with pytest.raises(ValueError, match='retriever "two_towers" is unknown.*did you mean "two_tower"'):
        RetrieverSpec.of("two_towers")


def test_a_registered_retriever_is_saved_and_found_again(dataset: Dataset, items: Items, tmp_path: Path) -> None:
    """All that a retriever of one's own has to say: what it holds, and how it searches."""

    @register
    class Newest(Popularity):
        name = "newest"

        def _scores(self, keys_I: torch.Tensor) -> torch.Tensor:
            return keys_I.float()[:, None]

    try:
        retriever = RetrieverSpec.of("newest").build(dataset.schema)
        retriever.index(items)
        retriever.save(tmp_path)
        found = RETRIEVERS["newest"].load(tmp_path, dataset.schema).search(items.features[:1], 3)
        assert found.item_keys_BK.tolist() == [[29, 28, 27]]
    finally:
        RETRIEVERS.unregister("newest")


def test_text_ids_get_keys_that_never_change() -> None:
    assert item_keys(pl.Series(["a", "item 7"])).tolist() == item_keys(pl.Series(["a", "item 7"])).tolist()
    assert item_keys(pl.Series([5, 3])).tolist() == [5, 3]


def test_an_id_that_would_be_the_key_of_no_item_gets_another() -> None:
    keys_I = item_keys(pl.Series([-1, 0, 1]))
    assert keys_I[1:].tolist() == [0, 1]
    assert keys_I[0] not in (NO_ITEM, 0, 1)
