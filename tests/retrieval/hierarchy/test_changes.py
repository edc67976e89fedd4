"""Facts about the hierarchical index: what changes do, alone and while others search."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fullrank.retrieval.base import NO_ITEM
from fullrank.retrieval.hierarchy import DotProduct, HierarchicalIndex, StaleIndexError

# Of the catalogue, see conftest.py.
WIDTH, NUM_NODES, FULL = 6, (8, 5), (8, 40)
Catalogue = Any


def same(found: Any, expected: Any) -> None:
    for name in ("item_keys_BK", "scores_BK"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_what_is_added_is_found_at_once_and_what_is_removed_never_again(catalogue: Catalogue, users: Tensor) -> None:
    index = catalogue.index()
    before = index.search(DotProduct(), users, 20, FULL)
    keys, fresh = 9000 + torch.arange(9), 100 * torch.nn.functional.normalize(users)
    index.add(keys, fresh, catalogue.codes(fresh))
    assert torch.equal(index.search(DotProduct(), users, 20, FULL).item_keys_BK[:, 0], keys)
    assert torch.equal(
        index.search(DotProduct(), users, 20, FULL, allowed=keys[3:4]).item_keys_BK, keys[3:4].expand(9, 1)
    )
    gone = torch.cat([before.item_keys_BK[:, 3].unique(), keys])
    index.remove(gone)
    found = index.search(DotProduct(), users, 1500, FULL)
    assert found.item_keys_BK.shape[1] == len(index) == 1509 - gone.numel()
    assert not bool(torch.isin(found.item_keys_BK, gone).any())
    place = torch.isin(catalogue.keys_I, gone)
    vectors = catalogue.vectors_ID[place]
    index.add(catalogue.keys_I[place], vectors, catalogue.codes(vectors))
    assert torch.equal(index.search(DotProduct(), users, 20, FULL).item_keys_BK, before.item_keys_BK)


def test_adding_and_removing_restores_every_bit(
    catalogue: Catalogue, users: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fullrank.retrieval.hierarchy.storage.SMALL_SEGMENT", 0)
    index = catalogue.index()
    before = [index.search(DotProduct(), users, 20, beam) for beam in (FULL, (3, 4), (1, 1))]
    keys, fresh = 9000 + torch.arange(200), torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(1))
    index.add(keys, fresh, catalogue.codes(fresh))
    index.remove(keys)
    for beam, expected in zip((FULL, (3, 4), (1, 1)), before, strict=True):
        same(index.search(DotProduct(), users, 20, beam), expected)


def test_every_item_is_in_exactly_one_leaf_and_counted_there(catalogue: Catalogue) -> None:
    index = catalogue.index()
    index.remove(catalogue.keys_I[:100])
    state, codes = index.state(), catalogue.codes(catalogue.vectors_ID)[100:]
    assert state["keys"].numel() == state["keys"].unique().numel() == 1400
    leaf = dict(zip(state["keys"].tolist(), (state["leaves"] // 1024).tolist(), strict=True))
    assert leaf == dict(zip(catalogue.keys_I[100:].tolist(), (codes[:, 0] * 5 + codes[:, 1]).tolist(), strict=True))
    assert index.occupied == tuple(codes[:, : n + 1].unique(dim=0).shape[0] for n in range(2))


def test_nodes_without_items_are_not_scored(catalogue: Catalogue, users: Tensor) -> None:
    index, codes = catalogue.index(), catalogue.codes(catalogue.vectors_ID)
    index.remove(catalogue.keys_I[codes[:, 0] != 2])
    assert index.occupied[0] == 1
    found = index.search(DotProduct(), users, 5, (3, 4))
    assert found.stats.nodes_BN[:, 0].tolist() == [1] * 9
    assert bool(torch.isin(found.item_keys_BK, catalogue.keys_I[codes[:, 0] == 2]).all())
    index.remove(catalogue.keys_I, missing="ignore")
    assert (len(index), index.occupied) == (0, (0, 0))


def test_100_000_random_changes_leave_what_a_dictionary_holds(
    catalogue: Catalogue, users: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adds, updates and removals of 1 to 800 items, searched in between with full and narrow beams and filters."""
    monkeypatch.setattr("fullrank.retrieval.hierarchy.storage.SMALL_SEGMENT", 32)
    rng = np.random.default_rng(0)
    index = HierarchicalIndex(NUM_NODES, catalogue.books, WIDTH)
    held: dict[int, Tensor] = {}
    done = version = 0
    while done < 100_000:
        count = int(rng.integers(1, 800)) if rng.random() < 0.9 else 1
        keys = torch.from_numpy(rng.permutation(6000)[:count])
        vectors = torch.from_numpy(rng.normal(size=(count, WIDTH)).astype(np.float32))
        kind = rng.integers(3)
        known = torch.tensor([key in held for key in keys.tolist()])
        if kind == 0:
            keys, vectors = keys[~known], vectors[~known]
            index.add(keys, vectors, catalogue.codes(vectors))
        elif kind == 1:
            index.update(keys, vectors, catalogue.codes(vectors))
        else:
            index.remove(keys, missing="ignore")
            for key in keys.tolist():
                held.pop(key, None)
        if kind < 2:
            held.update(zip(keys.tolist(), vectors, strict=True))
        done += keys.numel()
        assert len(index) == len(held)
        assert index.index_version > version
        version = index.index_version
        if rng.random() < 0.3 and held:
            names = torch.tensor(sorted(held))
            total_BI = users @ torch.stack([held[key] for key in names.tolist()]).T
            allowed = None
            if rng.random() < 0.5:
                allowed = torch.from_numpy(rng.permutation(6000)[: int(rng.integers(1, 4000))])
                total_BI, names = total_BI[:, torch.isin(names, allowed)], names[torch.isin(names, allowed)]
            scores, place = total_BI.sort(dim=1, descending=True, stable=True)
            found = index.search(DotProduct(), users, 10, FULL, allowed=allowed)
            assert torch.equal(found.item_keys_BK, names[place[:, :10]])
            assert torch.allclose(found.scores_BK, scores[:, :10], atol=1e-5)
            narrow = index.search(DotProduct(), users, 10, (2, 2), allowed=allowed)
            assert bool(torch.isin(narrow.item_keys_BK, names).all())
            for row in range(2):
                own = total_BI[row][torch.searchsorted(names, narrow.item_keys_BK[row])]
                assert torch.allclose(own, narrow.scores_BK[row], atol=1e-5)


