"""Facts about exact search."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fullrank.retrieval import NO_ITEM
from fullrank.retrieval.exact import ExactIndex, top_k


def test_exact_search_equals_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    # Few distinct numbers, so that ties are common.
    vectors = rng.integers(-1, 2, (503, 5)).astype(np.float32)
    queries = rng.integers(-1, 2, (20, 5)).astype(np.float32)
    keys = rng.permutation(2000)[:503]
    order = np.lexsort((keys[None, :].repeat(20, 0), -(queries @ vectors.T)), axis=1)
    for scores_at_once in (4_000_000, 700):
        monkeypatch.setattr("fullrank.retrieval.vectors.scan.SCORES_AT_ONCE", scores_at_once)
        index = ExactIndex(5)
        index.add(torch.from_numpy(keys), torch.from_numpy(vectors))
        for k in (1, 7, 100, 503):
            found, scores, cost_B = index.search(torch.from_numpy(queries), k)
            assert cost_B.tolist() == [503] * 20
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


def test_a_vector_that_is_not_finite_is_refused() -> None:
    index = ExactIndex(2)
    with pytest.raises(ValueError, match="vector of item 8 has a NaN"):
        index.add(torch.tensor([7, 8]), torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]))


@pytest.mark.parametrize("scores_at_once", [4_000_000, 40])
def test_a_filtered_search_is_a_search_of_what_is_allowed(monkeypatch: pytest.MonkeyPatch, scores_at_once: int) -> None:
    """For all queries or for each its own; who has fewer than k gets what there is, and no item behind it."""
    monkeypatch.setattr("fullrank.retrieval.vectors.scan.SCORES_AT_ONCE", scores_at_once)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randperm(500, generator=generator)[:90]
    index, queries = ExactIndex(4), torch.randn(3, 4, generator=generator)
    index.add(keys, torch.randn(90, 4, generator=generator))
    own = torch.full((3, 40), NO_ITEM)
    own[0, :40], own[1, :7] = keys[torch.randperm(90, generator=generator)[:40]], keys[3:10]
    own[2, :2] = torch.tensor([1000, 2000])  # not indexed
    found = index.search(queries, 12, allowed=own)
    assert found.found_BK.sum(1).tolist() == [12, 7, 0]
    assert torch.equal(found.scores_BK == -torch.inf, ~found.found_BK)
    everything = index.search(queries, 90)
    for row in range(3):
        order = everything.item_keys_BK[row]
        expected = order[torch.isin(order, own[row])][:12]
        assert torch.equal(found.item_keys_BK[row][found.found_BK[row]], expected)
        alone = index.search(queries[row : row + 1], 12, allowed=own[row])
        assert torch.equal(alone.item_keys_BK[0], expected)
        assert alone.cost_B.tolist() == [int(torch.isin(keys, own[row]).sum())]


def test_the_key_of_no_item_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 is the key of no item"):
        ExactIndex(2).add(torch.tensor([NO_ITEM]), torch.zeros(1, 2))


@pytest.mark.parametrize("count", [400, 30_000])
def test_changes_beside_a_large_index_are_as_if_it_were_made_anew(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Whatever comes and goes, also again, with ties, filters, forks and more changes than are kept beside."""
    for name, value in (("LARGE", 100), ("MOST_BESIDE", 60), ("SPARE", 2)):
        monkeypatch.setattr(f"fullrank.retrieval.exact.{name}", value)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    known = dict.fromkeys(rng.permutation(3 * count)[:count].tolist())
    known = {key: torch.randint(-2, 3, (4,), generator=generator).float() for key in known}
    queries = torch.randint(-2, 3, (5, 4), generator=generator).float()
    index = ExactIndex(4)
    index.add(torch.tensor(list(known)), torch.stack(list(known.values())))
    first = index.scan.vectors_ID.data_ptr()
    stayed, before = 0, (index.fork(), dict(known))
    for _ in range(14):
        index = index.fork()
        # The best of a query go first, so that what is asked for beyond them is needed.
        best = index.search(queries[:1], 9).item_keys_BK[0]
        index.remove(best)
        gone = {key: known.pop(key) for key in best.tolist()}
        come = {
            int(key): torch.randint(-2, 3, (4,), generator=generator).float()
            for key in rng.integers(3 * count, 4 * count, 5)
        }
        come |= dict(list(gone.items())[:2])
        come = {key: vector for key, vector in come.items() if key not in known}
        index.add(torch.tensor(list(come)), torch.stack(list(come.values())))
        known |= come
        stayed += index.scan.vectors_ID.data_ptr() == first
        for made, content in ((index, known), before):
            fresh = ExactIndex(4)
            fresh.add(torch.tensor(list(content)), torch.stack(list(content.values())))
            some = torch.tensor([*list(content)[::3], *best.tolist(), 10**9])
            for allowed in (None, some, some.expand(5, -1)):
                found, expected = (each.search(queries, 50, allowed=allowed) for each in (made, fresh))
                assert all(map(torch.equal, found, expected))
            assert len(made) == len(content) and all(map(torch.equal, made.contents(), fresh.contents()))
    assert 3 < stayed < 14, "for a while it stays where it is, then it is put together"
    with pytest.raises(KeyError, match="is not in the index"):
        index.remove(torch.tensor([next(iter(known)), 10**9]))
    with pytest.raises(ValueError, match="is in the index already"):
        index.add(torch.tensor([next(iter(known))]), torch.zeros(1, 4))
