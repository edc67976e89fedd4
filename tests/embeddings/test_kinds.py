"""Kinds of tables side by side in one schema, each against a loop over its definition."""

# Shapes: R rows of a table, N ids, D width.

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from fullrank.batch import Batch
from fullrank.embeddings import (
    TABLE_KINDS,
    Ask,
    EmbeddingCollection,
    EmbeddingOptimizer,
    Part,
    Table,
    TableConfig,
    Tables,
    register,
)
from fullrank.embeddings.custom_partitions import CustomPartitionsTable
from fullrank.embeddings.mixed_dimension import MixedDimensionTable
from fullrank.embeddings.prefix import PrefixTable
from fullrank.embeddings.quotient_remainder import QuotientRemainderTable
from fullrank.models import MODELS
from fullrank.models.base import example_batch
from fullrank.schema import Categorical, EventId, Label, MultiCategorical, Schema, Sequence

SCHEMA = Schema(
    features=(
        Categorical(name="user", num_embeddings=50),
        Categorical(name="plain", num_embeddings=11),
        Categorical(name="item", num_embeddings=30),
        Categorical(name="city", num_embeddings=20),
        Categorical(name="shop", num_embeddings=24),
        Categorical(name="car", num_embeddings=12),
        Categorical(name="zip", num_embeddings=40),
        Categorical(name="shade", num_embeddings=18),
        MultiCategorical(name="liked", table="item", num_embeddings=30),
        MultiCategorical(name="genres", num_embeddings=40),
        Sequence(name="history", fields=(EventId(name="item", table="item", num_embeddings=30),)),
    ),
    labels=(Label(name="y"),),
)
KINDS: dict[str, Any] = {
    "user": {"kind": "quotient_remainder", "collisions": 3},
    "item": {"kind": "mixed_dimension", "dims": [8, 2], "shares": [0.3]},
    "genres": {"kind": "prefix", "levels": 2, "codebook_size": 7, "stored_rows": 60},
    "city": {"kind": "chinese_remainder", "sizes": [4, 5], "operation": "concat"},
    "shop": {"kind": "quotient_remainder", "sizes": [8, 3], "operation": "path", "path_hidden": 6},
    "car": {"kind": "custom_partitions", "sizes": [3, 4], "operation": "add"},
    "zip": {"kind": "hash", "collisions": 4},
    "shade": {"kind": "pruned", "kept_rows": 13},
}
SINGLE = ("user", "plain", "item", "city", "shop", "car", "zip", "shade")
TABLES = Tables(embedding_dim=8, init_std=0.5, kinds=KINDS)


