"""Facts about retrievers of implicit feedback; that they keep the contract is in `test_base`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fullrank.batch import Batch, RowGather
from fullrank.data.dataset import Dataset
from fullrank.retrieval import Items, RetrieverSpec
from fullrank.retrieval.implicit.base import ImplicitRetriever
from fullrank.retrieval.implicit.graph_blend import GraphBlend
from fullrank.retrieval.implicit.graph_filter import GraphFilter
from fullrank.retrieval.implicit.interactions import Interactions
from fullrank.retrieval.implicit.lightgcn import LightGCN
from fullrank.retrieval.implicit.simplex import SimpleX
from fullrank.schema import FIRST_VOCABULARY_ID

SMALL = {"dim": 8, "batch_size": 4, "epochs": 30, "learning_rate": 0.05}
PAIRWISE = {**SMALL, "batch_size": 32}
KINDS: list[dict[str, Any]] = [
    {"name": "mf_bpr", **PAIRWISE},
    {"name": "lightgcn", "loss": "bpr", **PAIRWISE},
    {"name": "lightgcn", **SMALL},
    {"name": "lightgcn", "loss": "cosine_contrastive", "margin": 0.5, "negative_weight": 30.0, **SMALL},
    {"name": "simplex", "margin": 0.2, "negative_weight": 10.0, **SMALL},
    {"name": "graph_filter"},
    {"name": "graph_blend", "vectors": {"layers": 1, **SMALL}},
]


@pytest.fixture(scope="module")
def pairs(dataset: Dataset) -> Interactions:
    return Interactions.of(dataset)


def dense(pairs: Interactions) -> torch.Tensor:
    """The 0/1 matrix (U, I)."""
    matrix_UI = torch.zeros(pairs.users, pairs.items, dtype=torch.float64)
    matrix_UI[pairs.user_P, pairs.item_P] = 1
    return matrix_UI


def test_pairs_are_distinct_and_positive(dataset: Dataset, pairs: Interactions) -> None:
    rows = dataset.scan("train").collect()
    expected = {(u, i) for u, i, label in rows.select("user_id", "item_id", "click").iter_rows() if label == 1}
    found = zip(pairs.user_ids_U[pairs.user_P].tolist(), pairs.item_ids_I[pairs.item_P].tolist(), strict=True)
    assert len(pairs) == len(expected) and set(found) == expected
    row_Q, item_Q = pairs.of_users(torch.tensor([5, 2]))
    for place, user in enumerate((5, 2)):
        assert torch.equal(item_Q[row_Q == place], dense(pairs)[user].nonzero()[:, 0])
    user_B = torch.randint(pairs.users, (2000,))
    other_B = pairs.others(user_B, rounds=60)
    assert not bool(dense(pairs)[user_B, other_B].any())
    assert torch.unique(other_B).numel() == pairs.items


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(kind.get(key)) for key in ("name", "loss")))
def test_it_learns_who_takes_what_and_a_new_item_has_each_users_mean_score(
    kind: dict[str, Any], dataset: Dataset, items: Items, users: Batch
) -> None:
    retriever = RetrieverSpec.of(kind).build(dataset.schema).fit(dataset)
    retriever.index(items)
    found = retriever.search(users, 10).item_keys_BK
    parity = torch.tensor([int(name[1:]) % 2 for name in dataset.catalogue("user")["__user_id"]])
    assert float((found % 2 == parity[:, None]).float().mean()) > 0.95
    ids_BF = torch.zeros_like(items.features.ids_BF[:1])
    new = Items(torch.tensor([777]), replace(RowGather(items.features).take(torch.tensor([0])), ids_BF=ids_BF))
    retriever.add(new)
    stranger = replace(users[:1], ids_BF=torch.zeros_like(users.ids_BF[:1]))
    asked = Batch.cat([users, stranger])
    result = retriever.search(asked, 31)
    own_B = result.scores_BK[result.item_keys_BK == 777]
    others_B = (result.scores_BK.sum(1) - own_B) / 30
    assert torch.allclose(own_B, others_B, atol=1e-5)
    assert len(set(result.item_keys_BK[-1].tolist())) == 31


@pytest.mark.parametrize("layers", [0, 2])
def test_lightgcn_smooths_with_the_normalised_adjacency_matrix(
    layers: int, dataset: Dataset, pairs: Interactions
) -> None:
    """With a learning rate of almost 0 the vectors are those that it starts with, smoothed."""
    config = LightGCN.Config(dim=4, layers=layers, loss="bpr", epochs=1, learning_rate=1e-9, seed=3)
    retriever = LightGCN(dataset.schema, config).fit(dataset)
    torch.manual_seed(3)
    start_ND = torch.cat([vectors.detach() for vectors in retriever.start(pairs)]).double()
    size = pairs.users + pairs.items
    graph_NN = torch.zeros(size, size, dtype=torch.float64)
    graph_NN[: pairs.users, pairs.users :] = dense(pairs)
    graph_NN += graph_NN.T.clone()
    root_N = graph_NN.sum(1).sqrt()
    graph_NN /= root_N[:, None] * root_N
    expected_ND = sum(torch.matrix_power(graph_NN, layer) @ start_ND for layer in range(layers + 1)) / (layers + 1)
    found_ND = torch.cat([retriever.user_UD[pairs.user_ids_U], retriever.item_ID[pairs.item_ids_I]])
    assert torch.allclose(found_ND.double(), expected_ND, atol=1e-6)


def test_a_user_of_simplex_begins_as_the_direction_of_the_mean_of_what_was_taken(
    dataset: Dataset, pairs: Interactions
) -> None:
    """With a learning rate of almost 0; no dropout is left in what is searched."""
    config = SimpleX.Config(dim=4, dropout=0.5, epochs=1, learning_rate=1e-9, seed=3)
    retriever = SimpleX(dataset.schema, config).fit(dataset)
    torch.manual_seed(3)
    item_ID = retriever.start(pairs)[1].detach().double()
    mean_UD = dense(pairs) @ item_ID / dense(pairs).sum(1, keepdim=True)
    for found_ND, expected_ND in (
        (retriever.user_UD[pairs.user_ids_U], mean_UD),
        (retriever.item_ID[pairs.item_ids_I], item_ID),
    ):
        assert torch.allclose(found_ND.double(), torch.nn.functional.normalize(expected_ND, dim=1), atol=1e-5)


@pytest.mark.parametrize("user_power", [1.0, 0.7, 0.0])
def test_graph_filter_is_its_formula(user_power: float, dataset: Dataset, pairs: Interactions, users: Batch) -> None:
    config = GraphFilter.Config(rank=2, low_pass=0.4, sharpening=0.6, popularity=0.2, user_power=user_power)
    taken_UI = dense(pairs)
    root_I = taken_UI.sum(0).sqrt()
    normal_UI = taken_UI / taken_UI.sum(1, keepdim=True) ** (user_power / 2) / root_I
    graph_II = normal_UI.T @ normal_UI
    top = float(torch.linalg.eigvalsh(graph_II)[-1])
    assert (top == pytest.approx(1)) is (user_power == 1)
    graph_II /= top
    leading_IR = torch.linalg.eigh(graph_II).eigenvectors[:, -2:]
    common_II = leading_IR @ leading_IR.T
    sharp_II = torch.eye(pairs.items, dtype=torch.float64) - 0.6 * graph_II
    filter_II = graph_II @ sharp_II + 0.4 * (common_II @ sharp_II) / root_I[:, None] * root_I
    expected_UI = taken_UI @ filter_II * root_I**0.4
    found_UI = GraphFilter(dataset.schema, config).fit(dataset).scores(users)
    assert torch.allclose(found_UI.double(), expected_UI[_order(users, pairs)], atol=1e-4)


def test_a_blend_adds_what_is_standardised_for_each_user(dataset: Dataset, pairs: Interactions, users: Batch) -> None:
    vectors = LightGCN.Config(loss="cosine_contrastive", dim=4, epochs=1)
    blend = GraphBlend(dataset.schema, GraphBlend.Config(vectors=vectors, weight=0.7, steepness=9.0)).fit(dataset)
    learnt = LightGCN(dataset.schema, vectors).fit(dataset)
    cosine_UI = learnt.user_vectors(users) @ learnt.item_ID[pairs.item_ids_I].T
    parts = (GraphFilter(dataset.schema).fit(dataset).scores(users), (9 * cosine_UI).exp())
    expected = [(part - part.mean(1, keepdim=True)) / part.std(1, keepdim=True, correction=0) for part in parts]
    assert torch.allclose(blend.scores(users), expected[0] + 0.7 * expected[1], atol=1e-4)


def _order(users: Batch, pairs: Interactions) -> torch.Tensor:
    return torch.searchsorted(pairs.user_ids_U, users.ids_BF[:, 0].contiguous())


def test_a_user_without_a_row_gets_what_suits_the_average_user(dataset: Dataset, users: Batch) -> None:
    retriever = RetrieverSpec.of({"name": "simplex", **SMALL, "epochs": 1}).build(dataset.schema).fit(dataset)
    assert isinstance(retriever, ImplicitRetriever)
    stranger = replace(users[:1], ids_BF=torch.zeros_like(users.ids_BF[:1]))
    assert torch.allclose(
        retriever.user_vectors(stranger)[0], retriever.user_UD[FIRST_VOCABULARY_ID:].mean(0), atol=1e-5
    )


def test_both_ids_have_to_be_features(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match='needs the user_id as a feature: .* key "user_id" is none of its categorical'):
        RetrieverSpec.of("lightgcn").build(dataset.schema.without(["user_id"]))


def test_a_blend_wants_cosines() -> None:
    with pytest.raises(ValueError, match='expected the loss "softmax" or "cosine_contrastive", got "bpr"'):
        RetrieverSpec.of({"name": "graph_blend", "vectors": {"loss": "bpr"}})


def test_state_that_contradicts_itself_is_refused(dataset: Dataset, items: Items) -> None:
    filtered = GraphFilter(dataset.schema).fit(dataset)
    filtered.index(items)
    for name, wrong, text in (
        ("pairs.items", filtered.state()["pairs.items"] + 1000, "not in order, or name"),
        ("pairs.users", filtered.state()["pairs.users"][:-1], "users and"),
        ("index.items", filtered.state()["index.items"][:-1], "keys of items"),
        ("basis", filtered.state()["basis"][1:], "the basis has"),
        ("values", -filtered.state()["values"], "largest eigenvalue"),
        ("items", filtered.state()["items"].flip(0), "ids of the items"),
    ):
        with pytest.raises(ValueError, match=text):
            GraphFilter(dataset.schema).restore({**filtered.state(), name: wrong})
    learnt = LightGCN(dataset.schema, LightGCN.Config(dim=2, epochs=1)).fit(dataset)
    with pytest.raises(ValueError, match="vectors of 3 users"):
        LightGCN(dataset.schema, LightGCN.Config(dim=2)).restore({**learnt.state(), "users": torch.zeros(3, 2)})
