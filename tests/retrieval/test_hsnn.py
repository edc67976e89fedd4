"""Facts about networks over a learnt index: training, search and what is saved."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fullrank.batch import Batch, RowGather
from fullrank.data.dataset import Dataset
from fullrank.data.loader import partial_batch
from fullrank.retrieval import RETRIEVERS, Items, RetrieverSpec
from fullrank.retrieval.hierarchy import StaleIndexError
from fullrank.retrieval.hierarchy.hsnn import HSNN, MoNNRetriever, representatives, training_data
from fullrank.retrieval.hierarchy.training import NODE_USERS, HierarchicalTrainer, Members

SMALL: dict[str, Any] = {"user_vectors": 2, "vector_dim": 8, "hidden": (16,), "over_arch_hidden": (8,)}
TRAINING: dict[str, Any] = {"batch_size": 64, "epochs": 6, "negatives": 16, "learning_rate": 0.02, "refresh_every": 20}


def config(
    *num_nodes: int,
    beam: tuple[int, ...] = (),
    training: dict[str, Any] | None = None,
    linear_ensemble: bool = True,
    **more: Any,
) -> HSNN.Config:
    return HSNN.Config(
        linear_ensemble=linear_ensemble,
        items=SMALL,
        nodes=(SMALL,),
        tree={"num_nodes": num_nodes},
        beam=beam or tuple(itertools.accumulate(num_nodes, operator.mul)),
        exact_below=0,
        training={**TRAINING, **(training or {})},
        **more,
    )


@pytest.fixture(scope="module")
def fitted(dataset: Dataset, items: Items) -> HSNN:
    """Two levels on 30 items, trained jointly."""
    retriever = HSNN(dataset.schema, config(4, 3)).fit(dataset)
    retriever.index(items)
    return retriever


def other_parity(retriever: MoNNRetriever, dataset: Dataset) -> float:
    """Share of a user's first ten that they would not click on."""
    catalogue = dataset.catalogue("user")
    found = retriever.search(partial_batch(catalogue, dataset.schema), 10).item_keys_BK
    parity = torch.tensor([int(name[1:]) % 2 for name in catalogue["__user_id"]])
    return float((found % 2 != parity[:, None]).float().mean())


@pytest.mark.parametrize("mode", ["em", "separate"])
def test_it_learns_who_clicks_what_whatever_the_mode(mode: str, dataset: Dataset, items: Items) -> None:
    retriever = HSNN(dataset.schema, config(4, training={"mode": mode})).fit(dataset)
    retriever.index(items)
    assert other_parity(retriever, dataset) < 0.1


def test_it_learns_who_clicks_what_jointly(fitted: HSNN, dataset: Dataset) -> None:
    assert other_parity(fitted, dataset) < 0.05
    occupancy = fitted.nodes.occupancy(
        fitted.codes(fitted.network.stored(partial_batch(dataset.catalogue("item"), dataset.schema)))
    )
    assert occupancy[0]["effective"] > 2


def test_it_learns_from_impressions_and_from_a_teacher(dataset: Dataset, items: Items) -> None:
    """Without any softmax: clicks against impressions that were not clicked, and a slow copy for what was not shown."""
    training = {"softmax": 0.0, "impressions": 1.0, "distillation": 0.3, "batch_size": 128}
    retriever = HSNN(dataset.schema, config(4, linear_ensemble=False, training=training)).fit(dataset)
    retriever.index(items)
    assert other_parity(retriever, dataset) < 0.1
    with pytest.raises(ValueError, match="one of softmax and impressions"):
        HSNN(dataset.schema, config(4, training={"softmax": 0.0})).fit(dataset)


def test_a_beam_of_all_nodes_is_brute_force_with_the_ensemble(fitted: HSNN, items: Items, users: Batch) -> None:
    """The reference is worked out by hand, pair by pair."""
    network, codes = fitted.network, fitted.codes(fitted.network.stored(items.features))
    with torch.no_grad():
        encoded = network.encode_users(users)
        stored = network.stored(items.features)
        scores = network.stored_logits(encoded, stored)[..., 0] * network.ensemble.weights[2][2]
        for level in range(2):
            q = network.index.node_vectors(codes[:, : level + 1])  # type: ignore[union-attr]
            scores += network.node_logits(level, encoded, q)[..., 0] * network.ensemble.weights[2][level]
        scores += network.ensemble.bias_LT[2]
    found = fitted.search(users, 30)
    assert torch.allclose(found.scores_BK, scores.sort(1, descending=True).values, atol=1e-4)
    assert torch.allclose(scores.gather(1, found.item_keys_BK), found.scores_BK, atol=1e-4)
    assert fitted.hierarchy is not None
    exact = fitted.hierarchy.search_exact(fitted.scorer, encoded, 30)
    assert torch.equal(exact.item_keys_BK, found.item_keys_BK)