def test_few_rows_are_dead_or_in_the_tail(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fullrank.retrieval.hierarchy.storage.SMALL_SEGMENT", 8)
    index, codes = HierarchicalIndex(NUM_NODES, catalogue.books, WIDTH), catalogue.codes(catalogue.vectors_ID)
    for begin in range(0, 1500, 7):
        part = slice(begin, begin + 7)
        index.add(catalogue.keys_I[part], catalogue.vectors_ID[part], codes[part])
        health = index.health()
        assert health.tail_share <= 0.2 and health.segments <= 6
    for begin in range(0, 1400, 7):
        index.remove(catalogue.keys_I[begin : begin + 7])
        assert index.health().dead_share <= 0.2


def encoder(catalogue: Catalogue, turn: Tensor) -> Any:
    """Another model: the same items, turned."""
    order = catalogue.keys_I.argsort()

    def encode(keys: Tensor) -> tuple[Tensor, Tensor]:
        vectors = catalogue.vectors_ID[order[torch.searchsorted(catalogue.keys_I[order], keys)]] @ turn
        return vectors, catalogue.codes(vectors)

    return encode


def test_searches_during_refreshes_never_fail_and_never_mix_versions(catalogue: Catalogue, users: Tensor) -> None:
    """Each version turns the space; a search of its scorer sees scores of its own vectors alone, or is told so."""
    generator = torch.Generator().manual_seed(0)
    turns = [torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q for _ in range(6)]
    index = HierarchicalIndex.build(
        catalogue.keys_I,
        *encoder(catalogue, turns[0])(catalogue.keys_I),
        num_nodes=NUM_NODES,
        node_vectors=catalogue.books,
        version="0",
    )
    # Users stay as they are, so that what is found tells the version.
    expected = []
    for turn in turns:
        scores, place = (users @ (catalogue.vectors_ID @ turn).T).sort(dim=1, descending=True)
        expected.append((scores[:, :10], catalogue.keys_I[place[:, :10]]))
    failures, searches, seen, stop = list[BaseException](), [0, 0], set[str](), threading.Event()

    def search(thread: int) -> None:
        try:
            while not stop.is_set():
                scorer = DotProduct(version=index.version if thread else None)
                found = index.search(scorer, users, 10, FULL)
                version = found.stats.model_version
                assert version is not None and scorer.version in (None, version)
                scores, keys = expected[int(version)]
                assert torch.equal(found.item_keys_BK, keys)
                assert torch.allclose(found.scores_BK, scores, atol=1e-5)
                seen.add(version)
                searches[thread] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=search, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    for number, turn in enumerate(turns[1:], 1):
        index.refresh(encoder(catalogue, turn), node_vectors=catalogue.books, version=str(number))
        goal = [count + 2 for count in searches]
        while any(count < least for count, least in zip(searches, goal, strict=True)) and not failures:
            stop.wait(0.001)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert seen == {str(number) for number in range(6)}
    assert index.version == "5"
    # The version before is there until it is released; one before that is not.
    assert index.search(DotProduct(version="4"), users, 10, FULL).stats.model_version == "4"
    with pytest.raises(StaleIndexError, match='of version "5" of the model, the scorer of "3"'):
        index.search(DotProduct(version="3"), users, 10, FULL)
    index.remove(expected[4][1][0, :1])
    assert not bool((index.search(DotProduct(version="4"), users, 10, FULL)[0] == expected[4][1][0, 0]).any())
    index.release()
    with pytest.raises(StaleIndexError, match='the scorer of "4"'):
        index.search(DotProduct(version="4"), users, 10, FULL)


def test_changes_during_a_refresh_are_not_lost(catalogue: Catalogue, users: Tensor) -> None:
    index = catalogue.index()
    turn = -torch.eye(WIDTH)
    encode = encoder(catalogue, turn)
    late, fresh = 9000 + torch.arange(40), torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(3))
    moved = {int(key): vector for key, vector in zip(late, fresh, strict=True)}

    def slow(keys: Tensor) -> tuple[Tensor, Tensor]:
        if not changed.is_set():  # in the middle of the refresh
            index.add(late, fresh, catalogue.codes(fresh))
            index.update(catalogue.keys_I[:5], fresh[:5], catalogue.codes(fresh[:5]))
            moved.update(zip(catalogue.keys_I[:5].tolist(), fresh[:5], strict=True))
            index.remove(catalogue.keys_I[100:150])
            with pytest.raises(RuntimeError, match="another refresh of the index goes on"):
                index.refresh(encode, node_vectors=catalogue.books)
            changed.set()
        vectors = torch.stack(
            [moved[key] @ turn if key in moved else encode(torch.tensor([key]))[0][0] for key in keys.tolist()]
        )
        return vectors, catalogue.codes(vectors)

    changed = threading.Event()
    index.refresh(slow, node_vectors=catalogue.books, version="turned")
    assert len(index) == 1500 + 40 - 50
    found = index.search_exact(DotProduct(), users, 1490)
    assert not bool(torch.isin(found.item_keys_BK, catalogue.keys_I[100:150]).any())
    for key in (int(late[0]), int(catalogue.keys_I[2])):
        score = found.scores_BK[0][found.item_keys_BK[0] == key]
        assert torch.allclose(score, users[0] @ (moved[key] @ turn), atol=1e-5)
    assert NO_ITEM not in found.item_keys_BK


