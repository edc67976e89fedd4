"""Compositional tables against their definition, `nn.EmbeddingBag` and the plain table that they stand for."""

# Shapes: N ids, B rows, R rows of a table, D width, k partitions.

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fullrank.batch import Batch
from fullrank.embeddings import EmbeddingCollection, Tables
from fullrank.embeddings.compositional import PathBank
from fullrank.embeddings.custom_partitions import CustomPartitionsTable
from fullrank.embeddings.table import TABLE_KINDS, Table
from fullrank.models import MODELS
from fullrank.models.base import example_batch
from fullrank.schema import Categorical, EventId, Label, MultiCategorical, Numeric, Schema, Sequence

ROWS, WIDTH = 50, 8
KINDS: dict[str, dict[str, Any]] = {
    "mult": {"kind": "quotient_remainder", "collisions": 3},
    "quotient major": {"kind": "quotient_remainder", "collisions": 7, "major": "quotient", "operation": "add"},
    "three digits": {"kind": "quotient_remainder", "num_partitions": 3, "operation": "concat", "dims": [2, 3, 3]},
    "remainders": {"kind": "chinese_remainder", "sizes": [4, 5, 7]},
    "path": {"kind": "quotient_remainder", "collisions": 4, "operation": "path", "path_hidden": 5},
    "two paths": {"kind": "chinese_remainder", "num_partitions": 3, "operation": "path", "path_hidden": 3},
    "custom": {"kind": "custom_partitions", "sizes": [50, 2]},
    "hash": {"kind": "hash", "collisions": 6},
}


def a_collection(
    config: dict[str, Any], rows: int = ROWS, pooling: Any = "sum", std: float = 0.5
) -> EmbeddingCollection:
    features = (
        Categorical(name="item", num_embeddings=rows),
        MultiCategorical(name="bag", table="item", num_embeddings=rows, pooling=pooling),
    )
    torch.manual_seed(0)
    tables = Tables(embedding_dim=WIDTH, init_std=std, kinds={"item": config})
    collection = EmbeddingCollection(Schema(features=features), tables)
    table = collection.kinds.get("item")
    if isinstance(table, CustomPartitionsTable) and table.config.buckets is None:
        table.set_buckets(torch.stack([torch.randperm(rows), torch.arange(rows) % 2], 1))
    return collection


def a_batch(single_B: Tensor, bag_E: Tensor, lengths_B: Tensor) -> Batch:
    rows = len(single_B)
    return Batch(
        numeric_BN=torch.zeros(rows, 0), ids_BF=single_B[:, None],
        jagged_keys=("bag",), jagged_values=bag_E, jagged_lengths_KB=lengths_B[None],
        event_keys=(), event_values=torch.zeros(0), event_lengths_EB=torch.zeros(0, rows, dtype=torch.int64),
        labels_BT=torch.zeros(rows, 0),
    )  # fmt: skip


LENGTHS = torch.tensor([3, 0, 1, 4, 2])
BATCH = a_batch(torch.tensor([0, 1, 17, 49, 18]), torch.tensor([17, 1, 18, 49, 0, 1, 2, 3, 49, 16]), LENGTHS)


def parts_of(collection: EmbeddingCollection) -> list[Tensor]:
    state, table = collection.state_dict(), collection.kinds["item"]
    return [state[f"tables.item.{part.name}.weight"] for part in table.parts]


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bag_is_the_pooled_rows_of_the_plain_table_that_it_stands_for(kind: str, pooling: Any) -> None:
    """Ids are composed before they are pooled, which the paper's code does the other way round."""
    collection = a_collection(KINDS[kind], pooling=pooling)
    single_BD, bag_BD = collection(BATCH).tokens_BFD.unbind(1)
    table_RD = collection.materialize("item")
    torch.testing.assert_close(single_BD, table_RD[BATCH.ids_BF[:, 0]])
    offsets = LENGTHS.cumsum(0) - LENGTHS
    expected = F.embedding_bag(BATCH.jagged_values, table_RD, offsets, mode=pooling)
    torch.testing.assert_close(bag_BD, expected, atol=1e-6, rtol=1e-6)
    assert not bag_BD[1].any()
    assert torch.equal(table_RD, collection.vectors("item", torch.arange(ROWS)))