def test_a_wider_beam_finds_no_less_and_scores_more(fitted: HSNN, users: Batch) -> None:
    assert fitted.hierarchy is not None
    with torch.no_grad():
        encoded = fitted.network.encode_users(users)
    best = fitted.search(users, 20).item_keys_BK
    recall, cost = [], []
    for beam in (1, 2, 4):
        found = fitted.hierarchy.search(fitted.scorer, encoded, 20, (beam, 100), max_items=1000)
        recall.append(float((found.item_keys_BK[:, :, None] == best[:, None]).any(1).float().mean()))
        cost.append(float(found.cost_B.float().mean()))
        # What a search says it cost: nodes of either level and items, each times its network.
        stats = found.stats
        pairs = [*stats.nodes_BN.sum(0).tolist(), int(stats.items_B.sum())]
        *of_nodes, of_items = [network.flops_per_pair() for network in fitted.network.networks()]
        each = [*(flops + of_items for flops in of_nodes), of_items]  # the items' network scores nodes too
        assert stats.flops == sum(n * flops for n, flops in zip(pairs, each, strict=True))
    assert recall == sorted(recall) and recall[0] < 1 and recall[-1] == 1
    assert cost == sorted(cost) and cost[-1] == 30


def test_a_network_that_learnt_more_is_not_searched_with_the_old_index(
    dataset: Dataset, items: Items, users: Batch
) -> None:
    retriever = HSNN(dataset.schema, config(4, training={"epochs": 1}))
    retriever.index(items)
    retriever.fit(dataset)
    with pytest.raises(StaleIndexError):
        retriever.search(users, 3)
    retriever.index(items)
    assert retriever.search(users, 3).found_BK.all()


@pytest.mark.parametrize("node_vectors", ["codebook", "mean", "representative"])
def test_a_saved_index_that_was_changed_searches_alike(
    node_vectors: str, dataset: Dataset, items: Items, users: Batch, tmp_path: Path
) -> None:
    retriever = HSNN(dataset.schema, config(4, 3, beam=(2, 3), node_vectors=node_vectors, training={"epochs": 1}))
    retriever.fit(dataset)
    half = torch.arange(0, 30, 2)
    rows = RowGather(items.features)
    retriever.index(Items(items.keys_I[half], rows.take(half)))
    retriever.add(Items(items.keys_I[half + 1], rows.take(half + 1)))
    retriever.remove(items.keys_I[[4, 9]])
    retriever.save(tmp_path)
    again = HSNN.load(tmp_path, dataset.schema)
    before, after = retriever.search(users, 9), again.search(users, 9)
    assert torch.equal(before.item_keys_BK, after.item_keys_BK)
    assert torch.allclose(before.scores_BK, after.scores_BK, atol=1e-5)


def test_the_representative_of_a_node_is_the_nearest_of_its_items(fitted: HSNN, items: Items) -> None:
    vectors = fitted.network.stored(items.features)[:, : fitted.nodes.dim]
    codes = fitted.nodes.assign(vectors)
    found = representatives(fitted.nodes, vectors, codes)
    assert [len(part) for part in found] == [4, 12]
    for prefix in torch.cartesian_prod(torch.arange(4), torch.arange(3)):
        here = vectors[(codes == prefix).all(1)]
        node = fitted.nodes.node_vectors(prefix[None])
        expected = here[(here - node).square().sum(1).argmin()] if len(here) else node[0]
        assert torch.allclose(found[1][int(prefix[0]) * 3 + int(prefix[1])], expected)


def test_members_are_drawn_from_the_node_and_scored_as_a_search_does(fitted: HSNN, items: Items, users: Batch) -> None:
    stored = fitted.network.stored(items.features)
    members = Members.of(stored, fitted.codes(stored), 1)
    drawn = members.draw(100, 20, torch.Generator().manual_seed(0))
    assert len(drawn) == len(torch.unique(fitted.codes(stored), dim=0))
    assert bool((members.codes_IN[drawn] == members.codes_IN[drawn[:, :1]]).all())
    with torch.no_grad():
        encoded = fitted.network.encode_users(users)
        scores = members.scores(fitted.network, encoded, torch.arange(30), 0)
    assert torch.allclose(scores.sort(1, descending=True).values, fitted.search(users, 30).scores_BK, atol=1e-4)


def test_nodes_learn_nothing_before_there_is_an_index(dataset: Dataset) -> None:
    retriever = HSNN(dataset.schema, config(4))
    trainer = HierarchicalTrainer(
        retriever.network, training_data(dataset, every_row=False), dataset.schema, retriever.config.training
    )
    losses = trainer.losses(torch.arange(64))
    assert set(losses) == {"softmax"}
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in retriever.network.node_networks.parameters())
    trainer.refresh(first=True)
    assert {"index balance", "index quantization"} <= set(trainer.losses(torch.arange(64)))


