"""Facts about every index of vectors: what it finds, forgets, filters and keeps."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset
from fullrank.extras import MissingExtra
from fullrank.retrieval import NO_ITEM, Items, RetrieverSpec, TwoTower
from fullrank.retrieval.exact import ExactIndex
from fullrank.retrieval.vectors import VECTOR_INDEXES, VectorIndex, VectorIndexSpec, auto, register_index
from fullrank.retrieval.vectors.audit import audit, reachable
from fullrank.retrieval.vectors.faiss_index import bases
from fullrank.retrieval.vectors.graph import GraphIndex, augmented
from fullrank.retrieval.vectors.snapshot import SnapshotIndex, ladder

COUNT, WIDTH = 3000, 8
KEYS = torch.randperm(10 * COUNT, generator=torch.Generator().manual_seed(3))[:COUNT]
VECTORS = torch.randn(COUNT, WIDTH, generator=torch.Generator().manual_seed(4))
QUERIES = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(5))
# Product quantisation is slow to learn, and differs from its sister in nothing that follows.
NAMES = [name for name in VECTOR_INDEXES if name != "faiss_ivf_pq"]
# One code a vector is soon learnt; what it leaves out is made up for.
OPTIONS = {"faiss_ivf_pq": {"numbers_per_code": 8, "refine": 20, "cells": 4}}


def empty(name: str, **options: object) -> VectorIndex:
    """An index that leaves nothing to scoring all items; skips the test where its library is missing."""
    if name != "exact":
        options = {"exact_below": 500, **OPTIONS.get(name, {}), **options}
    try:
        return VectorIndexSpec.of({"name": name, **options}).build(WIDTH)
    except MissingExtra as error:
        pytest.skip(str(error))


def filled(name: str, **options: object) -> VectorIndex:
    index = empty(name, **options)
    index.add(KEYS, VECTORS)
    return index


def exact(keys: torch.Tensor, vectors: torch.Tensor) -> ExactIndex:
    index = ExactIndex(WIDTH)
    index.add(keys, vectors)
    return index


def shared(found: torch.Tensor, best: torch.Tensor) -> float:
    return float((found[:, :, None] == best[:, None, :]).any(1).double().mean())


@pytest.mark.parametrize("name", VECTOR_INDEXES)
def test_it_finds_most_of_the_best_and_scores_them_exactly(name: str) -> None:
    found = filled(name).search(QUERIES, 30)
    best = exact(KEYS, VECTORS).search(QUERIES, 30)
    assert shared(found.item_keys_BK, best.item_keys_BK) > 0.9
    row_of = {int(key): row for row, key in enumerate(KEYS)}
    rows = torch.tensor([[row_of[int(key)] for key in keys] for keys in found.item_keys_BK])
    assert torch.allclose(found.scores_BK, (VECTORS[rows] * QUERIES[:, None]).sum(2), atol=1e-5)
    assert bool((found.scores_BK.diff(dim=1) <= 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_and_goes_is_seen_by_the_next_search(name: str) -> None:
    """Whether it was in the snapshot or came later, and again after the snapshot was built anew."""
    index = filled(name)
    best = index.search(QUERIES[:1], 5).item_keys_BK[0]
    index.remove(best[:2])
    assert not bool(torch.isin(index.search(QUERIES, 50).item_keys_BK, best[:2]).any())
    fresh = torch.tensor([900_001, 900_002])
    index.add(fresh, 50 * QUERIES[:2])
    assert index.search(QUERIES[:1], 1).item_keys_BK.item() == 900_001
    with pytest.raises(ValueError, match="item 900001 is in the index already"):
        index.add(fresh[:1], QUERIES[:1])
    with pytest.raises(ValueError, match=f"item {int(best[2])} is in the index already"):
        index.add(best[2:3], QUERIES[:1])
    with pytest.raises(KeyError, match=f"item {int(best[0])} is not in the index"):
        index.remove(best[:1])
    index.add(best[:1], 5000 * QUERIES[1:2])  # back, as another item
    assert index.search(QUERIES[1:2], 1).item_keys_BK.item() == int(best[0])
    index.remove(torch.cat([fresh, best[:1]]))
    assert len(index) == COUNT - 2
    many = torch.arange(1_000_000, 1_001_000)
    index.add(many, VECTORS[:1000])  # more than the share at which the snapshot is built anew
    index.remove(many)
    keys, vectors = index.contents()
    assert torch.equal(keys, KEYS[~torch.isin(KEYS, best[:2])].sort().values)
    best_now = exact(keys, vectors).search(QUERIES, 30).item_keys_BK
    assert shared(index.search(QUERIES, 30).item_keys_BK, best_now) > 0.9


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.7, 0.2, 0.02])
def test_filters_return_k_wherever_k_are_allowed(name: str, share: float) -> None:
    index = filled(name)
    index.remove(KEYS[:100])
    index.add(torch.arange(900_000, 900_050), VECTORS[:50] / 2)
    generator = torch.Generator().manual_seed(6)
    keys, vectors = index.contents()
    kept = torch.rand(len(keys), generator=generator) < share
    allowed = torch.cat([keys[kept], KEYS[:1], torch.tensor([NO_ITEM, 777_777])])
    found = index.search(QUERIES, 40, allowed=allowed)
    best = exact(keys[kept], vectors[kept]).search(QUERIES, 40)
    assert bool(found.found_BK.all()) and bool(torch.isin(found.item_keys_BK, keys[kept]).all())
    assert all(len(set(row.tolist())) == 40 for row in found.item_keys_BK)
    assert shared(found.item_keys_BK, best.item_keys_BK) > (0.85 if share > 0.5 else 0.999)
    own = torch.full((len(QUERIES), 3), NO_ITEM)
    own[:, 0], own[2] = keys[:20], keys[50:53]
    found = index.search(QUERIES, 2, allowed=own)
    assert found.found_BK.sum(1).tolist() == [1, 1, 2] + 17 * [1]
    assert torch.equal(found.item_keys_BK[3:, 0], keys[3:20])


@pytest.mark.parametrize("name", NAMES)
def test_k_beyond_the_items_returns_all(name: str) -> None:
    index = filled(name)
    found = index.search(QUERIES[:2], COUNT + 10).item_keys_BK
    assert torch.equal(found.sort(1).values, KEYS.sort().values.expand(2, -1))
    index.remove(KEYS)
    assert index.search(QUERIES[:2], 3).found_BK.sum() == 0 and len(index) == 0


@pytest.mark.parametrize("name", NAMES)
def test_it_is_built_again_from_what_is_saved(name: str) -> None:
    index = empty(name)
    index.typical_QD = QUERIES
    index.add(KEYS, VECTORS)
    again = empty(name)
    again.restore(index.state())
    for one, other in zip(again.contents(), index.contents(), strict=True):
        assert torch.equal(one, other)
    best = exact(KEYS, VECTORS).search(QUERIES, 30).item_keys_BK
    assert shared(again.search(QUERIES, 30).item_keys_BK, best) > 0.9
    if isinstance(again, SnapshotIndex):
        assert again.typical_QD is not None and torch.equal(again.typical_QD, QUERIES)
        assert again.recall >= 0.95


@pytest.mark.parametrize(
    "name", ["exact", "auto", "ivf", "faiss_ivf_sq8", "faiss_4bit", "faiss_ivf_4bit", "faiss_hnsw"]
)
def test_what_one_process_has_built_others_map(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "chosen", lambda times: ["faiss_ivf_4bit", *6 * ["faiss_4bit"]])
    index, again = empty(name), empty(name)
    index.typical_QD = QUERIES
    index.add(KEYS, VECTORS)
    index.write_arrays(tmp_path)
    again.arrays = tmp_path
    with monkeypatch.context() as patch:
        patch.setattr(SnapshotIndex, "rebuild", lambda self: pytest.fail("it was built again"))
        again.restore(index.state())
    for rows in (1, 20):
        for own, other in zip(again.search(QUERIES[:rows], 30), index.search(QUERIES[:rows], 30), strict=True):
            assert torch.equal(own, other)
    if sys.platform == "linux" and name in ("faiss_ivf_sq8", "faiss_hnsw"):
        assert str(tmp_path / "index.faiss") in Path("/proc/self/maps").read_text()
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    best = again.search(QUERIES[:1], 5).item_keys_BK[0]
    again.remove(best)
    again.add(best[:1], 50 * QUERIES[:1])
    assert again.search(QUERIES[:1], 5).item_keys_BK[0, 0] == best[0] and len(again) == COUNT - 4
    again.remove(KEYS[~torch.isin(KEYS, best)][:1000])  # so many that it is built anew
    assert index.search(QUERIES[:1], 5).item_keys_BK[0].tolist() == best.tolist()
    assert {path: path.read_bytes() for path in written} == written


def test_bases_keep_inner_products_and_make_distances_differences_of_scores() -> None:
    """|items_DD (x - y)|² is the mean of (q·x - q·y)² over typical queries, beside that over all directions."""
    queries = QUERIES * torch.linspace(0.1, 3, WIDTH)
    items_DD, queries_DD = bases(WIDTH, queries)
    assert torch.allclose((VECTORS @ items_DD) @ (QUERIES @ queries_DD).T, VECTORS @ QUERIES.T, atol=1e-4)
    difference = VECTORS[:50] - VECTORS[50:100]
    typical = (difference @ queries.T).square().mean(1) / (queries.square().sum(1).mean() / WIDTH)
    assert torch.allclose(
        (difference @ items_DD).square().sum(1), typical + 0.5 * difference.square().sum(1), rtol=1e-4
    )
    for none in (None, torch.zeros(3, WIDTH)):
        items_DD, queries_DD = bases(WIDTH, none)
        assert torch.allclose(items_DD, queries_DD) and torch.allclose(
            items_DD @ items_DD.T, torch.eye(WIDTH), atol=1e-5
        )


def test_cells_by_what_typical_queries_ask_for_are_found_with_fewer_probes() -> None:
    """Queries along two of eight numbers: items are then gathered by these two."""
    queries = QUERIES * torch.tensor([1.0, 1.0, *6 * [0.01]])
    efforts = []
    for typical in (queries, None):
        index = empty("faiss_ivf_4bit", refine=8)
        index.typical_QD = typical
        index.add(KEYS, VECTORS)
        assert isinstance(index, SnapshotIndex)
        index.tune(queries)
        assert index.recall >= 0.95 and index.effort is not None
        efforts.append(index.effort)
    assert efforts[0] < 0.7 * efforts[1]


def test_cells_are_not_asked_where_nobody_knows_what_queries_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[set[str]] = []
    monkeypatch.setattr(auto, "chosen", lambda times: compared.append(set(times)) or 7 * ["exact"])
    for typical in (None, QUERIES):
        index = empty("auto")
        index.typical_QD = typical
        index.add(KEYS, VECTORS)
    assert compared[1] - compared[0] == {"faiss_ivf_4bit"} and {"exact", "faiss_4bit"} <= compared[0]


def test_what_cannot_be_mapped_is_built_by_each(tmp_path: Path) -> None:
    """What has changed since its snapshot was built, and what no library maps."""
    changed, tree = filled("ivf"), filled("tree")
    changed.remove(KEYS[:1])
    for index in (changed, tree):
        index.write_arrays(tmp_path)
        assert not (tmp_path / "snapshot.json").exists()
        again = empty("ivf" if index is changed else "tree")
        again.arrays = tmp_path
        again.restore(index.state())
        assert len(again) == len(index)
        assert shared(again.search(QUERIES, 30).item_keys_BK, index.search(QUERIES, 30).item_keys_BK) > 0.9


def test_random_operations_against_a_dictionary() -> None:
    """An index that probes everything is exact, and equals scoring what a dictionary holds, at any time."""
    generator = torch.Generator().manual_seed(0)
    index = empty("ivf", exact_below=40, cells=4, probes=4)
    held: dict[int, torch.Tensor] = {}
    for step in range(300):
        if len(held) < 30 or (len(held) < 120 and torch.rand(1, generator=generator) < 0.55):
            key, vector = int(torch.randint(10_000, (1,), generator=generator)), torch.randn(WIDTH, generator=generator)
            if key in held:
                continue
            held[key] = vector
            index.add(torch.tensor([key]), vector[None])
        else:
            key = list(held)[int(torch.randint(len(held), (1,), generator=generator))]
            del held[key]
            index.remove(torch.tensor([key]))
        if step % 7 == 0:
            keys = torch.tensor(sorted(held))
            best = exact(keys, torch.stack([held[int(key)] for key in keys])).search(QUERIES[:3], 10)
            assert torch.equal(index.search(QUERIES[:3], 10).item_keys_BK, best.item_keys_BK)
    assert len(index) == len(held)


def test_probing_the_same_cells_finds_what_the_inverted_file_of_faiss_finds() -> None:
    import faiss

    index = filled("ivf", cells=16, probes=3)
    assert isinstance(index, SnapshotIndex) and index.snapshot is not None
    cells, vectors = index.snapshot.library, index.snapshot.scan.vectors_ID
    quantizer = faiss.IndexFlatIP(WIDTH)
    quantizer.add(cells.centroids_CD.numpy())
    peer = faiss.IndexIVFFlat(quantizer, WIDTH, 16, faiss.METRIC_INNER_PRODUCT)
    peer.is_trained = True
    assigned = torch.empty(COUNT, dtype=torch.int64)
    for cell in range(16):
        assigned[cells.order_S[cells.begins[cell] : cells.begins[cell + 1]]] = cell
    ids = torch.arange(COUNT)
    peer.add_core(COUNT, faiss.swig_ptr(vectors.numpy()), faiss.swig_ptr(ids.numpy()), faiss.swig_ptr(assigned.numpy()))
    peer.nprobe = 3
    _, places = peer.search(QUERIES.numpy(), 10)
    found = index.search(QUERIES, 10).item_keys_BK
    assert torch.equal(found, index.snapshot.keys_S[torch.from_numpy(places)])


def test_graphs_make_inner_products_distances() -> None:
    """The nearest augmented point is the largest inner product, whatever the norms."""
    vectors = VECTORS * torch.linspace(0.1, 5, COUNT)[:, None]
    points = augmented(vectors)
    assert torch.allclose(points.norm(dim=1), vectors.norm(dim=1).max().expand(COUNT), rtol=1e-5)
    distance = torch.cdist(torch.cat([QUERIES, torch.zeros(20, 1)], 1).double(), points.double())
    assert torch.equal(distance.argmin(1), (QUERIES @ vectors.T).argmax(1))


def test_links_lead_to_every_item_unless_they_are_cut() -> None:
    index = filled("faiss_hnsw", links=8)
    assert isinstance(index, GraphIndex)
    assert reachable(index) == 1.0
    found = audit(index, QUERIES, k=20)
    assert found.recall > 0.9 and found.own == 1.0 and found.reachable == 1.0
    links = index.links()
    assert links is not None
    cut = links[0].clone()
    cut[torch.isin(cut, torch.arange(100))] = -1  # nobody's neighbours any more
    index.links = lambda: (cut, 500)  # type: ignore[method-assign]
    assert reachable(index) == pytest.approx(1 - 100 / COUNT, abs=1e-9)
    assert audit(filled("exact"), QUERIES) == (1.0, 1.0, None, COUNT)


def test_an_index_that_finds_too_little_says_so() -> None:
    with pytest.warns(UserWarning, match=r"index ivf: searches find 0\.\d+ of the 100 best items, less than the 0.95"):
        filled("ivf", cells=32, probes=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert filled("ivf", cells=32).search(QUERIES, 5).cost_B.max() < COUNT  # type: ignore[operator]


def test_efforts_rise_to_the_last() -> None:
    assert ladder(4, 10) == [4, 5, 6, 7, 8, 10] and ladder(7, 7) == [7]


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("hnswlib", "usearch", "usearch.index", "scann", "faiss"):
        monkeypatch.setitem(sys.modules, module, None)
    for name, extra in (("hnswlib", "hnswlib"), ("usearch", "ann"), ("scann", "ann"), ("faiss_hnsw", "retrieval")):
        with pytest.raises(MissingExtra, match=rf"index {name} needs \S+: pip install 'fullrank\[{extra}\]'"):
            VectorIndexSpec.of(name).build(4)


def test_a_retriever_searches_by_the_index_that_its_config_names(
    dataset: Dataset, items: Items, users: Batch, tmp_path: Path
) -> None:
    spec = RetrieverSpec.of({"name": "two_tower", "index": {"name": "ivf", "exact_below": 10, "cells": 4, "probes": 4}})
    retriever = spec.build(dataset.schema)
    retriever.index(items)
    plain = TwoTower(dataset.schema)
    plain.index(items)
    assert torch.equal(retriever.search(users, 7).item_keys_BK, plain.search(users, 7).item_keys_BK)
    assert retriever.cost() == 4 + 30 and plain.cost() == 30
    retriever.save(tmp_path)
    again = TwoTower.load(tmp_path, dataset.schema)
    assert again.config.index == spec.config.index  # type: ignore[attr-defined]
    assert torch.equal(again.search(users, 7).item_keys_BK, plain.search(users, 7).item_keys_BK)
    with pytest.raises(ValueError, match='vector index "hnsw" is unknown'):
        RetrieverSpec.of({"name": "two_tower", "index": "hnsw"})


def test_an_index_of_ones_own() -> None:
    @register_index
    class Reversed(ExactIndex):
        name = "reversed"

        def search(self, queries_BD, k, *, allowed=None):  # type: ignore[no-untyped-def]
            return super().search(-queries_BD, k, allowed=allowed)

    try:
        index = VectorIndexSpec.of("reversed").build(WIDTH)
        index.add(KEYS, VECTORS)
        worst = (QUERIES @ VECTORS.T).argmin(1)
        assert torch.equal(index.search(QUERIES, 1).item_keys_BK[:, 0], KEYS[worst])
    finally:
        VECTOR_INDEXES.unregister("reversed")


@pytest.mark.parametrize("name", NAMES)
def test_a_fork_sees_nothing_of_the_changes_of_the_other(name: str) -> None:
    index = filled(name)
    before = index.search(QUERIES, 30)
    fork = index.fork()
    assert fork is not index
    # So much that a snapshot is built anew.
    gone, come = KEYS[: COUNT // 2], torch.arange(10 * COUNT, 10 * COUNT + 300)
    fork.remove(gone)
    fork.add(come, 2 * VECTORS[:300])
    assert torch.equal(index.search(QUERIES, 30).item_keys_BK, before.item_keys_BK) and len(index) == COUNT
    found = fork.search(QUERIES, 30).item_keys_BK
    assert len(fork) == COUNT - len(gone) + 300 and not bool(torch.isin(found, gone).any())
    expected = exact(torch.cat([KEYS[COUNT // 2 :], come]), torch.cat([VECTORS[COUNT // 2 :], 2 * VECTORS[:300]]))
    assert shared(found, expected.search(QUERIES, 30).item_keys_BK) > 0.9


@pytest.mark.parametrize("count", [3, 500])
def test_few_and_many_are_added_and_removed_alike(count: int) -> None:
    index, more = exact(KEYS, VECTORS), torch.arange(10 * COUNT, 10 * COUNT + count)
    mixed = torch.cat([more, KEYS[:count]])
    index.remove(KEYS[:count])
    index.add(mixed.flip(0), torch.cat([VECTORS[:count] + 1, VECTORS[:count]]).flip(0))
    keys, vectors = index.contents()
    expected_keys, order = torch.cat([KEYS, more]).sort()
    assert torch.equal(keys, expected_keys)
    assert torch.equal(vectors, torch.cat([VECTORS, VECTORS[:count] + 1])[order])
    with pytest.raises(ValueError, match="in the index already or given twice"):
        index.add(KEYS[:count], VECTORS[:count])
    with pytest.raises(ValueError, match="in the index already or given twice"):
        index.add(torch.full((count,), 20 * COUNT), VECTORS[:count])
    with pytest.raises(KeyError):
        index.remove(torch.tensor([20 * COUNT + 1]))
    assert len(index) == COUNT + count