def test_a_refresh_that_fails_changes_nothing(catalogue: Catalogue, users: Tensor) -> None:
    index = catalogue.index(version="a")
    before = index.search(DotProduct(), users, 10, (3, 4))

    def broken(keys: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((keys.numel(), WIDTH), torch.nan), torch.zeros(keys.numel(), 2, dtype=torch.int64)

    with pytest.raises(ValueError, match="has a NaN"):
        index.refresh(broken, node_vectors=catalogue.books, version="b")
    same(index.search(DotProduct(), users, 10, (3, 4)), before)
    index.refresh(encoder(catalogue, torch.eye(WIDTH)), node_vectors=catalogue.books, version="b")
    assert index.version == "b"
    late = torch.tensor([9000]), torch.zeros(1, WIDTH), torch.zeros(1, 2, dtype=torch.int64)
    for change in (index.add, index.update):
        with pytest.raises(StaleIndexError, match='of version "b" of the model, the items of "a"'):
            change(*late, version="a")
    index.add(*late, version="b")
    assert len(index) == 1501


def test_health_says_how_full_and_how_worn_the_index_is(catalogue: Catalogue) -> None:
    index, codes = catalogue.index(), catalogue.codes(catalogue.vectors_ID)
    leaf, nodes = codes[:, 0] * 5 + codes[:, 1], catalogue.nodes(catalogue.vectors_ID)
    error = float((catalogue.vectors_ID - nodes[1]).square().sum(1).mean())
    health = index.health()
    sizes = leaf.bincount()[leaf.bincount() > 0].double()
    assert health.perplexity[1] == pytest.approx(float(torch.distributions.Categorical(sizes).entropy().exp()))
    assert (health.max_leaf, health.mean_leaf) == (int(sizes.max()), pytest.approx(float(sizes.mean())))
    assert health.quantization_error == health.quantization_error_at_build == pytest.approx(error, rel=1e-5)
    far = catalogue.vectors_ID[:300] * 3
    index.update(catalogue.keys_I[:300], far, codes[:300])
    moved = float((far - nodes[1][:300]).square().sum() + (catalogue.vectors_ID - nodes[1])[300:].square().sum()) / 1500
    health = HierarchicalIndex.restore(index.state()).health()
    assert health.quantization_error == pytest.approx(moved, rel=1e-5)
    assert health.quantization_error_at_build == pytest.approx(error, rel=1e-5)


def test_an_audit_compares_beams_with_all_items(catalogue: Catalogue, users: Tensor) -> None:
    index = catalogue.index()
    audits = index.audit(DotProduct(), users, 20, [(1, 1), (3, 4), FULL])
    assert [each.recall for each in audits] == sorted(each.recall for each in audits)
    assert (audits[-1].recall, audits[-1].items_share) == (1.0, 1.0)
    found, expected = index.search(DotProduct(), users, 20, (3, 4)), index.search_exact(DotProduct(), users, 20)
    hits = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found[0], expected[0], strict=True)]
    assert audits[1].recall == pytest.approx(sum(hits) / 180)
    assert audits[1].items_share == pytest.approx(float(found.cost_B.double().mean()) / 1500)