def test_a_node_is_an_item_of_no_interactions_and_what_its_network_adds(fitted: HSNN, users: Batch) -> None:
    """The items' network does not learn from it."""
    network = fitted.network
    encoded, nodes = network.encode_users(users), network.index.codebooks[0].detach()  # type: ignore[union-attr]
    nobody = torch.full((len(nodes), network.counts.num_values), -1)
    with torch.no_grad():
        as_items = network.item_logits(encoded, nodes, nobody)
        added = network.node_networks[0].score_grid(encoded.vectors[0], nodes)  # type: ignore[operator]
    logits = network.node_logits(0, encoded, nodes)
    assert torch.allclose(logits, as_items + added, atol=1e-5)
    assert float(as_items.std()) > 0.1
    gradients = torch.autograd.grad(logits.sum(), [*network.item_network.parameters()], allow_unused=True)
    assert all(gradient is None for gradient in gradients)


def test_what_progress_tells_of_is_the_loss_of_items(dataset: Dataset) -> None:
    retriever = HSNN(dataset.schema, config(4, linear_ensemble=False, training={"batch_size": 128}))
    data, settings = training_data(dataset, every_row=False), retriever.config.training
    trainer = HierarchicalTrainer(retriever.network, data, dataset.schema, settings)
    rows, state = torch.arange(128), trainer.generator.get_state()
    before = trainer.losses(rows)["softmax"]
    trainer.refresh(first=True)
    trainer.generator.set_state(state)
    losses = trainer.losses(rows)
    assert torch.equal(losses["softmax"], before)
    # Nodes learn from the first users of the step, among all its items.
    trainer.generator.set_state(state)
    others = torch.cat([rows[:NODE_USERS], rows[NODE_USERS:].flip(0)])
    assert torch.allclose(trainer.losses(others)["node softmax"], losses["node softmax"])
    trainer.generator.set_state(state)
    assert not torch.allclose(trainer.losses(rows.flip(0))["node softmax"], losses["node softmax"])


def test_an_item_that_is_drawn_beside_its_positive_or_has_two_rows_comes_once(dataset: Dataset) -> None:
    """The loss of a step is that of its distinct items, each less log Q, in whatever company they came."""
    retriever = HSNN(dataset.schema, config(4, training={"negatives": 40}))  # of 30 items: all meet again
    data, settings = training_data(dataset, every_row=False), retriever.config.training
    trainer = HierarchicalTrainer(retriever.network, data, dataset.schema, settings)
    rows = torch.arange(50)
    drawn = torch.randint(0, 30, (40,), generator=torch.Generator().manual_seed(settings.seed))
    here = torch.tensor(sorted({*data.item_P[rows].tolist(), *drawn.tolist()}))
    share = torch.bincount(data.item_P, minlength=30) / len(data.item_P)
    network = retriever.network
    users = network.encode_users(data.rows.take(rows))
    logits = network.item_logits(users, *network.encode_items(data.items.take(here)))[..., 0]
    in_step = 1 - (1 - share[here]) ** 50 * (1 - 1 / 30) ** 40
    own = (here == data.item_P[rows, None]).int().argmax(1)
    expected = torch.nn.functional.cross_entropy(logits - in_step.log(), own)
    assert torch.allclose(trainer.losses(rows)["softmax"], expected, atol=1e-4)


def test_the_config_is_checked(dataset: Dataset) -> None:
    for wrong, message in (
        ({"beam": [4, 4]}, "expected a width for each of the 1 levels"),
        ({"nodes": [SMALL, SMALL]}, "expected 1 or 1, one for each level"),
        ({"training": {"mode": "both"}}, "training.mode"),
        ({"tree": {"num_nodes": [0]}}, "num_nodes"),
    ):
        with pytest.raises((ValidationError, ValueError), match=message):
            RetrieverSpec.of({"name": "hsnn", **wrong})
    spec = RetrieverSpec.of({"name": "hsnn", "items": SMALL})
    with pytest.raises(ValueError, match="as many item vectors"):
        spec.build(dataset.schema)
    with pytest.raises(ValueError, match='no label "buy"'):
        RETRIEVERS["monn"](dataset.schema, MoNNRetriever.Config(value={"buy": 1.0}))
    with pytest.raises(ValueError, match="more nodes than the 30 items"):
        HSNN(dataset.schema, config(64)).fit(dataset)


def test_one_network_is_enough_for_a_brute_force_search(dataset: Dataset, items: Items, users: Batch) -> None:
    retriever = MoNNRetriever(dataset.schema, MoNNRetriever.Config(items=SMALL, training=TRAINING)).fit(dataset)
    retriever.index(items)
    assert other_parity(retriever, dataset) < 0.05
    found = retriever.search(users, 3)
    assert found.cost_B.tolist() == [30] * len(users)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
