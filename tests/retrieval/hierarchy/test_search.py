"""Facts about the hierarchical index: what a search finds and costs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fullrank.retrieval.base import NO_ITEM
from fullrank.retrieval.exact import ExactIndex
from fullrank.retrieval.hierarchy import DotProduct, HierarchicalIndex, Selection, StaleIndexError

# Of the catalogue, see conftest.py.
WIDTH, NUM_NODES, FULL = 6, (8, 5), (8, 40)
Catalogue = Any


class Counted(DotProduct):
    """Counts the pairs that it scores."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.pairs: dict[int | None, int] = {}

    def node_scores(self, level: int, users: Tensor, nodes_MV: Tensor) -> Tensor:
        self.pairs[level] = self.pairs.get(level, 0) + users.shape[0] * nodes_MV.shape[0]
        return super().node_scores(level, users, nodes_MV)

    def item_scores(self, users: Tensor, vectors_ID: Tensor) -> Tensor:
        self.pairs[None] = self.pairs.get(None, 0) + users.shape[0] * vectors_ID.shape[0]
        return super().item_scores(users, vectors_ID)


class Distances(DotProduct):
    """Not an inner product: distances, weighed over levels; users are rows of a table that only it knows.

    What goes down is what each level said itself, and what decides is a weighted sum of that.
    """

    ensembles = True
    weights = (1.0, 0.5, 2.0)
    rows_worth_a_call = 40
    pairs_worth_a_call = 100
    pairs_at_once = 3000

    def __init__(self, table_UD: Tensor) -> None:
        super().__init__()
        self.table_UD = table_UD

    def count(self, users: list[int]) -> int:
        return len(users)

    def take(self, users: list[int], rows_U: Tensor) -> list[int]:
        return [users[row] for row in rows_U.tolist()]

    def node_scores(self, level: int, users: list[int], nodes_MV: Tensor) -> Tensor:
        return -torch.cdist(self.table_UD[users], nodes_MV)

    def item_scores(self, users: list[int], vectors_ID: Tensor) -> Tensor:
        assert len(users) * len(vectors_ID) <= self.pairs_at_once
        return -torch.cdist(self.table_UD[users], vectors_ID, p=1)

    def combined(self, level: int, scores_BIN: Tensor) -> Tensor:
        return scores_BIN @ torch.tensor(self.weights[: level + 1])


