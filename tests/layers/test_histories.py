from __future__ import annotations

import math
from dataclasses import replace

import torch

from fullrank.batch import Batch
from fullrank.embeddings import Tables
from fullrank.layers.histories import FeaturesAndHistories, latest
from fullrank.schema import Categorical, EventId, EventNumber, Label, Numeric, Schema, Sequence

SCHEMA = Schema(
    features=(
        Numeric(name="price", encoding="scalar"),
        Numeric(name="rank", encoding="scalar"),
        Categorical(name="item", num_embeddings=9),
        Categorical(name="brand", num_embeddings=4),
        Sequence(
            name="clicks",
            fields=(
                EventId(name="brand", table="brand", num_embeddings=4),
                EventId(name="item", table="item", num_embeddings=9),
                EventNumber(name="age", transform="log1p"),
            ),
        ),
    ),
    labels=(Label(name="click"),),
)
BATCH = Batch(
    numeric_BN=torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    ids_BF=torch.tensor([[5, 2], [6, 3]]),
    jagged_keys=("clicks.brand", "clicks.item"),
    jagged_values=torch.tensor([1, 2, 3, 7, 8, 4]),
    jagged_lengths_KB=torch.tensor([[1, 2], [1, 2]]),
    event_keys=("clicks.age",),
    event_values=torch.tensor([60.0, 7200.0, 3.0]).log1p(),
    event_lengths_EB=torch.tensor([[1, 2]]),
    labels_BT=torch.zeros(2, 1),
)


def test_tokens_and_histories_hold_the_vectors_of_the_batch() -> None:
    torch.manual_seed(0)
    module = FeaturesAndHistories(SCHEMA, Tables(embedding_dim=3, init_std=1.0))
    tokens_BFD, (history,) = module(BATCH)
    tables = {name: module.state_dict()[f"ids.tables.{name}.weight"] for name in ("item", "brand")}
    assert tokens_BFD.shape == (2, module.num_tokens, 3)
    torch.testing.assert_close(tokens_BFD[:, 0], tables["item"][[5, 6]])
    torch.testing.assert_close(tokens_BFD[:, 2], BATCH.numeric_BN @ module.number_token_ND)
    assert history.mask_BL.tolist() == [[True, False], [True, True]]
    expected = torch.cat([tables["brand"][3], tables["item"][4], math.log1p(3.0) * module.event_numbers["clicks"][0]])
    torch.testing.assert_close(history.channels_BLC[1, 1], expected)
    assert bool((history.channels_BLC[0, 1] == 0).all())
    assert history.age_BL is not None
    torch.testing.assert_close(history.age_BL, torch.tensor([[60.0, 0.0], [7200.0, 3.0]]), rtol=1e-5, atol=1e-3)
    assert module.targets == [[1, 0]]
    assert module.channels == [9]


def test_a_batch_without_events_has_one_column_of_padding() -> None:
    empty = replace(
        BATCH,
        jagged_values=torch.zeros(0, dtype=torch.int64),
        jagged_lengths_KB=torch.zeros(2, 2, dtype=torch.int64),
        event_values=torch.zeros(0),
        event_lengths_EB=torch.zeros(1, 2, dtype=torch.int64),
    )
    _, (history,) = FeaturesAndHistories(SCHEMA, Tables(embedding_dim=3, init_std=1.0))(empty)
    assert history.channels_BLC.shape == (2, 1, 9)
    assert not bool(history.mask_BL.any())


def test_latest_gathers_real_events_wherever_the_padding_is() -> None:
    tokens = torch.arange(5.0)[None, :, None].expand(3, -1, 1)
    mask = torch.arange(5) < torch.tensor([[5], [3], [1]])
    recent, exists = latest(tokens, mask, 2)
    assert recent[:, :, 0].tolist() == [[3, 4], [1, 2], [0, 0]]
    assert exists.tolist() == [[True, True], [True, True], [False, True]]
    many, exists = latest(tokens, mask, 7)
    assert many[0, :, 0].tolist() == [0, 0, 0, 1, 2, 3, 4]
    assert exists.sum(1).tolist() == [5, 3, 1]