def test_leaves_that_have_grown_are_split(catalogue: Catalogue, users: Tensor) -> None:
    """No item is lost, the leaves are nearer to their items, a fixed budget finds more, later items find their part."""
    index, scorer = catalogue.index(), DotProduct()
    before, exact = index.health(), index.search_exact(scorer, users, 20)
    narrow = index.search(scorer, users, 20, (8, 40), max_items=250)
    index.rebalance(30)
    after = index.health()
    assert before.max_leaf > 100 and after.max_leaf <= 30 and after.items == 1500
    assert after.quantization_error is not None and before.quantization_error is not None
    assert after.quantization_error < 0.7 * before.quantization_error
    assert after.nodes[0] == before.nodes[0] and after.nodes[1] > before.nodes[1]
    full = (8, after.nodes[1])
    same(index.search_exact(scorer, users, 20), exact)
    assert torch.equal(index.search(scorer, users, 20, full).item_keys_BK, exact.item_keys_BK)
    wide = index.search(scorer, users, 20, full, max_items=250)
    hits = [int(torch.isin(each.item_keys_BK, exact.item_keys_BK).sum()) for each in (narrow, wide)]
    assert hits[1] > hits[0]
    again = HierarchicalIndex.restore(index.state())
    assert again.occupied == after.nodes
    assert torch.equal(again.search(scorer, users, 20, (3, 20))[0], index.search(scorer, users, 20, (3, 20))[0])
    fresh = catalogue.vectors_ID[:50]
    index.add(9000 + torch.arange(50), fresh, catalogue.codes(fresh))
    leaf = dict(zip(index.state()["keys"].tolist(), index.state()["leaves"].tolist(), strict=True))
    beside = [leaf[9000 + row] == leaf[int(catalogue.keys_I[row])] for row in range(50)]
    assert sum(beside) >= 45  # 2-means of halves is not nearest of all parts
    index.rebalance(10)
    assert index.health().max_leaf <= 10 and len(index) == 1550
    with pytest.raises(ValueError, match="max_leaf must be at least 1, got 0"):
        index.rebalance(0)


