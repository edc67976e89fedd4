from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fullrank.batch import Batch
from fullrank.embeddings import EmbeddingCollection, EmbeddingOptimizer, Tables
from fullrank.schema import Categorical, EventId, Label, MultiCategorical, Schema, Sequence

SCHEMA = Schema(
    features=(
        Categorical(name="user", num_embeddings=50),
        Categorical(name="item", num_embeddings=30),
        MultiCategorical(name="genres", num_embeddings=8),
        Sequence(name="history", fields=(EventId(name="item", table="item", num_embeddings=30),)),
    ),
    labels=(Label(name="y"),),
)


def make_batch(seed: int, rows: int = 64) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 5, (2, rows), generator=generator)
    return Batch(
        numeric_BN=torch.zeros(rows, 0),
        ids_BF=torch.stack([torch.randint(0, n, (rows,), generator=generator) for n in (50, 30)], 1),
        jagged_keys=("genres", "history.item"),
        jagged_values=torch.cat(
            [torch.randint(0, n, (int(k.sum()),), generator=generator) for n, k in zip((8, 30), lengths, strict=True)]
        ),
        jagged_lengths_KB=lengths,
        event_keys=(),
        event_values=torch.zeros(0),
        event_lengths_EB=torch.zeros(0, rows, dtype=torch.int64),
        labels_BT=torch.zeros(rows, 1),
    )


def loss_of(collection: EmbeddingCollection, batch: Batch) -> torch.Tensor:
    embedded = collection(batch)
    history, _ = embedded.padded("history.item")
    target = torch.linspace(-1, 1, embedded.flat.numel()).view_as(embedded.flat)
    return ((embedded.flat - target).square().sum() + (history.sin() * embedded.flat[:, None, :8]).sum()) / 30


def train(steps: int = 100, **options: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    optimizer = EmbeddingOptimizer(**{"learning_rate": 0.05, **options.pop("optimizer")})
    collection = EmbeddingCollection(
        SCHEMA, Tables(embedding_dim=8, init_std=0.1), optimizer=optimizer, **options
    ).train()
    for step in range(steps):
        loss_of(collection, make_batch(step)).backward()
    return dict(collection.state_dict())


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "row_wise_adagrad"])
def test_fbgemm_and_torch_backends_agree_after_100_steps(kind: str) -> None:
    pytest.importorskip("fbgemm_gpu")
    ours, theirs = (train(optimizer={"kind": kind}, backend=backend) for backend in ("torch", "fbgemm"))
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-5)


def reference(kind: str, steps: int) -> dict[str, torch.Tensor]:
    """Dense autograd and textbook formulas, rows without any occurrence left alone."""
    torch.manual_seed(0)
    collection = EmbeddingCollection(SCHEMA, Tables(embedding_dim=8, init_std=0.1)).train()
    weight = collection._buffer(0).weight_RD
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, steps + 1):
        weight.grad = None
        batch = make_batch(step - 1)
        loss_of(collection, batch).backward()
        assert weight.grad is not None
        g, rows = weight.grad, weight.grad.abs().sum(1) > 0
        with torch.no_grad():
            if kind == "sgd":
                weight[rows] -= 0.05 * g[rows]
            elif kind == "adagrad":
                first[rows] += g[rows] ** 2
                weight[rows] -= 0.05 * g[rows] / (first[rows].sqrt() + 1e-8)
            elif kind == "row_wise_adagrad":
                first[rows] += (g[rows] ** 2).mean(1, keepdim=True)
                weight[rows] -= 0.05 * g[rows] / (first[rows].sqrt() + 1e-8)
            else:
                first[rows] = 0.9 * first[rows] + 0.1 * g[rows]
                second[rows] = 0.999 * second[rows] + 0.001 * g[rows] ** 2
                rate = 0.05 * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
                weight[rows] -= rate * first[rows] / (second[rows].sqrt() + 1e-8)
    return dict(collection.state_dict())


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "row_wise_adagrad", "adam"])
def test_fused_update_is_the_textbook_rule_on_merged_gradients(kind: str) -> None:
    expected = reference(kind, 20)
    for key, value in train(20, optimizer={"kind": kind}, backend="torch").items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


def test_lazy_l2_equals_the_exact_penalty_for_sgd() -> None:
    torch.manual_seed(0)
    exact = EmbeddingCollection(
        SCHEMA, Tables(embedding_dim=8, init_std=0.1), optimizer=EmbeddingOptimizer(kind="dense", l2=0.3)
    ).train()
    torch.manual_seed(0)
    lazy = EmbeddingCollection(
        SCHEMA,
        Tables(embedding_dim=8, init_std=0.1),
        backend="torch",
        optimizer=EmbeddingOptimizer(kind="sgd", learning_rate=0.05, l2=0.3, l2_mode="lazy"),
    ).train()
    optimizer = torch.optim.SGD(exact.parameters(), lr=0.05)
    for step in range(30):
        batch = make_batch(step, rows=4)
        optimizer.zero_grad()
        loss_of(exact, batch).backward()
        exact.before_step()
        optimizer.step()
        loss_of(lazy, batch).backward()
        lazy.after_step()
    expected = exact.state_dict()
    for key, value in lazy.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)


