"""Facts about the early-stage ranker."""

from __future__ import annotations

import torch

from fullrank.batch import Batch, RowGather
from fullrank.models.base import example_batch
from fullrank.models.early_stage import EarlyStageRanker
from fullrank.retrieval.pairing import Pairing
from fullrank.schema import Categorical, EventId, Label, Numeric, Schema, Sequence

SCHEMA = Schema(
    features=(
        Categorical(name="user", role="user", encoding="identity", num_embeddings=50),
        Categorical(name="item", role="item", encoding="identity", num_embeddings=40),
        Categorical(name="hour", role="context", encoding="identity", num_embeddings=24),
        Numeric(name="price", role="item"),
        Numeric(name="age", role="user"),
        Sequence(
            name="history",
            fields=(EventId(name="item", table="item", encoding="identity", num_embeddings=40),),
            max_length=5,
        ),
    ),
    labels=(Label(name="click"), Label(name="hide")),
)


def random_batch(rows: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    batch = example_batch(SCHEMA, rows)
    batch.ids_BF.random_(0, 24, generator=generator)
    batch.jagged_values.random_(0, 24, generator=generator)
    batch.numeric_BN.normal_(generator=generator)
    return batch


def test_scoring_precomputed_items_equals_the_forward_pass_on_pairs() -> None:
    model = EarlyStageRanker.from_config(SCHEMA, {"embedding_init": 0.5}).eval()
    users, items = random_batch(3, 0), random_batch(7, 1)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    vectors_IV = model.item_vectors(items)
    handle = model.towers.user_mlp.register_forward_hook(count)
    logits_UPT = model.score(users, vectors_IV.expand(3, -1, -1))
    handle.remove()
    assert calls == 1
    user, item = torch.arange(3).repeat_interleave(7), torch.arange(7).repeat(3)
    expected = model(Pairing.of(SCHEMA)(RowGather(users), user, RowGather(items), item)).logits_BT.view(3, 7, 2)
    assert torch.allclose(logits_UPT, expected, atol=1e-5)


def test_an_item_vector_does_not_depend_on_the_user() -> None:
    model = EarlyStageRanker.from_config(SCHEMA, {"embedding_init": 0.5}).eval()
    items, others = random_batch(7, 1), random_batch(7, 2)
    rows = torch.arange(7)
    mixed = Pairing.of(SCHEMA)(RowGather(others), rows, RowGather(items), rows)
    assert torch.equal(model.item_vectors(items), model.item_vectors(mixed))


def test_user_and_item_interact_through_their_product() -> None:
    """The mixed difference of the logit over two users and two items is not zero: the model is more than a sum."""
    model = EarlyStageRanker.from_config(SCHEMA, {"embedding_init": 0.5}).eval()
    logits_UPT = model.score(random_batch(2, 0), model.item_vectors(random_batch(2, 1)).expand(2, -1, -1))
    mixed = logits_UPT[0, 0] - logits_UPT[0, 1] - logits_UPT[1, 0] + logits_UPT[1, 1]
    assert bool((mixed.abs() > 1e-4).all())