def test_items_that_are_all_alike_stay_together(catalogue: Catalogue, users: Tensor) -> None:
    alike = torch.ones(40, WIDTH)
    index = HierarchicalIndex(NUM_NODES, catalogue.books, WIDTH)
    index.add(torch.arange(40), alike, catalogue.codes(alike))
    index.rebalance(5)
    assert index.occupied == (1, 1)
    assert index.search(DotProduct(), users, 3, (1, 1)).item_keys_BK.tolist() == [[0, 1, 2]] * 9


def test_moved_nodes_lead_to_the_same_items(catalogue: Catalogue, users: Tensor) -> None:
    index = catalogue.index()
    exact = index.search_exact(DotProduct(), users, 20)
    index.move_nodes([-book for book in catalogue.books])
    away, back = (
        index.search(DotProduct(), users, 20, (2, 4)),
        catalogue.index().search(DotProduct(), -users, 20, (2, 4)),
    )
    assert torch.equal(away.cost_B, back.cost_B)
    assert torch.equal(index.search(DotProduct(), users, 20, FULL).item_keys_BK, exact.item_keys_BK)


def test_nodes_without_vectors_have_the_mean_of_their_items(catalogue: Catalogue, users: Tensor) -> None:
    """After any changes, of what is left: the index is the one that is built of it at once."""
    vectors, codes = catalogue.vectors_ID, catalogue.codes(catalogue.vectors_ID)

    def build(rows: slice) -> HierarchicalIndex:
        given = catalogue.keys_I[rows], vectors[rows], codes[rows]
        return HierarchicalIndex.build(*given, num_nodes=NUM_NODES, node_vectors=None)

    index = build(slice(0, 600))
    index.add(catalogue.keys_I[600:], vectors[600:] + 1, codes[600:])
    index.update(catalogue.keys_I[600:], vectors[600:], codes[600:])
    index.remove(catalogue.keys_I[:500])
    index.rebalance(200)
    same(index.search(DotProduct(), users, 20, (3, 4)), build(slice(500, 1500)).search(DotProduct(), users, 20, (3, 4)))
    leaf, error = codes[500:, 0] * 5 + codes[500:, 1], 0.0
    for number in leaf.unique():
        own = vectors[500:][leaf == number].double()
        error += float((own - own.mean(0)).square().sum())
    assert index.health().quantization_error == pytest.approx(error / 1000, rel=1e-5)
    again = HierarchicalIndex.restore(index.state())
    same(again.search(DotProduct(), users, 20, (3, 4)), index.search(DotProduct(), users, 20, (3, 4)))
    index.rebalance(20)
    assert index.health().max_leaf <= 20
    assert index.health().quantization_error < 0.7 * error / 1000
    index.refresh(encoder(catalogue, torch.eye(WIDTH)), node_vectors=None)
    assert index.health().quantization_error == pytest.approx(error / 1000, rel=1e-5)


def test_items_move_to_the_nearest_leaf(catalogue: Catalogue, users: Tensor) -> None:
    """Each time nearer on the whole, until nothing moves: k-means."""
    codes = catalogue.codes(catalogue.vectors_ID)
    index = HierarchicalIndex.build(
        catalogue.keys_I, catalogue.vectors_ID, codes, num_nodes=NUM_NODES, node_vectors=None
    )
    exact, error = index.search_exact(DotProduct(), users, 20), index.health().quantization_error
    assert error is not None
    for _ in range(100):
        before, found = error, index.nearest(catalogue.vectors_ID)
        index.reassign()
        assert torch.equal(index.lookup(catalogue.keys_I)[1], found)
        error = index.health().quantization_error
        assert error is not None and error <= before * (1 + 1e-6)
        if error >= before * (1 - 1e-7):
            break
    assert torch.equal(index.nearest(catalogue.vectors_ID), found)
    same(index.search_exact(DotProduct(), users, 20), exact)
    with pytest.raises(ValueError, match="row 1, .* has a NaN"):
        index.nearest(torch.tensor([[0.0] * WIDTH, [torch.nan] * WIDTH]))
    index.remove(catalogue.keys_I)
    with pytest.raises(ValueError, match="no leaf is near"):
        index.nearest(catalogue.vectors_ID)
    index.reassign()
    assert len(index) == 0