def everything(keys_I: Tensor, scores_BI: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Brute force: best first, ties by smaller key."""
    order = keys_I.argsort()
    scores, place = scores_BI[:, order].sort(dim=1, descending=True, stable=True)
    return keys_I[order][place[:, :k]], scores[:, :k]


@pytest.fixture(scope="module")
def index(catalogue: Catalogue) -> HierarchicalIndex:
    """Of three segments, with removed items."""
    index = HierarchicalIndex(NUM_NODES, catalogue.books, WIDTH)
    vectors, codes = catalogue.vectors_ID, catalogue.codes(catalogue.vectors_ID)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fullrank.retrieval.hierarchy.storage.SMALL_SEGMENT", 0)
        for begin, end in ((0, 1200), (1200, 1450), (1450, 1500)):
            index.add(catalogue.keys_I[begin:end], vectors[begin:end], codes[begin:end])
        gone = torch.cat([9000 + torch.arange(30), 8000 + torch.arange(3)])
        index.add(gone, vectors[:33], codes[:33])
        index.remove(gone)
    assert len(index) == 1500
    return index


def recall(found: Tensor, expected: Tensor) -> float:
    return float((found[:, :, None] == expected[:, None, :]).any(2).float().mean())


@pytest.mark.parametrize("scores_at_once", [4_000_000, 300])
def test_a_full_beam_is_brute_force(
    catalogue: Catalogue, index: HierarchicalIndex, users: Tensor, monkeypatch: pytest.MonkeyPatch, scores_at_once: int
) -> None:
    monkeypatch.setattr("fullrank.retrieval.exact.SCORES_AT_ONCE", scores_at_once)
    exact = ExactIndex(WIDTH)
    exact.add(catalogue.keys_I, catalogue.vectors_ID)
    expected = exact.search(users, 50)
    for found in (index.search(DotProduct(), users, 50, FULL), index.search_exact(DotProduct(), users, 50)):
        assert torch.equal(found.item_keys_BK, expected.item_keys_BK)
        assert torch.allclose(found.scores_BK, expected.scores_BK, atol=1e-5)


@pytest.mark.parametrize("scores_at_once", [4_000_000, 300])
def test_any_scorer_may_weigh_the_scores_of_all_levels(
    catalogue: Catalogue, index: HierarchicalIndex, users: Tensor, monkeypatch: pytest.MonkeyPatch, scores_at_once: int
) -> None:
    monkeypatch.setattr("fullrank.retrieval.exact.SCORES_AT_ONCE", scores_at_once)
    scorer = Distances(users)
    nodes = [-torch.cdist(users, vectors) for vectors in catalogue.nodes(catalogue.vectors_ID)]
    items = -torch.cdist(users, catalogue.vectors_ID, p=1)
    total_BI = nodes[0] + 0.5 * nodes[1] + 2 * items
    keys, scores = everything(catalogue.keys_I, total_BI, 20)
    found = index.search(scorer, list(range(9)), 20, FULL)
    assert torch.equal(found.item_keys_BK, keys)
    assert torch.allclose(found.scores_BK, scores, atol=1e-4)
    # A beam: the leaves that the weighted scores of both levels choose, then their items alone.
    codes = catalogue.codes(catalogue.vectors_ID)
    coarse = torch.stack([total for total in -torch.cdist(users, catalogue.books[0])])
    fine = coarse[:, :, None] * 1.0 + 0.5 * -torch.cdist(
        users, (catalogue.books[0][:, None] + catalogue.books[1]).flatten(0, 1)
    ).view(9, 8, 5)
    occupied = torch.zeros(8, 5, dtype=torch.bool)
    occupied[codes[:, 0], codes[:, 1]] = True
    kept = coarse.topk(3).indices
    mask = torch.zeros(9, 8, dtype=torch.bool).scatter_(1, kept, True)
    fine = fine.masked_fill(~(mask[:, :, None] & occupied), -torch.inf).flatten(1)
    leaves = torch.zeros(9, 40, dtype=torch.bool).scatter_(1, fine.topk(6).indices, True)
    inside_BI = leaves[:, codes[:, 0] * 5 + codes[:, 1]]
    keys, scores = everything(catalogue.keys_I, total_BI.masked_fill(~inside_BI, -torch.inf), 20)
    found = index.search(scorer, list(range(9)), 20, (3, 6))
    assert torch.equal(found.item_keys_BK, keys)


def test_a_user_alone_finds_what_it_finds_in_a_batch(index: HierarchicalIndex, users: Tensor) -> None:
    together = index.search(DotProduct(), users, 10, (3, 4))
    for row in range(9):
        alone = index.search(DotProduct(), users[row : row + 1], 10, (3, 4))
        assert torch.equal(alone.item_keys_BK[0], together.item_keys_BK[row])
        assert int(alone.cost_B) == int(together.cost_B[row])


def test_many_users_are_searched_in_parts(index: HierarchicalIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    many = torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(2))
    together = index.search(DotProduct(), many, 10, (3, 4))
    monkeypatch.setattr("fullrank.retrieval.exact.SCORES_AT_ONCE", 20_000)
    parts = copy.copy(index.search(DotProduct(), many, 10, (3, 4)))
    assert torch.equal(parts.item_keys_BK, together.item_keys_BK)
    assert torch.equal(parts.stats.nodes_BN, together.stats.nodes_BN)
    assert torch.equal(parts.cost_B, together.cost_B)


def test_candidates_are_nested_in_the_first_beam(catalogue: Catalogue, index: HierarchicalIndex, users: Tensor) -> None:
    """Later beams unbounded: what a narrow beam reaches a wider one reaches too, so recall cannot fall."""
    expected = index.search_exact(DotProduct(), users, 20).item_keys_BK
    before, share = set[tuple[int, int]](), 0.0
    for width in range(1, 9):
        found = index.search(DotProduct(), users, 1500, (width, 40), max_items=10**9)
        reached = {(row, key) for row in range(9) for key in found.item_keys_BK[row].tolist() if key != NO_ITEM}
        assert before < reached
        before = reached
        now = recall(index.search(DotProduct(), users, 20, (width, 40)).item_keys_BK, expected)
        assert now >= share
        share = now
    assert share == 1.0


@pytest.mark.parametrize("pairs_worth_a_call", [1, 10**9])
def test_what_is_said_to_be_scored_is_what_the_scorer_scored(
    catalogue: Catalogue, users: Tensor, pairs_worth_a_call: int
) -> None:
    """And equals the sizes of the kept leaves; pairs times the cost of a pair are the operations."""
    index, scorer = catalogue.index(), Counted()
    scorer.pairs_worth_a_call = pairs_worth_a_call
    found = index.search(scorer, users, 5, (3, 4))
    assert scorer.pairs[None] == int(found.stats.items_B.sum())
    assert [scorer.pairs[level] for level in range(2)] == found.stats.nodes_BN.sum(0).tolist()
    assert found.stats.flops == 2 * WIDTH * sum(scorer.pairs.values())
    codes, nodes = catalogue.codes(catalogue.vectors_ID), catalogue.nodes(catalogue.vectors_ID)
    for row in range(9):
        kept = (users[row] @ catalogue.books[0].T).topk(3).indices
        inside = torch.isin(codes[:, 0], kept)
        scores, leaf = users[row] @ nodes[1].T, codes[:, 0] * 5 + codes[:, 1]
        best = torch.unique(leaf[inside][scores[inside].argsort(descending=True)], return_inverse=False)
        by_leaf = {int(one): float(scores[leaf == one][0]) for one in best}
        chosen = sorted(by_leaf, key=lambda one: -by_leaf[one])[:4]
        assert int(found.cost_B[row]) == sum(int((leaf == one).sum()) for one in chosen)


def test_ties_go_to_the_smaller_key(make_catalogue: Callable[[int], Catalogue]) -> None:
    generator = torch.Generator().manual_seed(0)
    few = torch.randint(-1, 2, (900, WIDTH), generator=generator).float()
    catalogue = replace(make_catalogue(900), vectors_ID=few)
    queries = torch.randint(-1, 2, (12, WIDTH), generator=generator).float()
    for k in (1, 7, 200):
        found = catalogue.index().search_exact(DotProduct(), queries, k)
        assert torch.equal(found.item_keys_BK, everything(catalogue.keys_I, queries @ few.T, k)[0])


def test_a_certified_search_finds_the_best_without_scoring_all(
    make_catalogue: Callable[[int], Catalogue], users: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In tight clusters, with ties, norms of many sizes, removed items and a user without direction."""
    monkeypatch.setattr("fullrank.retrieval.hierarchy.certified.FIRST_ROWS", 30)
    generator = torch.Generator().manual_seed(0)
    catalogue = make_catalogue(1500)
    centres = catalogue.nodes(catalogue.vectors_ID)[1] * torch.rand(1500, 1, generator=generator).exp()
    vectors = centres + 0.03 * torch.randint(-1, 2, (1500, WIDTH), generator=generator)
    # Sixteenths, so that products are without rounding and ties are ties.
    vectors, users = (16 * vectors).round() / 16, (16 * users).round() / 16
    catalogue = replace(catalogue, vectors_ID=torch.cat([vectors[:1200], vectors[:300]]))
    index = catalogue.index()
    index.remove(catalogue.keys_I[700:800])
    left = torch.cat([torch.arange(700), torch.arange(800, 1500)])
    users = torch.cat([users, torch.zeros(1, WIDTH)])
    for k in (1, 20, 2000):
        expected, scores = everything(catalogue.keys_I[left], users @ catalogue.vectors_ID[left].T, k)
        found = index.search_exact(DotProduct(), users, k)
        assert torch.equal(found.item_keys_BK, expected)
        assert torch.allclose(found.scores_BK, scores, atol=1e-5)
        if k == 20:
            assert float(found.cost_B[:9].double().mean()) < 0.4 * 1500


def test_a_budget_of_items_keeps_the_best_leaves(catalogue: Catalogue, users: Tensor) -> None:
    """As many of them, best first, as fit; the best one though it does not."""
    index = catalogue.index()
    size = {width: index.search(DotProduct(), users, 1, (8, width)).cost_B for width in range(1, 41)}
    for budget in (1, 50, 300, 1500):
        found = index.search(DotProduct(), users, 5, FULL, max_items=budget)
        for row in range(9):
            fitting = [int(size[width][row]) for width in size if int(size[width][row]) <= budget]
            assert int(found.cost_B[row]) == max(fitting, default=int(size[1][row]))


def test_k_items_are_found_through_the_narrowest_beam(index: HierarchicalIndex, users: Tensor) -> None:
    found = index.search(DotProduct(), users, 800, (1, 1))
    assert bool(found.found_BK.all())
    assert index.search(DotProduct(), users, 9999, (1, 1)).item_keys_BK.shape == (9, 1500)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01, 0.001])