def test_pooling_parts_first_is_the_same_for_sums_and_another_thing_for_products() -> None:
    offsets = LENGTHS.cumsum(0) - LENGTHS
    for operation in ("add", "concat", "mult"):
        collection = a_collection({"kind": "quotient_remainder", "collisions": 3, "operation": operation})
        first, second = (
            F.embedding_bag(ids, weight, offsets, mode="sum")
            for ids, weight in zip(
                (BATCH.jagged_values % 17, BATCH.jagged_values // 17), parts_of(collection), strict=True
            )
        )
        pooled = {"add": first + second, "mult": first * second}.get(operation, torch.cat([first, second], 1))
        bag_BD = collection(BATCH).tokens_BFD[:, 1]
        assert torch.allclose(bag_BD, pooled, atol=1e-6) == (operation != "mult")


def test_a_part_for_each_id_and_an_idle_one_beside_it_is_an_embedding_bag() -> None:
    for operation, idle in (("mult", 1.0), ("add", 0.0)):
        collection = a_collection({"kind": "quotient_remainder", "collisions": 1, "operation": operation})
        remainder_RD, quotient_RD = parts_of(collection)
        assert quotient_RD.shape == (1, WIDTH)
        quotient_RD.fill_(idle)
        peer = nn.EmbeddingBag.from_pretrained(remainder_RD, mode="sum")
        bag_BD = collection(BATCH).tokens_BFD[:, 1]
        torch.testing.assert_close(bag_BD, peer(BATCH.jagged_values, LENGTHS.cumsum(0) - LENGTHS), atol=1e-6, rtol=0)


def test_vectors_are_what_the_paper_says() -> None:
    ids = torch.arange(ROWS)
    first, second, third = parts_of(a_collection(KINDS["remainders"]))
    expected = first[ids % 4] * second[ids % 5] * third[ids % 7]
    torch.testing.assert_close(a_collection(KINDS["remainders"]).materialize("item"), expected)
    quotient, remainder = parts_of(a_collection(KINDS["quotient major"]))
    assert (len(quotient), len(remainder)) == (8, 7)
    expected = quotient[ids // 7] + remainder[ids % 7]
    torch.testing.assert_close(a_collection(KINDS["quotient major"]).materialize("item"), expected)
    digits = parts_of(a_collection(KINDS["three digits"]))
    assert [tuple(part.shape) for part in digits] == [(4, 2), (4, 3), (4, 3)]
    expected = torch.cat([digits[0][ids % 4], digits[1][ids // 4 % 4], digits[2][ids // 16]], 1)
    torch.testing.assert_close(a_collection(KINDS["three digits"]).materialize("item"), expected)
    (hashed,) = parts_of(a_collection(KINDS["hash"]))
    torch.testing.assert_close(a_collection(KINDS["hash"]).materialize("item"), hashed[ids % 9])


@pytest.mark.parametrize("kind", ["path", "two paths"])
def test_a_path_sends_the_first_row_through_the_mlps_of_the_other_parts(kind: str) -> None:
    collection = a_collection(KINDS[kind])
    (base,) = parts_of(collection)
    table = collection.kinds["item"]
    banks = [bank for bank in table.paths if isinstance(bank, PathBank)]  # type: ignore[union-attr]
    for bank in banks:
        nn.init.normal_(bank.hidden_bias_PH)
        nn.init.normal_(bank.bias_PD)
    expected = []
    for number in range(ROWS):
        places = (number % 13, number // 13) if kind == "path" else (number % 4, number % 5, number % 7)
        vector_D = base[places[0]]
        for bank, part in zip(banks, places[1:], strict=True):
            hidden = F.linear(vector_D, bank.hidden_weight_PDH[part].T, bank.hidden_bias_PH[part]).relu()
            vector_D = F.linear(hidden, bank.weight_PHD[part].T, bank.bias_PD[part])
        expected.append(vector_D)
    torch.testing.assert_close(collection.materialize("item"), torch.stack(expected))


def test_gradients_of_a_path_are_those_of_finite_differences() -> None:
    bank = PathBank(4, 3, 5).double()
    nn.init.normal_(bank.hidden_bias_PH)
    part_N = torch.tensor([2, 0, 2, 3, 0])  # nothing in part 1
    names, values = zip(*bank.named_parameters(), strict=True)

    def through(vectors_ND: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(bank, dict(zip(names, weights, strict=True)), (vectors_ND, part_N))

    torch.manual_seed(1)
    vectors_ND = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(through, (vectors_ND, *values))
    assert bank(vectors_ND[:0], part_N[:0]).shape == (0, 3)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, Tensor):
                self.elements = max(self.elements, made.numel())
        return out


def test_a_path_copies_no_weights_for_each_id() -> None:
    bank = PathBank(parts=4, width=8, hidden=16)
    with Largest() as largest:
        bank(torch.randn(1000, 8, requires_grad=True), torch.arange(1000) % 4).sum().backward()
    assert largest.elements <= 1000 * 8  # hidden units are of one part at a time; weights of all ids were 1000 x 8 x 16


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_lookup_are_those_through_the_plain_table(kind: str) -> None:
    weight = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)

    def gradients(collection: EmbeddingCollection, out_BFD: Tensor) -> list[Tensor]:
        (out_BFD.sin() * weight).sum().backward()
        return [parameter.grad for parameter in collection.parameters() if parameter.grad is not None]

    looked_up, whole = a_collection(KINDS[kind]), a_collection(KINDS[kind])
    table_RD = whole.materialize("item")
    bag_BD = F.embedding_bag(BATCH.jagged_values, table_RD, LENGTHS.cumsum(0) - LENGTHS, mode="sum")
    out_BFD = torch.stack([table_RD[BATCH.ids_BF[:, 0]], bag_BD], 1)
    found, expected = gradients(looked_up, looked_up(BATCH).tokens_BFD), gradients(whole, out_BFD)
    assert len(found) == len(list(looked_up.parameters()))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_entries_start_centred_and_as_spread_as_those_of_a_plain_table(kind: str) -> None:
    """The paper's code starts all entries of both parts between √(1/n) and 1."""
    config = {**KINDS[kind], **({"sizes": [4000, 2]} if kind == "custom" else {})}
    config |= {"sizes": [59, 61, 64]} if kind == "remainders" else {}
    config |= {"path_hidden": 64} if "path" in kind else {}
    vectors = a_collection(config, rows=4000, std=0.01).materialize("item").detach()
    assert float(vectors.std()) == pytest.approx(0.01, rel=0.15)
    assert abs(float(vectors.mean())) < 0.002


def made(rows: int, **config: Any) -> Table:
    kind = TABLE_KINDS.find(config.get("kind", "quotient_remainder"))
    return kind(rows, 16, 0.01, kind.Config.model_validate(config))


def test_parameters_and_bytes_are_exact() -> None:
    counts = {
        table.num_parameters(): table.memory_bytes()
        for table in (
            made(1000),
            made(1000, operation="concat"),
            made(1000, sizes=[10, 100], operation="path", path_hidden=32),
            made(1000, kind="hash", stored_rows=7),
            made(1000, threshold=1000),
            made(1000, kind="full"),
        )
    }
    mlps = 100 * (16 * 32 + 32 + 32 * 16 + 16)
    assert counts == {
        number: 4 * number for number in (16 * (250 + 4), 8 * (250 + 4), 16 * 10 + mlps, 16 * 7, 16 * 1000)
    }
    custom = made(6, kind="custom_partitions", sizes=[3, 2])
    assert (custom.num_parameters(), custom.memory_bytes()) == (16 * 5, 4 * 16 * 5 + 8 * 6 * 2)
    for config in KINDS.values():
        collection = a_collection(config)
        assert collection.num_parameters() == collection.kinds["item"].num_parameters()


def test_the_largest_tables_are_exact() -> None:
    """Up to 2^62 ids, and those that came later."""
    rows, later = 2**62, 2**62 + 9
    ids = torch.tensor([1, 4 * (2**24 + 1), 2**40, rows - 1, later - 1])
    table = made(later, num_partitions=3, first_rows=rows)
    asked = [ask.rows.tolist() for ask in table.asks(ids)]
    first, second, third = table.sizes
    assert first < 1.001 * 2 ** (62 / 3) and table.num_parameters() == 16 * (sum(table.sizes) + 9)
    found = [(c * second + b) * first + a for a, b, c in zip(*asked, strict=True)]
    assert found[:4] == ids[:4].tolist()
    assert [rows[4] for rows in asked] == [1, 0, third + 8]  # the parts of id 1, and a row behind those of all others
    table = made(rows, kind="chinese_remainder", num_partitions=3)
    asked = [ask.rows.tolist() for ask in table.asks(ids[:4])]
    assert asked == [[number % size for number in ids[:4].tolist()] for size in table.sizes]


def test_small_tables_stay_plain() -> None:
    """Three rows in two parts would be five, as the paper's code has it without its threshold."""
    assert [part.rows for part in made(200, threshold=200).parts] == [200]
    assert [part.rows for part in made(201, threshold=200).parts] == [51, 4]
    for operation in ("mult", "concat", "path"):
        config = {"kind": "quotient_remainder", "threshold": ROWS, "operation": operation}
        collection = a_collection(config)
        (rows,) = parts_of(collection)
        assert rows.shape == (ROWS, WIDTH) and torch.equal(collection.materialize("item"), rows)


def test_a_memory_budget_is_kept_and_never_makes_a_table_larger() -> None:
    full = 4 * 16 * 1000
    for operation in ("mult", "concat"):
        tight = made(1000, memory_budget=full // 8, operation=operation)
        assert full // 10 < tight.memory_bytes() <= full // 8
    assert [part.rows for part in made(1000, memory_budget=full).parts] == [1000]
    with pytest.raises(ValueError, match="memory budget 4000 is below the least"):
        made(1000, memory_budget=4000)
    assert [part.rows for part in made(3, memory_budget=4 * 16 * 3).parts] == [3]


def test_ids_outside_a_table_are_refused() -> None:
    collection = a_collection(KINDS["mult"])
    for bad in (-1, ROWS):
        with pytest.raises(IndexError, match=f'feature "item": id {bad} is outside its table of 50 rows'):
            collection(a_batch(torch.tensor([bad]), torch.tensor([1]), torch.tensor([1])))
        with pytest.raises(IndexError, match=f'feature "bag": id {bad} is outside its table of 50 rows'):
            collection(a_batch(torch.tensor([1]), torch.tensor([bad]), torch.tensor([1])))
        with pytest.raises(IndexError, match=f'table "item": id {bad} is outside its table of 50 rows'):
            collection.vectors("item", torch.tensor([bad]))
    with pytest.raises(TypeError, match="ids_BF: ids are torch.float32, expected int64"):
        collection(a_batch(torch.tensor([1.0]), torch.tensor([1]), torch.tensor([1])))
    with pytest.raises(TypeError, match='table "item": ids are torch.float32'):
        collection.vectors("item", torch.tensor([1.0]))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"sizes": [4, 5]}, r"sizes \[4, 5\] tell 20 ids apart, and the table has 50 rows"),
        ({"kind": "chinese_remainder", "sizes": [6, 35, 9]}, "sizes 6 and 9 have the common divisor 3"),
        ({"num_partitions": 3, "operation": "concat"}, "width 8 is not divisible by 3 parts side by side: give their"),
        ({"operation": "concat", "dims": [8]}, r"dims are \[8\], expected 2 whose sum is the width 8"),
        ({"operation": "concat", "dims": [4, 5]}, r"dims are \[4, 5\], expected 2 whose sum is the width 8"),
    ],
)
def test_partitions_that_cannot_be_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f'table "item": {message}'):
        a_collection({"kind": "quotient_remainder", **config})


def test_contradictory_configs_are_refused() -> None:
    for config, message in (
        (
            {"kind": "quotient_remainder", "collisions": 3, "sizes": [2, 30]},
            "expected one of .* got collisions and sizes",
        ),
        ({"kind": "quotient_remainder", "memory_budget": 99, "operation": "path"}, "operation path has MLPs"),
        ({"kind": "chinese_remainder", "num_partitions": 3, "sizes": [2, 30]}, "expected one of num_partitions, sizes"),
        ({"kind": "hash", "collisions": 3, "stored_rows": 3}, "expected one of collisions, stored_rows"),
        ({"kind": "chinese_remainder", "dims": [4, 4]}, "dims are for operation concat, got mult"),
        ({"kind": "hash", "operation": "add"}, "operation\n  Extra inputs are not permitted"),
    ):
        with pytest.raises(ValidationError, match=message):
            Tables.model_validate({"kinds": {"item": config}})


def test_custom_buckets_come_from_a_file_and_stay_in_the_state(tmp_path: Path) -> None:
    path = tmp_path / "cars.parquet"
    make, model = torch.arange(ROWS) // 9, torch.arange(ROWS) % 9
    pl.DataFrame({"make": make.numpy(), "model": model.numpy()}).write_parquet(path)
    tables = Tables.model_validate({"kinds": {"item": {"kind": "custom_partitions", "buckets": str(path)}}})
    config = tables.kinds["item"]
    collection = a_collection({"kind": "custom_partitions", "buckets": str(path)})
    assert collection.kinds["item"].config == config
    first, second = parts_of(collection)
    torch.testing.assert_close(collection.materialize("item"), first[make] * second[model])
    path.unlink()
    written = config.model_dump(mode="json")
    assert "buckets" not in written and written["sizes"] == [6, 9]
    torch.manual_seed(7)
    again = EmbeddingCollection(
        Schema(features=(Categorical(name="item", num_embeddings=ROWS),)),
        Tables(embedding_dim=WIDTH, kinds={"item": written}),
    )
    with pytest.raises(ValueError, match="custom_partitions has no buckets yet: name their file or call set_buckets"):
        again.materialize("item")
    again.load_state_dict(collection.state_dict())
    assert torch.equal(again.materialize("item"), collection.materialize("item"))


def test_custom_buckets_that_cannot_be_are_named() -> None:
    table = made(4, kind="custom_partitions", sizes=[2, 3])
    assert isinstance(table, CustomPartitionsTable)
    for buckets, message in (
        ([[0, 0], [1, 2], [0, 1], [1, 2]], r"ids 1 and 3 have the same buckets, \[1, 2\]"),
        ([[0, 0], [1, 2], [0, 3], [1, 1]], "buckets of partition 1 are 0 to 3, expected 0 to 2"),
        ([[0, 0], [1, 2]], r"buckets have shape \(2, 2\), expected \(4, 2\)"),
        ([[0.0, 0], [1, 2], [0, 1], [1, 1]], "buckets are torch.float32, expected int64"),
    ):
        with pytest.raises(ValueError, match=message):
            table.set_buckets(torch.tensor(buckets))
    with pytest.raises(ValidationError, match=r"none.parquet: expected a Parquet file of buckets"):
        Tables.model_validate({"kinds": {"item": {"kind": "custom_partitions", "buckets": "none.parquet"}}})


FEATURES = {"kind": "quotient_remainder", "collisions": 3, "operation": "features"}


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_generated_features_are_those_of_a_column_for_each_partition(pooling: Any) -> None:
    collection = a_collection(FEATURES, pooling=pooling)
    assert collection.token_columns == ("item", "bag", "item", "bag") and collection.widths == (WIDTH,) * 4
    parts = parts_of(collection)
    assert float(torch.cat(parts).std()) == pytest.approx(0.5, rel=0.2)  # that of a plain table each
    offsets = LENGTHS.cumsum(0) - LENGTHS
    tokens_BFD = collection(BATCH).tokens_BFD
    for place, (rows_of, part) in enumerate(zip((lambda ids: ids % 17, lambda ids: ids // 17), parts, strict=True)):
        torch.testing.assert_close(tokens_BFD[:, 2 * place], part[rows_of(BATCH.ids_BF[:, 0])])
        bag = F.embedding_bag(rows_of(BATCH.jagged_values), part, offsets, mode=pooling)
        torch.testing.assert_close(tokens_BFD[:, 2 * place + 1], bag, atol=1e-6, rtol=1e-6)
    assert collection.vectors("item", torch.tensor([18])).tolist() == [[*parts[0][1].tolist(), *parts[1][1].tolist()]]
    assert collection.num_parameters() == WIDTH * (17 + 3)


def test_every_ranker_takes_generated_features_and_learns_them() -> None:
    schema = Schema(
        features=(
            Categorical(name="user", role="user", num_embeddings=40),
            Categorical(name="item", role="item", num_embeddings=ROWS),
            Numeric(name="age", role="user", encoding="scalar"),
            Sequence(name="history", fields=(EventId(name="item", table="item", num_embeddings=ROWS),)),
        ),
        labels=(Label(name="y"),),
    )
    for name, ranker in MODELS.items():
        model = ranker.from_config(schema, {"tables": {"user": FEATURES}})
        loss = model(example_batch(schema, 4)).logits_BT.sum()
        assert torch.isfinite(loss)
        loss.backward()
        tables = [module for module in model.modules() if isinstance(module, EmbeddingCollection)]
        several = [one for one in tables if "user" in one.kinds]
        # Weights of width 1, of a linear term, are plain.
        assert several or name == "lr"
        assert all(one.token_columns.count("user") == 2 for one in several)
    with pytest.raises(
        ValueError, match=r'an id of it has several vectors, and one that is .* \("history.item"\) needs'
    ):
        MODELS["din"].from_config(schema, {"tables": {"item": FEATURES}})
