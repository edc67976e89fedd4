"""Facts about rankers without the rows of some ids: against the full table with these rows set to zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fullrank.batch import Batch
from fullrank.compression import prune_ranker, quantize_ranker
from fullrank.embeddings import EmbeddingCollection
from fullrank.embeddings.memory import table_memory
from fullrank.models import Ranker, RankerSpec
from fullrank.schema import Categorical, EventId, Label, MultiCategorical, Schema, Sequence
from fullrank.training.saving import load_model, save_model

SCHEMA = Schema(
    features=(
        Categorical(name="user", num_embeddings=50),
        Categorical(name="item", num_embeddings=30),
        MultiCategorical(name="liked", table="item", num_embeddings=30),
        MultiCategorical(name="genres", num_embeddings=40),
        Sequence(name="history", fields=(EventId(name="item", table="item", num_embeddings=30),)),
    ),
    labels=(Label(name="y"),),
)
# The last id of each table was seen twice, the one before four times, and so on.
COUNTS = {
    name: torch.cat([torch.zeros(2, dtype=torch.int64), 2 * torch.arange(rows - 2, 0, -1)])
    for name, rows in SCHEMA.tables().items()
}


def a_batch(rows: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(1)

    def ids(below: int, count: int) -> Tensor:
        return torch.randint(0, below, (count,), generator=generator)

    lengths = torch.randint(0, 5, (3, rows), generator=generator)
    sizes = lengths.sum(1).tolist()
    return Batch(
        numeric_BN=torch.zeros(rows, 0),
        ids_BF=torch.stack([ids(50, rows), ids(30, rows)], 1),
        jagged_keys=("liked", "genres", "history.item"),
        jagged_values=torch.cat([ids(below, size) for below, size in zip((30, 40, 30), sizes, strict=True)]),
        jagged_lengths_KB=lengths,
        event_keys=(),
        event_values=torch.zeros(0),
        event_lengths_EB=torch.zeros(0, rows, dtype=torch.int64),
        labels_BT=torch.zeros(rows, 1),
    )


BATCH = a_batch()


def a_ranker(name: str = "dlrm", **config: Any) -> Ranker:
    torch.manual_seed(0)
    settings = {"embedding_dim": 8, "embedding_init": 0.5, **config}
    if name == "hilomoe":
        settings = {"backbone": {"name": "dcn_v2", **settings}}
    return RankerSpec.of({"name": name, **settings}).build(SCHEMA).eval()


def zeroed(ranker: Ranker, dropped: dict[str, Tensor]) -> Ranker:
    """The same ranker with some rows of its tables, weights of width 1 apart, set to zero."""
    state = {key: value.clone() for key, value in ranker.state_dict().items()}
    for name, ids in dropped.items():
        for key, value in state.items():
            if key.endswith(f"tables.{name}.weight") and value.shape[1] > 1:
                value[ids] = 0
    full = RankerSpec.of({"name": ranker.name, **ranker.config.model_dump()}).build(SCHEMA)
    full.load_state_dict(state)
    return full.eval()


@pytest.mark.parametrize("name", ["dlrm", "deepfm", "din", "hilomoe"])
def test_a_remapped_lookup_is_one_in_the_full_table_with_rows_of_zeros(name: str) -> None:
    ranker = a_ranker(name)
    before = ranker(BATCH).logits_BT
    smaller, reports = prune_ranker(ranker, COUNTS, min_count=41)
    # Two reserved ids, and of 48, 28 and 38 values all but the last 20, which were seen 40 times or less.
    assert {report.table: (report.rows, report.kept) for report in reports} == {
        "user": (50, 30),
        "item": (30, 10),
        "genres": (40, 20),
    }
    full = zeroed(ranker, {report.table: torch.arange(report.kept, report.rows) for report in reports})
    assert torch.equal(smaller(BATCH).logits_BT, full(BATCH).logits_BT)
    assert ranker(BATCH).logits_BT.equal(before) and not smaller(BATCH).logits_BT.equal(before)
    # 20 rows of 8 numbers less each, 4 bytes of the remap more for each id.
    wide = sum(report.before - report.after for report in reports)
    assert wide == 3 * 20 * 8 * 4 - 4 * (50 + 30 + 40)


def test_the_share_with_the_smallest_rows_goes_wherever_they_lie() -> None:
    ranker = a_ranker()
    state = ranker.state_dict()
    key = next(key for key in state if key.endswith("tables.user.weight"))
    small = torch.randperm(48, generator=torch.Generator().manual_seed(0))[:24] + 2
    state[key][small] *= 1e-3
    state[key][:2] = 0  # missing and unknown stay all the same
    ranker.load_state_dict(state)
    smaller, reports = prune_ranker(ranker, {}, by="norm", share=0.5, tables=["user"])
    assert [report.left for report in reports] == [None, "not chosen", "not chosen"]
    assert reports[0].kept == 26
    collection = next(module for module in smaller.modules() if isinstance(module, EmbeddingCollection))
    expected = state[key].clone()
    expected[small] = 0
    assert torch.equal(collection.vectors("user", torch.arange(50)), expected)
    assert table_memory(collection)["user"].bytes == 26 * 8 * 4 + 50 * 4 == reports[0].after


@pytest.mark.parametrize("settings", [{"min_count": 0}, {"share": 0.0, "by": "norm"}])
def test_a_threshold_of_zero_changes_no_bit(settings: dict[str, Any]) -> None:
    ranker = a_ranker()
    same, reports = prune_ranker(ranker, COUNTS, **settings)
    assert {report.left for report in reports} == {"no id would be dropped"}
    assert same.config == ranker.config
    state = same.state_dict()
    assert state.keys() == ranker.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in ranker.state_dict().items())


def test_kept_rows_are_quantised_as_they_would_be_in_the_full_table(tmp_path: Path) -> None:
    ranker = a_ranker()
    pruned, reports = prune_ranker(ranker, COUNTS, min_count=41)
    small, _ = quantize_ranker(pruned)
    whole, _ = quantize_ranker(ranker)
    save_model(small, tmp_path / "small")
    loaded = load_model(tmp_path / "small")
    assert torch.equal(loaded(BATCH).logits_BT, small(BATCH).logits_BT)
    found, expected = (
        next(module for module in model.modules() if isinstance(module, EmbeddingCollection))
        for model in (loaded, whole)
    )
    for report in reports:
        ids_N, kept = torch.arange(report.rows), report.kept
        vectors_ND = expected.vectors(report.table, ids_N)
        vectors_ND[kept:] = 0
        assert torch.equal(found.vectors(report.table, ids_N), vectors_ND)
        memory = table_memory(found)[report.table]
        assert (memory.kind, memory.store, memory.bytes) == ("pruned", "int4", 8 * kept + 4 * report.rows)


def test_what_other_kinds_have_of_their_own_stays_theirs() -> None:
    kinds = {
        "item": {"kind": "mixed_dimension", "dims": [8, 2], "shares": [0.3]},
        "genres": {"kind": "prefix", "levels": 2, "codebook_size": 7},
    }
    ranker = a_ranker(tables=kinds)
    smaller, reports = prune_ranker(ranker, COUNTS, min_count=41)
    assert [report.left for report in reports] == [None, "of kind mixed_dimension", "of kind prefix"]
    collections = [
        next(module for module in model.modules() if isinstance(module, EmbeddingCollection))
        for model in (ranker, smaller)
    ]
    for table, rows in (("item", 30), ("genres", 40), ("user", 30)):
        before, after = (collection.vectors(table, torch.arange(rows)) for collection in collections)
        assert torch.equal(before, after)


def test_one_table_after_the_other() -> None:
    ranker = a_ranker()
    first, _ = prune_ranker(ranker, COUNTS, min_count=41, tables=["item"])
    second, reports = prune_ranker(first, COUNTS, min_count=41)
    assert [report.left for report in reports] == [None, "of kind pruned", None]
    assert torch.equal(second(BATCH).logits_BT, prune_ranker(ranker, COUNTS, min_count=41)[0](BATCH).logits_BT)


def test_other_tables_stay() -> None:
    ranker = a_ranker(tables={"user": {"kind": "hash"}})
    _, reports = prune_ranker(ranker, {"item": COUNTS["item"]}, share=0.05)
    assert {report.table: report.left for report in reports} == {
        "user": "of kind hash",
        "item": "would not be smaller",
        "genres": "has no counts: its ids are not those of a vocabulary",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected either a minimum count or a share"),
        ({"min_count": 1, "share": 0.5}, "expected either a minimum count or a share"),
        ({"share": 1.5}, r"share is 1.5, expected 0 to 1"),
        ({"min_count": 3, "by": "norm"}, "a minimum count is at least 0 and goes by count, got 3 by norm"),
        ({"share": 0.5, "by": "size"}, "by is 'size', expected count or norm"),
        ({"share": 0.5, "tables": ["users"]}, 'there is no table "users"; the model has user, item, genres'),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune_ranker(a_ranker(), COUNTS, **options)


def test_codes_are_not_pruned_and_a_damaged_remap_is_found() -> None:
    with pytest.raises(ValueError, match='table "genres" is quantised already: prune first, then quantise'):
        prune_ranker(quantize_ranker(a_ranker())[0], COUNTS, share=0.5)
    smaller, _ = prune_ranker(a_ranker(), COUNTS, share=0.5)
    state = smaller.state_dict()
    next(value for key, value in state.items() if key.endswith("remap_R"))[3] = 999
    with pytest.raises(ValueError, match="the remap of a pruned table has rows -1 to 999, expected -1 to 25"):
        smaller.load_state_dict(state)