def test_a_filtered_search_finds_k_of_what_is_allowed(
    catalogue: Catalogue, index: HierarchicalIndex, users: Tensor, share: float
) -> None:
    allowed = catalogue.keys_I[torch.rand(1500, generator=torch.Generator().manual_seed(1)) < share]
    mask = torch.isin(catalogue.keys_I, allowed)
    total_BI = users @ catalogue.vectors_ID.T
    expected, scores = everything(catalogue.keys_I[mask], total_BI[:, mask], 10)
    unknown = torch.tensor([77777, NO_ITEM])
    allowed = torch.cat([allowed, unknown, allowed[:2]])
    for given in (allowed, allowed.expand(9, -1), Selection(allowed)):
        full = index.search(DotProduct(), users, 10, FULL, allowed=given)
        assert torch.equal(full.item_keys_BK, expected)
        assert torch.allclose(full.scores_BK, scores, atol=1e-5)
        narrow = index.search(DotProduct(), users, 10, (1, 1), allowed=given)
        assert narrow.item_keys_BK.shape == (9, min(10, int(mask.sum())))
        assert bool(torch.isin(narrow.item_keys_BK, allowed).all())


def test_a_selection_follows_the_index(catalogue: Catalogue, users: Tensor) -> None:
    index = catalogue.index()
    fresh, keys = 100 * users, 9000 + torch.arange(9)
    few, many = (
        Selection(torch.cat([catalogue.keys_I[:30], keys])),
        Selection(torch.cat([catalogue.keys_I[:900], keys])),
    )
    for selection, beam in ((few, (1, 1)), (many, FULL)):
        for _ in range(2):
            found = index.search(DotProduct(), users, 5, beam, allowed=selection)
            assert not bool(torch.isin(found.item_keys_BK, keys).any())
    index.add(keys, fresh, catalogue.codes(fresh))
    for selection, beam in ((few, (1, 1)), (many, FULL)):
        found = index.search(DotProduct(), users, 5, beam, allowed=selection)
        expected = index.search(DotProduct(), users, 5, beam, allowed=selection.keys_A)
        assert torch.equal(found.item_keys_BK, expected.item_keys_BK)
        assert bool(torch.isin(found.item_keys_BK, keys).any(1).all())


