"""Facts about indexes that cluster vectors themselves: IVF, a balanced tree, a codebook that follows a stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fullrank.retrieval.exact import ExactIndex
from fullrank.retrieval.hierarchy import DotProduct, HierarchicalIndex, IVFIndex, StreamingVQ, TreeIndex
from fullrank.retrieval.hierarchy.health import recall
from fullrank.retrieval.hierarchy.tree import balanced_leaves

WIDTH, ITEMS = 8, 2000


def clustered(items: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, WIDTH, generator=generator)
    own = torch.randint(0, 40, (items,), generator=generator)
    return centres[own] + 0.3 * torch.randn(items, WIDTH, generator=generator)


@pytest.fixture(scope="module")
def vectors() -> Tensor:
    return clustered(ITEMS, 0)


@pytest.fixture(scope="module")
def queries() -> Tensor:
    return clustered(50, 0) + 0.1


@pytest.fixture(scope="module")
def expected(vectors: Tensor, queries: Tensor) -> Tensor:
    exact = ExactIndex(WIDTH)
    exact.add(torch.arange(ITEMS), vectors)
    return exact.search(queries, 20).item_keys_BK


def test_one_level_is_the_inverted_file_of_faiss(vectors: Tensor, queries: Tensor) -> None:
    """With its centres, its assignment (by inner product, as its quantiser probes) and its number of probes."""
    faiss = pytest.importorskip("faiss")
    quantizer = faiss.IndexFlatIP(WIDTH)
    peer = faiss.IndexIVFFlat(quantizer, WIDTH, 32, faiss.METRIC_INNER_PRODUCT)
    peer.train(vectors.numpy())
    peer.add(vectors.numpy())
    centres = torch.from_numpy(quantizer.reconstruct_n(0, 32))
    codes = (vectors @ centres.T).argmax(1)
    index = HierarchicalIndex.build(
        torch.arange(ITEMS), vectors, codes[:, None], num_nodes=(32,), node_vectors=[centres]
    )
    for probes in (1, 3, 10, 32):
        peer.nprobe = probes
        scores, keys = peer.search(queries.numpy(), 15)
        found = index.search(DotProduct(), queries, 15, (probes,), max_items=ITEMS)
        there = keys >= 0
        assert np.array_equal(found.item_keys_BK.numpy(), keys)
        assert np.allclose(found.scores_BK.numpy()[there], scores[there], atol=1e-5)
        faiss.cvar.indexIVF_stats.reset()
        peer.search(queries.numpy(), 15)
        assert faiss.cvar.indexIVF_stats.ndis == int(found.cost_B.sum())


def test_an_inverted_file_is_trained_anew_on_what_it_holds(vectors: Tensor, queries: Tensor) -> None:
    """Items of quite another kind have come: recall falls, and rises again."""
    index = IVFIndex.build(torch.arange(ITEMS), vectors, 40)
    assert index.index.health().quantization_error == pytest.approx(0.09 * WIDTH, rel=0.3)
    other = 5 + clustered(3 * ITEMS, 9)
    index.add(torch.arange(ITEMS, 4 * ITEMS), other)
    index.remove(torch.arange(0, ITEMS, 2))
    users = torch.nn.functional.normalize(other[:50] - 5)
    exact = index.index.search_exact(DotProduct(), users, 20).item_keys_BK
    before, worn = recall(index.search(users, 20, (2,)).item_keys_BK, exact), index.index.health()
    index.retrain()
    after, fresh = recall(index.search(users, 20, (2,)).item_keys_BK, exact), index.index.health()
    assert fresh.items == worn.items == 7000
    assert fresh.quantization_error is not None and worn.quantization_error is not None
    assert fresh.quantization_error < 0.5 * worn.quantization_error
    assert fresh.perplexity[0] > 2 * worn.perplexity[0]
    assert after > before
    key = torch.tensor([99999])
    index.add(key, 100 * users[:1])
    assert int(index.search(users[:1], 1, (1,)).item_keys_BK) == 99999
    with pytest.raises(ValueError, match="clusters is 2001, expected 1 to the number of vectors, 2000"):
        IVFIndex.build(torch.arange(ITEMS), vectors, 2001)


def test_splits_are_halves_and_keep_clusters_together() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [10.0, 0.0], [10.0, 1.0]]).repeat_interleave(25, 0)
    leaf = balanced_leaves(corners + 0.1 * torch.randn(100, 2, generator=generator), 2)
    assert [leaf[begin : begin + 25].unique().numel() for begin in range(0, 100, 25)] == [1] * 4
    assert leaf.bincount().tolist() == [25] * 4
    assert leaf[0] // 2 == leaf[25] // 2 != leaf[50] // 2  # near corners are siblings
    sizes = balanced_leaves(torch.randn(1003, 5, generator=generator), 4).bincount()
    assert sizes.numel() == 16 and int(sizes.max() - sizes.min()) <= 1


@pytest.mark.parametrize("branching", [2, 8])
def test_a_tree_is_balanced_and_searched_by_a_beam(
    vectors: Tensor, queries: Tensor, expected: Tensor, branching: int
) -> None:
    tree = TreeIndex.build(torch.arange(ITEMS), vectors, leaf_size=20, branching=branching)
    health = tree.index.health()
    assert health.max_leaf <= 20
    assert health.nodes == tuple(branching ** (n + 1) for n in range(len(health.nodes)))
    assert health.perplexity[-1] > 0.99 * health.nodes[-1]
    narrow, wide = (tree.search(queries, 20, [width] * len(health.nodes)) for width in (8, 32))
    assert recall(wide.item_keys_BK, expected) > 0.9 > 0.5 < recall(narrow.item_keys_BK, expected)
    assert float(wide.cost_B.double().mean()) < 0.4 * ITEMS
    full = tree.search(queries, 20, health.nodes)
    assert torch.equal(full.item_keys_BK, expected)
    # What is added goes down the nearest nodes, and is found.
    tree.add(torch.tensor([5000]), 100 * queries[:1])
    codes, at = tree.codes(100 * queries[:1])[0], 0
    for level, code in enumerate(codes.tolist()):
        children = tree.nodes[level][at * branching : (at + 1) * branching]
        assert code == int(torch.cdist(100 * queries[:1], children).argmin())
        at = at * branching + code
    assert int(tree.search(queries[:1], 1, [8] * len(health.nodes)).item_keys_BK) == 5000
    with pytest.raises(ValueError, match="branching is 3, expected a power of 2"):
        TreeIndex.build(torch.arange(ITEMS), vectors, branching=3)
    with pytest.raises(ValueError, match="leaf_size must be at least 1, got 0"):
        TreeIndex.build(torch.arange(ITEMS), vectors, leaf_size=0)


def test_centres_are_moving_averages_of_what_comes(vectors: Tensor) -> None:
    """Against a loop; twice as popular is 2^-discount of the weight."""
    stream = StreamingVQ.build(torch.arange(ITEMS), vectors, 30, decay=0.9, discount=0.5, balance=0.0)
    weight, total = stream.weight_K.double(), stream.sum_KD.double()
    for step in range(5):
        rows = torch.arange(100 * step, 100 * step + 100)
        shown, popularity = vectors[rows] + 0.5, 1.0 + rows % 7
        each = popularity.double() ** -0.5
        each /= each.sum()
        code = torch.cdist(shown.double(), total / weight[:, None]).argmin(1)
        weight, total = 0.9 * weight, 0.9 * total
        for row in range(100):
            weight[code[row]] += 0.1 * each[row]
            total[code[row]] += 0.1 * each[row] * shown[row].double()
        stream.observe(rows, shown, popularity)
        assert torch.equal(stream.index.lookup(rows)[1][:, 0], code)
    assert torch.allclose(stream.centres_KD.double(), total / weight[:, None], atol=1e-5)
    assert len(stream) == ITEMS


def test_a_codebook_follows_its_stream_and_stays_balanced(vectors: Tensor) -> None:
    """Items move to another place; a codebook that stays where it was has most of them in a few leaves."""
    far = 2 * clustered(ITEMS, 4) + 1
    errors, perplexity = {}, {}
    for balance in (0.0, 0.5):
        stream = StreamingVQ.build(torch.arange(ITEMS), vectors, 30, decay=0.9, balance=balance)
        frozen = IVFIndex(HierarchicalIndex.restore(stream.index.state()), stream.centres_KD)
        frozen.update(torch.arange(ITEMS), far)
        for epoch in range(3):
            order = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(epoch))
            for rows in torch.split(order, 100):
                stream.observe(rows, far[rows])
        moved = [stream.reassign(700) for _ in range(3)]
        assert sum(moved) > 0
        health = stream.index.health()
        assert health.items == ITEMS
        errors[balance], perplexity[balance] = health.quantization_error, health.perplexity[0]
        assert errors[balance] < 0.6 * frozen.index.health().quantization_error
    assert perplexity[0.5] > perplexity[0.0]
    # Without a factor for balance, everything that was assigned anew is with its nearest centre.
    stream.balance = 0.0
    while stream.reassign(ITEMS):
        pass
    vectors_now, codes = stream.index.lookup(torch.arange(ITEMS))
    assert torch.equal(codes[:, 0], torch.cdist(vectors_now, stream.centres_KD).argmin(1))
    for options in ({"decay": 1.0}, {"discount": -1.0}, {"balance": -0.1}):
        with pytest.raises(ValueError, match="decay is .* expected between 0 and 1"):
            StreamingVQ.build(torch.arange(ITEMS), vectors, 30, **options)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        stream.reassign(0)
