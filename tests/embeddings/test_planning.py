"""Memory plans against their budget, against an exhaustive search, and against the rule that they follow."""

# Shapes: R rows of a table.

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fullrank.embeddings import EmbeddingCollection, TableConfig, Tables
from fullrank.embeddings.full import FullTable
from fullrank.embeddings.memory import table_bytes, table_memory
from fullrank.embeddings.mixed_dimension import MixedDimensionTable
from fullrank.embeddings.planning import (
    OFFERS,
    Choice,
    TableUse,
    bytes_of,
    mixed_dimension_offers,
    plan_memory,
    quotient_remainder_offers,
)
from fullrank.embeddings.quotient_remainder import QuotientRemainderTable
from fullrank.schema import Categorical, Schema


def a_use(rows: int, lookups: int = 10_000, width: int = 8) -> TableUse:
    """Lookups that fall with the id as 1 / rank."""
    counts = lookups / np.log(rows + 1) / np.arange(1, rows + 1)
    return TableUse(counts.astype(np.int64) + 1, (width,))


USES = {"user": a_use(3000), "item": a_use(700, 30_000), "city": a_use(40), "rare": a_use(5000, 100)}
WHOLE = sum(use.bytes(FullTable.Config()) for use in USES.values())


def collection(plan_tables: dict[str, dict[str, object]]) -> EmbeddingCollection:
    schema = Schema(features=tuple(Categorical(name=name, num_embeddings=use.rows) for name, use in USES.items()))
    return EmbeddingCollection(schema, Tables.model_validate({"embedding_dim": 8, "kinds": plan_tables}))