def test_who_is_allowed_less_than_k_gets_what_there_is(
    catalogue: Catalogue, index: HierarchicalIndex, users: Tensor
) -> None:
    own = torch.full((9, 12), NO_ITEM)
    own[0] = catalogue.keys_I[:12]
    own[3, :4] = catalogue.keys_I[20:24]
    found = index.search(DotProduct(), users, 8, (2, 2), allowed=own)
    assert found.found_BK.sum(1).tolist() == [8, 0, 0, 4, 0, 0, 0, 0, 0]
    assert torch.equal(found.scores_BK == -torch.inf, ~found.found_BK)
    assert set(found.item_keys_BK[3, :4].tolist()) == set(own[3, :4].tolist())
    for row in (0, 3):
        alone = index.search(DotProduct(), users[row : row + 1], 8, FULL, allowed=own[row])
        assert torch.equal(alone.item_keys_BK[0], found.item_keys_BK[row][found.found_BK[row]])


def test_an_empty_index_finds_nothing(catalogue: Catalogue, users: Tensor) -> None:
    index = HierarchicalIndex(NUM_NODES, catalogue.books, WIDTH)
    for found in (index.search(DotProduct(), users, 5, (1, 1)), index.search_exact(DotProduct(), users, 5)):
        assert found.item_keys_BK.shape == (9, 0)
    assert catalogue.index().search(DotProduct(), users[:0], 5, (1, 1)).item_keys_BK.shape == (0, 5)


def test_a_vector_of_each_prefix_serves_a_tree(catalogue: Catalogue, users: Tensor) -> None:
    """Given as they are, the sums along prefixes make the same index."""
    prefixes = (catalogue.books[0][:, None] + catalogue.books[1]).flatten(0, 1)
    index = HierarchicalIndex.build(
        catalogue.keys_I,
        catalogue.vectors_ID,
        catalogue.codes(catalogue.vectors_ID),
        num_nodes=NUM_NODES,
        node_vectors=[catalogue.books[0], prefixes],
    )
    found = [each.search(DotProduct(), users, 10, (3, 4)) for each in (index, catalogue.index())]
    assert torch.equal(found[0].item_keys_BK, found[1].item_keys_BK)


def test_saved_and_loaded_it_searches_alike(catalogue: Catalogue, users: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "index.safetensors"
    index = catalogue.index(version="a")
    index.save(path)
    again = HierarchicalIndex.load(path, version="a")
    for before, after in zip(
        index.search(DotProduct(), users, 9, (3, 4)), again.search(DotProduct(), users, 9, (3, 4)), strict=True
    ):
        assert torch.equal(before, after)
    with pytest.raises(StaleIndexError, match='is of version "a" of the model, expected "b"'):
        HierarchicalIndex.load(path, version="b")
    with pytest.raises(StaleIndexError, match='index is of version "a" of the model, the scorer of "b"'):
        again.search(DotProduct(version="b"), users, 9, (3, 4))
    assert again.search(DotProduct(version="a"), users, 9, (3, 4)).stats.model_version == "a"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="index.safetensors is missing or damaged"):
        HierarchicalIndex.load(path)