def a_batch(seed: int, rows: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def ids(below: int, count: int) -> Tensor:
        return torch.randint(0, below, (count,), generator=generator)

    lengths = torch.randint(0, 5, (3, rows), generator=generator)
    sizes = lengths.sum(1).tolist()
    return Batch(
        numeric_BN=torch.zeros(rows, 0),
        ids_BF=torch.stack([ids(below, rows) for below in (50, 11, 30, 20, 24, 12, 40, 18)], 1),
        jagged_keys=("liked", "genres", "history.item"),
        jagged_values=torch.cat([ids(below, size) for below, size in zip((30, 40, 30), sizes, strict=True)]),
        jagged_lengths_KB=lengths,
        event_keys=(),
        event_values=torch.zeros(0),
        event_lengths_EB=torch.zeros(0, rows, dtype=torch.int64),
        labels_BT=torch.zeros(rows, 1),
    )


def a_collection(**options: Any) -> EmbeddingCollection:
    torch.manual_seed(0)
    collection = with_buckets(EmbeddingCollection(SCHEMA, options.pop("tables", TABLES), **options))
    genres = collection.kinds.get("genres")
    if isinstance(genres, PrefixTable):  # the digits of each id, and none of id 5
        genres.set_codes(genres.codes_RL.index_fill(0, torch.tensor([5]), -1))
    return collection


def with_buckets(module: Any) -> Any:
    """Its cars have makes, 0 to 2, and models, 0 to 3."""
    for table in module.modules():
        if isinstance(table, CustomPartitionsTable):
            table.set_buckets(torch.stack([torch.arange(12) % 3, torch.arange(12) // 3], 1))
    return module


def whole_tables(collection: EmbeddingCollection) -> dict[str, Tensor]:
    """Every table as one row per id, by the definition of its kind and the names of the state."""
    state = collection.state_dict()
    user = state["tables.user.remainder.weight"], state["tables.user.quotient.weight"]
    narrow = state["tables.item.block1.weight"] @ state["kind_modules.1.projections.block1"]
    prefixes, missing = state["tables.genres.prefixes.weight"], state["tables.genres.missing.weight"][0]
    city, shop = torch.arange(20), torch.arange(24) // 8
    cities = state["tables.city.partition0.weight"][city % 4], state["tables.city.partition1.weight"][city % 5]
    hidden_weight, hidden_bias, weight, bias = (
        state[f"kind_modules.3.paths.0.{name}"][shop]
        for name in ("hidden_weight_PDH", "hidden_bias_PH", "weight_PHD", "bias_PD")
    )
    shops = state["tables.shop.remainder.weight"][torch.arange(24) % 8]
    hidden = (torch.einsum("nd,ndh->nh", shops, hidden_weight) + hidden_bias).relu()
    makes, models = (state[f"tables.car.partition{j}.weight"] for j in range(2))
    return {
        "city": torch.cat(cities, 1),
        "shop": torch.einsum("nh,nhd->nd", hidden, weight) + bias,
        "car": torch.stack([makes[i % 3] + models[i // 3] for i in range(12)]),
        "zip": torch.stack([state["tables.zip.rows.weight"][i % 10] for i in range(40)]),
        "shade": torch.cat([state["tables.shade.rows.weight"], torch.zeros(5, 8)]),
        "user": torch.stack([user[0][i % 17] * user[1][i // 17] for i in range(50)]),
        "plain": state["tables.plain.weight"],
        "item": torch.cat([state["tables.item.block0.weight"], narrow]),
        # Prefix 1 of id i is i // 7, prefix 2 is 7 * (i // 7 + 1) + i % 7, below 60 for all 40 ids.
        "genres": torch.stack(
            [missing if i == 5 else prefixes[i // 7] + prefixes[7 * (i // 7 + 1) + i % 7] for i in range(40)]
        ),
    }


def test_each_kind_is_its_definition_in_every_place_that_a_table_is_looked_up() -> None:
    collection, batch = a_collection(), a_batch(1)
    tables = whole_tables(collection)
    embedded = collection(batch)
    tokens = embedded.tokens_BFD
    for place, name in enumerate(SINGLE):
        torch.testing.assert_close(tokens[:, place], tables[name][batch.ids_BF[:, place]])
    for place, (key, table) in enumerate((("liked", "item"), ("genres", "genres")), len(SINGLE)):
        values, lengths = batch.jagged(key)
        for row, ids in enumerate(values.split(lengths.tolist())):
            mean = tables[table][ids].mean(0) if len(ids) else torch.zeros(8)
            torch.testing.assert_close(tokens[row, place], mean)
    torch.testing.assert_close(embedded.events["history.item"], tables["item"][batch.jagged("history.item")[0]])


@pytest.mark.parametrize("kind", ["dense", "adagrad", "row_wise_adagrad", "adam"])
def test_state_and_optimiser_continue_exactly(kind: Any) -> None:
    optimizer = EmbeddingOptimizer(kind=kind, learning_rate=0.05)

    def train(collection: EmbeddingCollection, steps: range) -> None:
        descent = torch.optim.SGD(collection.parameters(), lr=0.05)
        for step in steps:
            embedded = collection.train()(a_batch(step))
            (embedded.flat.sin().sum() + embedded.events["history.item"].square().sum()).backward()
            descent.step()
            descent.zero_grad()
            collection.after_step()

    first, second = a_collection(optimizer=optimizer), a_collection(optimizer=optimizer)
    begin = {name: value.clone() for name, value in first.state_dict().items()}
    train(first, range(3))
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    second.load_optimizer_state({key: value.clone() for key, value in first.optimizer_state().items()})
    train(first, range(3, 6))
    train(second, range(3, 6))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        assert any(what in name for what in ("codes", "buckets", "remap")) or not torch.equal(value, begin[name]), (
            f"{name} has not learnt"
        )


def test_fused_updates_are_those_of_the_dense_gradient() -> None:
    dense, fused = a_collection(), a_collection(optimizer=EmbeddingOptimizer(kind="sgd", learning_rate=0.05))
    for collection in (dense, fused):
        descent = torch.optim.SGD(collection.parameters(), lr=0.05)
        for step in range(3):
            collection.train()(a_batch(step)).flat.sin().sum().backward()
            descent.step()
            descent.zero_grad()
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(value, fused.state_dict()[name])


def test_gradients_are_those_of_the_definition() -> None:
    collection, batch = a_collection(), a_batch(2)
    weight = torch.linspace(-1, 1, 8)
    (collection(batch).tokens_BFD[:, 0] * weight).sum().backward()
    state = collection.state_dict()
    remainder, quotient = (state[f"tables.user.{part}.weight"].requires_grad_() for part in ("remainder", "quotient"))
    ids = batch.ids_BF[:, 0]
    ((remainder[ids % 17] * quotient[ids // 17]) * weight).sum().backward()
    for place, expected in zip(collection.layout.places["user"], (remainder, quotient), strict=True):
        gradient = collection._buffer(place.buffer).weight_RD.grad
        assert gradient is not None
        torch.testing.assert_close(gradient[place.rows], expected.grad)


def test_no_two_ids_share_both_rows_of_a_quotient_remainder_table() -> None:
    for rows in (1, 2, 7, 50, 97):
        for collisions in (1, 2, 4, 60):
            table = QuotientRemainderTable(rows, 4, 1.0, QuotientRemainderTable.Config(collisions=collisions))
            asks = table.asks(torch.arange(rows))
            pairs = set(zip(*(ask.rows.tolist() for ask in asks), strict=True))
            assert len(pairs) == rows
            assert all(int(a.rows.min()) >= 0 and int(a.rows.max()) < table.parts[a.part].rows for a in asks)


@pytest.mark.parametrize("table", ["user", "item", "genres"])
def test_entries_start_as_spread_as_those_of_a_plain_table(table: str) -> None:
    kinds = {table: {**KINDS[table], **({"stored_rows": None} if table == "genres" else {})}}
    schema = SCHEMA.with_table_sizes({table: 4000})
    torch.manual_seed(3)
    collection = EmbeddingCollection(schema, Tables(embedding_dim=32, init_std=0.01, kinds=kinds))
    kind = collection.kinds[table]
    ids = torch.arange(4000)
    asks = kind.asks(ids)
    vectors = [
        collection._buffer(collection.layout.places[table][ask.part].buffer).weight_RD[
            ask.rows + collection.layout.places[table][ask.part].rows.start
        ]
        for ask in asks
    ]
    assert float(kind.combine(ids, asks, vectors).detach().std()) == pytest.approx(0.01, rel=0.1)


def test_ids_with_a_common_prefix_share_its_row_and_codes_can_be_set() -> None:
    table = PrefixTable(6, 4, 1.0, PrefixTable.Config(levels=3, codebook_size=3, stored_rows=39))
    table.set_codes(torch.tensor([[0, 1, 2], [0, 1, 0], [0, 2, 2], [1, 1, 2], [2, 2, 2], [0, 0, 0]]))
    rows = torch.stack([ask.rows for ask in table.asks(torch.arange(6))], 1).tolist()
    assert rows[0][:2] == rows[1][:2] and rows[0][2] != rows[1][2]
    assert rows[0][0] == rows[2][0] and rows[0][1] != rows[2][1]
    # 3 + 9 + 27 prefixes and as many rows: no two prefixes share one.
    assert len({row for line in rows for row in line}) == len({(0,), (1,), (2,)}) + 5 + 6
    with pytest.raises(ValueError, match="row 0 has 3 at level 1, expected 0 to 2"):
        table.set_codes(torch.full((6, 3), 3))


def test_the_rows_of_a_table_too_large_for_int32_are_exact() -> None:
    rows = 1 << 40
    table = QuotientRemainderTable(rows, 2, 1.0, QuotientRemainderTable.Config(collisions=1 << 20))
    ids = torch.tensor([rows - 1, 4 * (2**24 + 1), 2**33 + 1])
    remainder, quotient = (ask.rows.tolist() for ask in table.asks(ids))
    assert [q * table.sizes[0] + r for q, r in zip(quotient, remainder, strict=True)] == ids.tolist()


def test_a_model_does_not_know_the_kinds_of_its_tables() -> None:
    for name in ("dcn_v2", "deepfm", "din"):
        model = with_buckets(MODELS[name].from_config(SCHEMA, {"embedding_dim": 8, "tables": KINDS}))
        loss = model(a_batch(0)).logits_BT.sum()
        loss.backward()
        assert torch.isfinite(loss)
        again = MODELS[name].from_config(SCHEMA, model.config.model_dump(mode="json"))
        assert again.config == model.config
    plain, small = (
        MODELS["dcn_v2"].from_config(SCHEMA, {"embedding_dim": 8, "tables": tables}) for tables in ({}, KINDS)
    )
    assert small.num_parameters().dense == plain.num_parameters().dense
    # 17 + 3 rows for 50 users; 9 rows of 8, 21 of 2 and a 2 x 8 projection for 30 items; 60 - 4 prefixes for 40 genres
    # and a row of those without codes.
    # 4 + 5 rows of 4 for 20 cities; 8 rows and 3 MLPs for 24 shops; 3 + 4 rows for 12 cars, 10 for 40 codes;
    # 13 for 18 shades.
    expected = 4 * (4 + 5) + 8 * 8 + 3 * (8 * 6 + 6 + 6 * 8 + 8) + 8 * (3 + 4) + 8 * 10 + 8 * 13
    expected += 8 * (17 + 3) + 8 * 11 + 8 * 9 + 2 * 21 + 2 * 8 + 8 * 57
    assert small.num_parameters().embedding == expected


def test_wrong_tables_are_named() -> None:
    with pytest.raises(ValueError, match=r'tables: there is no table "usr"; the schema has user'):
        MODELS["lr"].from_config(SCHEMA, {"tables": {"usr": "full"}})
    with pytest.raises(ValidationError, match='table kind "quotient" is unknown; choose one of full'):
        Tables.model_validate({"kinds": {"user": {"kind": "quotient"}}})
    with pytest.raises(ValidationError) as caught:
        Tables.model_validate({"kinds": {"user": {"kind": "quotient_remainder", "collisions": 0}}})
    assert caught.value.errors()[0]["loc"] == ("kinds", "user", "collisions")
    with pytest.raises(
        ValueError, match='table "item": dims \\(16,\\) of a mixed_dimension table are above its width 8'
    ):
        a_collection(tables=Tables(embedding_dim=8, kinds={"item": MixedDimensionTable.Config(dims=(16,))}))


def test_a_kind_of_ones_own_is_used_by_name() -> None:
    @register
    class Signed(Table):
        """Two ids share a row, one of them with its sign turned."""

        class Config(TableConfig):
            kind: Literal["signed"] = "signed"

        def __init__(self, rows: int, width: int, init_std: float, config: TableConfig) -> None:
            super().__init__(rows, width, init_std, config)
            self.parts = (Part("pairs", -(-rows // 2), width, init_std),)

        def asks(self, ids_N: Tensor) -> list[Ask]:
            return [Ask(0, ids_N // 2)]

        def combine(self, ids_N: Tensor, asks: Any, vectors: Any) -> Tensor:
            turned: Tensor = vectors[0] * (1 - 2 * (ids_N % 2))[:, None]
            return turned

    try:
        collection = a_collection(tables=Tables(embedding_dim=8, kinds={"user": "signed"}))
        batch = example_batch(SCHEMA, 2)
        batch.ids_BF[:, 0] = torch.tensor([8, 9])
        even, odd = collection(batch).tokens_BFD[:, 0]
        assert torch.equal(even, -odd) and bool(even.any())
    finally:
        TABLE_KINDS.unregister("signed")