@pytest.mark.parametrize("percent", [100, 60, 30, 15, 8, 5])
def test_a_plan_keeps_its_budget_in_the_bytes_of_the_real_tables(percent: int) -> None:
    plan = plan_memory(USES, WHOLE * percent // 100)
    assert plan.bytes <= plan.budget
    assert plan.bytes > 0.97 * plan.budget  # and uses it
    made = table_memory(collection(plan.tables()))
    assert {name: memory.bytes for name, memory in made.items()} == {n: c.bytes for n, c in plan.choices.items()}
    assert [plan.before[name] for name in USES] == [32 * use.rows for use in USES.values()]
    assert plan_memory(USES, WHOLE * percent // 100) == plan
    if percent == 100:
        assert not plan.tables()


def test_more_memory_never_loses_more_and_tables_that_are_asked_more_get_more() -> None:
    def loss(percent: int) -> float:
        plan = plan_memory(USES, WHOLE * percent // 100)
        return sum(float(USES[name].counts.sum()) * choice.loss for name, choice in plan.choices.items())

    losses = [loss(percent) for percent in (4, 6, 10, 20, 40, 70, 100)]
    assert losses == sorted(losses, reverse=True) and losses[-1] == 0 < losses[0]
    plan = plan_memory(USES, WHOLE // 10)
    share = {name: choice.bytes / plan.before[name] for name, choice in plan.choices.items()}
    assert share["city"] > share["item"] > share["user"] > share["rare"]


def test_the_least_is_said_and_is_enough() -> None:
    with pytest.raises(ValueError, match="too small: the tables take at least") as caught:
        plan_memory(USES, 1000, fixed=64)
    least = int(str(caught.value).split()[-1].replace(",", ""))
    plan = plan_memory(USES, least, fixed=64)
    assert plan.bytes == least and plan.fixed == 64
    with pytest.raises(ValueError, match=f"{least - 1:,} bytes is too small"):
        plan_memory(USES, least - 1, fixed=64)


def test_a_plan_loses_hardly_more_than_the_best_one_there_is() -> None:
    uses = {name: USES[name] for name in ("user", "item", "city")}
    options = {
        name: [
            Choice(config, use.bytes(config), loss)
            for offer in OFFERS.values()
            for config, loss in itertools.islice(offer(use), 0, None, 3)
        ]
        for name, use in uses.items()
    }
    weights = [float(use.counts.sum()) for use in uses.values()]
    for share in (0.1, 0.3, 0.6):
        budget = int(share * sum(use.bytes(FullTable.Config()) for use in uses.values()))
        combinations = [c for c in itertools.product(*options.values()) if sum(each.bytes for each in c) <= budget]
        best = min(sum(w * each.loss for w, each in zip(weights, c, strict=True)) for c in combinations)
        plan = plan_memory(uses, budget)
        found = sum(w * plan.choices[name].loss for w, name in zip(weights, uses, strict=True))
        # The plan has all options, the search every third one.
        assert found <= 1.01 * best + 1e-9


def test_blocks_get_the_widths_of_the_popularity_rule() -> None:
    """Where the loss per number stored is equal everywhere, widths are in proportion to popularity to the 0.3."""
    use = a_use(20_000, 10**6, width=64)
    for config, _ in mixed_dimension_offers(use):
        assert isinstance(config, MixedDimensionTable.Config)
        if len(config.dims) == 4 and config.dims[0] == 32:
            break
    table = MixedDimensionTable(use.rows, 64, 1.0, config)
    ends = np.cumsum([block.ids for block in table.dimension_report()])
    counts = np.diff(np.cumsum(use.counts)[ends - 1], prepend=0)
    # A wider block pays its projection too, 64 numbers for each direction.
    popularity = counts / (np.diff(ends, prepend=0) + 64)
    expected = 32 * (popularity / popularity[0]) ** 0.3
    assert np.abs(np.array(config.dims) - expected).max() <= 1


def test_expected_losses_are_those_of_shared_rows_and_cut_spectra() -> None:
    even = TableUse(np.full(1024, 10), (16,))
    losses = {config.collisions: loss for config, loss in quotient_remainder_offers(even)}  # type: ignore[attr-defined]
    for collisions in (2, 4, 32):  # an additive model of two factors: its degrees of freedom over the ids
        rows = 1024 // collisions
        assert losses[collisions] == pytest.approx(1 - (rows + collisions - 1) / 1024)
    one_id = TableUse(np.eye(1, 1024, dtype=np.int64)[0] * 50, (16,))
    assert all(loss == pytest.approx(0) for _, loss in quotient_remainder_offers(one_id))
    narrow = [loss for _, loss in mixed_dimension_offers(even)]
    assert narrow == sorted(narrow, reverse=True) and 0 < narrow[-1] < narrow[0] < 0.2
    assert list(quotient_remainder_offers(a_use(200))) == []


def test_a_table_that_was_never_asked_is_planned_too() -> None:
    uses = {"idle": TableUse(np.zeros(1000, np.int64), (8,)), "item": a_use(100)}
    plan = plan_memory(uses, 6000)
    assert plan.choices["item"].config.kind == "full" and plan.choices["idle"].bytes < 3000


def test_bytes_of_a_table_that_is_not_made() -> None:
    assert table_bytes(FullTable.Config(), 10, 4) == 160
    assert table_bytes(QuotientRemainderTable.Config(collisions=4), 1 << 40, 16) == 64 * ((1 << 38) + 4)
    mixed = MixedDimensionTable.Config(dims=(4, 2), shares=(0.5,))
    assert table_bytes(mixed, 10, 4) == 4 * (5 * 4 + 5 * 2 + 2 * 4)
    assert USES["city"].bytes(FullTable.Config()) == 40 * 32
    assert TableUse(np.ones(10, np.int64), (4, 8)).bytes(FullTable.Config()) == 480


def test_kinds_to_choose_among_can_be_few_or_more() -> None:
    plan = plan_memory(USES, WHOLE // 2, kinds=["full", "quotient_remainder"])
    assert {choice.config.kind for choice in plan.choices.values()} == {"full", "quotient_remainder"}
    with pytest.raises(ValueError, match='kind to plan with "tensor_train" is unknown; choose one of full'):
        plan_memory(USES, WHOLE, kinds=["tensor_train"])

    def free_offers(use: TableUse) -> Iterator[tuple[TableConfig, float]]:
        yield QuotientRemainderTable.Config(collisions=3, operation="add"), 1e-9

    OFFERS.register("free", free_offers)
    try:
        plan = plan_memory(USES, WHOLE // 2)
        assert plan.choices["user"].config == QuotientRemainderTable.Config(collisions=3, operation="add")
    finally:
        OFFERS.unregister("free")


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        ("200MB", 2 * 10**8),
        ("1.5GiB", 3 << 29),
        ("4096", 4096),
        ("4 kB", 4000),
        ("10 B", 10),
        ("25%", 250),
        ("2M", 2 * 10**6),
    ],
)
def test_sizes_as_text(text: str, bytes_: int) -> None:
    assert bytes_of(text, 1000) == bytes_


@pytest.mark.parametrize("text", ["", "MB", "-5", "5 apples", "1e9", "5 IB", "%"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number of bytes, such as 200MB"):
        bytes_of(text, 1000)


def test_projections_and_codes_are_measured() -> None:
    made = collection({"user": {"kind": "mixed_dimension", "dim": 2}, "item": {"kind": "prefix", "levels": 2}})
    memory = table_memory(made)
    assert memory["user"].bytes == 4 * (3000 * 2 + 2 * 8) and memory["user"].plain_bytes == 4 * 3000 * 8
    item = made.kinds["item"]
    assert isinstance(item.codes_RL, torch.Tensor) and item.codes_RL.nbytes > 0
    assert memory["item"].bytes == 4 * memory["item"].parameters + sum(own.nbytes for own in item.buffers())
    assert sum(each.parameters for each in memory.values()) == made.num_parameters()