def test_tensors_that_contradict_one_another_are_refused(catalogue: Catalogue) -> None:
    state = catalogue.index().state()
    broken = {
        "tensor 'leaves'": {name: value for name, value in state.items() if name != "leaves"},
        "leaves of 3 items and keys of 1500": state | {"leaves": state["leaves"][:3]},
        "leaves that are none of the 40": state | {"leaves": state["leaves"] + 40 * 1024},
        "is given twice": state | {"keys": torch.zeros(1500, dtype=torch.int64)},
        "node vectors of level 1": state | {"nodes.1": state["nodes.1"][:2]},
    }
    for match, of in broken.items():
        with pytest.raises(ValueError, match=match):
            HierarchicalIndex.restore(of)


def test_wrong_input_is_told_in_one_line(
    catalogue: Catalogue, make_catalogue: Callable[[int], Catalogue], users: Tensor
) -> None:
    index, scorer = catalogue.index(), DotProduct()
    key, vector, code = torch.tensor([99999]), torch.zeros(1, WIDTH), torch.zeros(1, 2, dtype=torch.int64)
    for k in (0, -3):
        with pytest.raises(ValueError, match=f"k must be at least 1, got {k}"):
            index.search(scorer, users, k, (1, 1))
        with pytest.raises(ValueError, match=f"k must be at least 1, got {k}"):
            index.search_exact(scorer, users, k)
    for beam in ((1,), (1, 1, 1), (0, 4), (2, -1)):
        with pytest.raises(ValueError, match="expected 2 widths of at least 1"):
            index.search(scorer, users, 5, beam)
    with pytest.raises(ValueError, match="max_items must be at least 1, got 0"):
        index.search(scorer, users, 5, (1, 1), max_items=0)
    with pytest.raises(ValueError, match=f"item {int(catalogue.keys_I[4])} is in the index already"):
        index.add(catalogue.keys_I[4:5], vector, code)
    with pytest.raises(ValueError, match="item 99999 is given twice"):
        index.add(key.repeat(2), vector.repeat(2, 1), code.repeat(2, 1))
    with pytest.raises(ValueError, match="-1 is the key of no item"):
        index.add(torch.tensor([NO_ITEM]), vector, code)
    with pytest.raises(ValueError, match="item keys are torch.int32"):
        index.add(key.int(), vector, code)
    for number in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="row 0, the vector of item 99999, has a NaN or infinite number"):
            index.add(key, vector + number, code)
    with pytest.raises(ValueError, match=r"item vectors have shape \(1, 7\), expected \(1, 6\)"):
        index.add(key, torch.zeros(1, 7), code)
    with pytest.raises(ValueError, match="row 0 has 5 at level 1, expected 0 to 4"):
        index.add(key, vector, torch.tensor([[0, 5]]))
    with pytest.raises(ValueError, match=r"shape \(1, 3\), expected integers, 2 an item"):
        index.add(key, vector, torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(KeyError, match="item 99999 is not in the index"):
        index.remove(key)
    index.remove(key, missing="ignore")
    with pytest.raises(ValueError, match=r"num_nodes is \(8, 5\), more than there are items \(7\)"):
        make_catalogue(7).index()
    with pytest.raises(ValueError, match=r"node vectors of level 1 have shape \(4, 6\), expected 5 rows.*or 40"):
        HierarchicalIndex(NUM_NODES, [catalogue.books[0], catalogue.books[1][:4]], WIDTH)
    with pytest.raises(ValueError, match="node vectors of level 0: row 2 has a NaN"):
        HierarchicalIndex(
            NUM_NODES, [catalogue.books[0].index_fill(0, torch.tensor(2), torch.nan), catalogue.books[1]], 6
        )
    assert len(index) == 1500
    with pytest.warns(UserWarning, match="item vectors are torch.float64, stored as torch.float32"):
        index.add(key, vector.double(), code)
    assert len(index) == 1501


def test_a_score_that_is_no_number_is_refused(index: HierarchicalIndex, users: Tensor) -> None:
    with pytest.raises(ValueError, match="the scorer gave NaN for an item"):
        index.search_exact(DotProduct(), users * torch.nan, 5, scan=True)
    with pytest.raises(ValueError, match="the vector of user 0 has a NaN"):
        index.search_exact(DotProduct(), users * torch.nan, 5)
    with pytest.raises(ValueError, match="the scorer gave NaN for a node of level 0"):
        index.search(DotProduct(), users * torch.nan, 5, (2, 2))