def test_tables_of_different_widths_give_what_they_give_alone() -> None:
    wide = SCHEMA.model_copy(
        update={"features": (SCHEMA.features[0].model_copy(update={"embedding_dim": 4}), *SCHEMA.features[1:])}
    )
    collection = EmbeddingCollection(wide, Tables(embedding_dim=8, init_std=1.0)).eval()
    batch = make_batch(0)
    embedded = collection(batch)
    tables = collection.state_dict()
    torch.testing.assert_close(embedded.flat[:, :4], tables["tables.user.weight"][batch.ids_BF[:, 0]])
    torch.testing.assert_close(embedded.flat[:, 4:12], tables["tables.item.weight"][batch.ids_BF[:, 1]])
    values, lengths = batch.jagged("genres")
    row = 0
    while int(lengths[row]) < 2:
        row += 1
    begin = int(lengths[:row].sum())
    bag = tables["tables.genres.weight"][values[begin : begin + int(lengths[row])]]
    torch.testing.assert_close(embedded.flat[row, 12:], bag.mean(0))
    with pytest.raises(ValueError, match="one embedding width"):
        _ = embedded.tokens_BFD


def test_padding_keeps_order_and_marks_the_end() -> None:
    collection = EmbeddingCollection(SCHEMA, Tables(embedding_dim=8, init_std=1.0)).eval()
    batch = make_batch(1)
    history, mask = collection(batch).padded("history.item")
    values, lengths = batch.jagged("history.item")
    assert torch.equal(mask.sum(1), lengths)
    table = collection.state_dict()["tables.item.weight"]
    for row, ids in enumerate(values.split(lengths.tolist())):
        assert torch.equal(history[row, : len(ids)], table[ids])
        assert not history[row, len(ids) :].any()


def test_state_moves_between_backends_and_continues_exactly() -> None:
    torch.manual_seed(0)
    optimizer = EmbeddingOptimizer(kind="adam", learning_rate=0.05)
    first = EmbeddingCollection(SCHEMA, Tables(embedding_dim=8), optimizer=optimizer).train()
    for step in range(5):
        loss_of(first, make_batch(step)).backward()
    second = EmbeddingCollection(SCHEMA, Tables(embedding_dim=8), optimizer=optimizer, backend="torch").train()
    second.load_state_dict(first.state_dict())
    second.load_optimizer_state({key: value.clone() for key, value in first.optimizer_state().items()})
    for step in range(5, 9):
        loss_of(first, make_batch(step)).backward()
        loss_of(second, make_batch(step)).backward()
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])


def test_an_id_outside_its_table_is_named() -> None:
    collection = EmbeddingCollection(SCHEMA, Tables(embedding_dim=8))
    batch = make_batch(0)
    batch.ids_BF[3, 1] = 30
    with pytest.raises(IndexError, match='feature "item": id 30 is outside its table of 30 rows'):
        collection(batch)
    batch = make_batch(0)
    batch.jagged_values[0] = -1
    with pytest.raises(IndexError, match='feature "genres": id -1'):
        collection(batch)


def test_exact_l2_needs_the_dense_kind() -> None:
    with pytest.raises(ValueError, match="touches every row"):
        EmbeddingOptimizer(kind="adam", l2=0.1)


def test_demanding_fbgemm_where_it_cannot_serve_says_why() -> None:
    pytest.importorskip("fbgemm_gpu")
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        EmbeddingCollection(SCHEMA, Tables(embedding_dim=6), backend="fbgemm", optimizer=EmbeddingOptimizer(kind="sgd"))


@pytest.mark.parametrize(
    "optimizer",
    [
        EmbeddingOptimizer(l2=0.3),
        EmbeddingOptimizer(kind="sgd", learning_rate=0.05, l2=0.3, l2_mode="lazy"),
        EmbeddingOptimizer(kind="row_wise_adagrad", learning_rate=0.05),
    ],
    ids=["dense", "sgd", "row_wise_adagrad"],
)
def test_frozen_tables_stand_still_and_learn_again_from_where_they_were(optimizer: EmbeddingOptimizer) -> None:
    collection = EmbeddingCollection(SCHEMA, Tables(embedding_dim=8, init_std=0.1), optimizer=optimizer).train()
    parameters = list(collection.parameters())

    def moved(steps: range) -> float:
        before = {name: value.clone() for name, value in collection.state_dict().items()}
        for step in steps:
            descent = torch.optim.SGD(parameters, lr=0.05)
            # A frozen collection is part of a model that learns.
            (loss_of(collection, make_batch(step)) + torch.zeros((), requires_grad=True)).backward()
            collection.before_step()
            descent.step()
            descent.zero_grad()
            collection.after_step()
        return max(float((before[name] - value).abs().max()) for name, value in collection.state_dict().items())

    assert moved(range(3)) > 0
    torch.nn.ModuleList([collection]).requires_grad_(False)
    assert moved(range(3, 6)) == 0
    collection.requires_grad_(True)
    assert moved(range(6, 9)) > 0


def test_decay_that_is_due_when_tables_are_frozen_is_still_applied_to_lookups() -> None:
    optimizer = EmbeddingOptimizer(kind="sgd", learning_rate=0.1, l2=0.5, l2_mode="lazy")
    collection = EmbeddingCollection(SCHEMA, Tables(embedding_dim=8, init_std=1.0), optimizer=optimizer).train()
    batch = make_batch(0)
    fresh = collection(batch).flat.detach()
    collection.after_step()
    collection.requires_grad_(False)
    torch.testing.assert_close(collection(batch).flat, fresh * (1 - 0.1 * 0.5))
