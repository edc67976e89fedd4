"""Tables of every kind that grow by new ids, against the out-of-vocabulary id and against what was there before."""

# Shapes: N ids.

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fullrank.embeddings import TABLE_KINDS, Ask, EmbeddingCollection, Part, Table, TableConfig, Tables, register
from fullrank.embeddings.growing import grown_state
from fullrank.schema import OUT_OF_VOCABULARY_ID, Categorical, EventId, Schema, Sequence

KINDS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "product": {"kind": "quotient_remainder", "collisions": 3},
    "sum": {"kind": "quotient_remainder", "collisions": 40, "operation": "add"},  # a row of the remainders: m = 1
    "three digits": {"kind": "quotient_remainder", "num_partitions": 3, "major": "quotient"},
    "side by side": {"kind": "chinese_remainder", "operation": "concat"},
    "path": {"kind": "quotient_remainder", "operation": "path", "path_hidden": 4},
    "custom": {"kind": "custom_partitions", "sizes": [5, 5]},
    "small": {"kind": "quotient_remainder", "threshold": 23, "operation": "path"},
    "hash": {"kind": "hash"},
    "one block": {"kind": "mixed_dimension", "dims": [2]},
    "blocks": {"kind": "mixed_dimension", "dims": [8, 4, 2], "shares": [0.3, 0.3]},
    "tiny first block": {"kind": "mixed_dimension", "dims": [8, 2], "shares": [0.06]},
    "popularity": {
        "kind": "mixed_dimension",
        "temperature": 0.5,
        "blocks": [[4, 400], [7, 350], [12, 300]],
    },
    "individual": {"kind": "individual", "unknown_share": 0.0},
    "prefix": {"kind": "prefix", "levels": 2, "codebook_size": 5},
    "few prefixes": {"kind": "prefix", "levels": 2, "codebook_size": 7, "stored_rows": 9},
}
BUCKETS = torch.stack([torch.arange(23) % 5, torch.arange(23) // 5], 1)


def collection(rows: int, config: dict[str, Any]) -> EmbeddingCollection:
    schema = Schema(
        features=(
            Categorical(name="item", num_embeddings=rows),
            Categorical(name="user", num_embeddings=11),
            Sequence(name="history", fields=(EventId(name="item", table="item", num_embeddings=rows),)),
        )
    )
    return EmbeddingCollection(schema, Tables(embedding_dim=8, init_std=0.5, kinds={"item": config}))


def grown(small: EmbeddingCollection, rows: int, config: dict[str, Any]) -> EmbeddingCollection:
    large = collection(rows, config)
    large.load_state_dict(grown_state(small, large))
    return large


def ids(*groups: range | list[int]) -> Tensor:
    return torch.tensor([number for group in groups for number in group])


@pytest.mark.parametrize("kind", KINDS)
def test_old_ids_stay_and_new_ones_are_the_unknown_one_twice_in_a_row(kind: str) -> None:
    torch.manual_seed(0)
    first = collection(23, KINDS[kind])
    if kind == "custom":
        first.kinds["item"].set_buckets(BUCKETS)  # type: ignore[operator]
    if kind == "prefix":  # codes that a quantiser found, of which no id knows where they come from
        table = first.kinds["item"]
        table.set_codes(torch.randint(0, 5, (23, 2)))  # type: ignore[operator]
    grows = {**KINDS[kind], "first_rows": 23}
    second = grown(first, 31, grows)
    third = grown(second, 40, grows)
    known = ids(range(23), [OUT_OF_VOCABULARY_ID] * 17)
    for large, rows in ((second, 31), (third, 40)):
        assert torch.equal(large.vectors("item", ids(range(rows))), first.vectors("item", known[:rows]))
        assert torch.equal(large.vectors("user", ids(range(11))), first.vectors("user", ids(range(11))))


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_id_asks_for_rows_of_its_own(kind: str) -> None:
    table = collection(40, {**KINDS[kind], "first_rows": 23}).kinds.get("item")
    if kind == "custom":
        table.set_buckets(BUCKETS)  # type: ignore[operator, union-attr]
    if table is None:  # plain
        return
    asked = [[] for _ in range(40)]  # type: ignore[var-annotated]
    for number in range(40):
        for ask in table.asks(torch.tensor([number])):
            asked[number] += [(ask.part, row) for row in ask.rows.tolist()]
    for part, rows in enumerate(part.rows for part in table.parts):
        assert all(row < rows for rows_of in asked for which, row in rows_of if which == part)
    distinct = {tuple(rows) for rows in asked[23:]}
    assert len(distinct) == (1 if "prefix" in kind else 17)  # prefixes are told apart by codes alone
    if "prefix" not in kind:
        assert not distinct & {tuple(rows) for rows in asked[:23]}


def test_without_first_rows_a_layout_is_another_one() -> None:
    """What `first_rows` is for: the same config at more rows gives old ids other rows."""
    for kind in ("product", "three digits", "side by side", "hash", "blocks", "prefix"):
        few, many = (collection(rows, KINDS[kind]).kinds["item"] for rows in (23, 40))
        rows_of = [[ask.rows.tolist() for ask in table.asks(torch.arange(2, 23))] for table in (few, many)]
        assert rows_of[0] != rows_of[1]


def test_a_kind_that_does_not_say_how_it_grows_is_refused() -> None:
    class Half(Table):
        class Config(TableConfig):
            kind: Any = "half"

        def __init__(self, rows: int, width: int, init_std: float, config: TableConfig) -> None:
            super().__init__(rows, width, init_std, config)
            self.parts = (Part("half", -(-rows // 2), width, init_std),)

        def asks(self, ids_N: Tensor) -> list[Ask]:
            return [Ask(0, ids_N // 2)]

        def combine(self, ids_N: Tensor, asks: Any, vectors: Any) -> Tensor:
            return vectors[0]  # type: ignore[no-any-return]

    register(Half)
    try:
        small, large = collection(23, {"kind": "half"}), collection(31, {"kind": "half"})
        with pytest.raises(ValueError, match='table "item" is of the kind half, which cannot grow'):
            grown_state(small, large)
        assert grown_state(small, collection(23, {"kind": "half"})).keys() == small.state_dict().keys()
    finally:
        TABLE_KINDS.unregister("half")


def test_a_table_that_was_pruned_does_not_grow() -> None:
    config = {"kind": "pruned", "kept_rows": 9}
    with pytest.raises(ValueError, match='table "item" is of the kind pruned, which cannot grow: train anew'):
        grown_state(collection(23, config), collection(31, config))
    with pytest.raises(ValueError, match='table "item": kept_rows is 24, and the table has 23 rows'):
        collection(23, {"kind": "pruned", "kept_rows": 24})


def test_first_rows_beyond_the_table_are_refused() -> None:
    with pytest.raises(ValueError, match='table "item": first_rows is 24, and the table has 23 rows'):
        collection(23, {"kind": "prefix", "first_rows": 24})
