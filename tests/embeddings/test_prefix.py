"""Prefix tables in a model: what is shared, what learns, what is equal to tables known otherwise."""

# Shapes: N ids, D width.

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor

from fullrank.embeddings import EmbeddingCollection, EmbeddingOptimizer, Tables
from fullrank.embeddings.prefix import PrefixTable
from fullrank.embeddings.semantic_id import ItemCodes, RQKMeans, VersionMismatchError, aar
from fullrank.metrics import normalized_entropy
from fullrank.models import RankerSpec
from fullrank.models.base import example_batch
from fullrank.schema import OUT_OF_VOCABULARY_ID, Categorical, EventId, Label, Numeric, Schema, Sequence

ROWS = 30
SCHEMA = Schema(
    features=(
        Categorical(name="item", num_embeddings=ROWS),
        Numeric(name="price"),
        Sequence(name="history", fields=(EventId(name="item", table="item", num_embeddings=ROWS),)),
    ),
    labels=(Label(name="click"),),
)


def collection(codes: Tensor | None = None, **config: Any) -> tuple[EmbeddingCollection, PrefixTable]:
    torch.manual_seed(0)
    kinds = {"item": {"kind": "prefix", "levels": 3, "codebook_size": 4, **config}}
    found = EmbeddingCollection(SCHEMA, Tables(embedding_dim=4, init_std=0.5, kinds=kinds))
    table = found.kinds["item"]
    assert isinstance(table, PrefixTable)
    if codes is not None:
        table.set_codes(codes)
    return found, table


def some_codes(levels: int = 3) -> Tensor:
    return torch.randint(0, 4, (ROWS, levels), generator=torch.Generator().manual_seed(1))


def test_one_prefix_is_a_table_of_first_codes() -> None:
    codes = some_codes()
    embeddings, table = collection(codes, n=1)
    rows = embeddings.state_dict()["tables.item.prefixes.weight"]
    assert table.parts[0].rows == 4
    assert torch.equal(embeddings.vectors("item", torch.arange(ROWS)), rows[codes[:, 0]])


def test_flat_codes_of_their_own_are_a_row_for_each_id() -> None:
    """The digits of the id, before any codes are set: enough rows, and no two ids share one."""
    embeddings, _ = collection(scheme="flat", stored_rows=100)
    rows = embeddings.state_dict()["tables.item.prefixes.weight"]
    assert torch.equal(embeddings.vectors("item", torch.arange(ROWS)), rows[:ROWS])


@pytest.mark.parametrize(("scheme", "tokens"), [("prefix_ngram", 3), ("flat", 1), ("all_bigrams", 2), ("per_level", 3)])
def test_one_id_teaches_as_many_rows_as_it_has_tokens(scheme: str, tokens: int) -> None:
    embeddings, table = collection(some_codes(), scheme=scheme, stored_rows=200)
    batch = example_batch(SCHEMA, 1)
    batch.ids_BF[:] = 7
    batch.jagged_values[:] = 7  # the history too
    embeddings(batch).flat.sum().backward()
    touched = torch.cat([weight.grad.abs().sum(1) for weight in embeddings.weights()])  # type: ignore[union-attr]
    assert int((touched > 0).sum()) == tokens
    asked = sorted(int(ask.rows[0]) for ask in table.asks(torch.tensor([7])))
    assert touched.nonzero().squeeze(1).tolist() == asked


def test_ids_with_equal_codes_are_scored_alike_to_the_bit() -> None:
    codes = some_codes()
    codes[9] = codes[4]
    spec = {"name": "din", "hidden": [8], "embedding_dim": 4, "embedding_init": 0.5}
    model = RankerSpec.of({**spec, "tables": {"item": {"kind": "prefix", "codebook_size": 4}}}).build(SCHEMA).eval()
    plain = RankerSpec.of(spec).build(SCHEMA).eval()
    model.embeddings.kinds["item"].set_codes(codes)  # type: ignore[union-attr,operator,index]
    batch = example_batch(SCHEMA, 40)
    batch.jagged_values.copy_(torch.arange(len(batch.jagged_values)) % ROWS)
    scores = {}
    for name, ranker in (("semantic", model), ("plain", plain)):
        found = []
        for item in (4, 9):
            batch.ids_BF[:] = item
            with torch.no_grad():
                found.append(torch.sigmoid(ranker(batch).logits_BT))
        scores[name] = float(aar(*found).max())
    assert scores["semantic"] == 0 < scores["plain"]


def test_ids_without_content_share_a_row_that_learns() -> None:
    codes = some_codes().index_fill(0, torch.tensor([OUT_OF_VOCABULARY_ID, 5]), -1)
    embeddings, _ = collection(codes)
    embeddings.set_optimizer(EmbeddingOptimizer(kind="sgd", learning_rate=0.1))
    before = embeddings.state_dict()["tables.item.missing.weight"].clone()
    known = embeddings.vectors("item", torch.arange(ROWS))
    assert torch.equal(known[[OUT_OF_VOCABULARY_ID, 5]], before.expand(2, -1))
    batch = example_batch(SCHEMA, 3, 1)
    batch.ids_BF[:] = torch.tensor([[5], [2], [5]])
    batch.jagged_values[:] = 3
    tokens = embeddings.train()(batch).tokens_BFD[:, 0]
    assert torch.equal(tokens, known[torch.tensor([5, 2, 5])])
    tokens.sum().backward()
    after = embeddings.state_dict()["tables.item.missing.weight"]
    torch.testing.assert_close(after, before - 0.2)
    assert not torch.equal(embeddings.vectors("item", torch.tensor([2])), known[2:3])


def test_codes_of_another_quantiser_are_refused_and_those_of_one_aligned_to_it_are_not() -> None:
    _, table = collection()
    codes = some_codes()
    table.set_codes(codes, "00000000000000aa")
    table.set_codes(codes, "00000000000000aa")
    with pytest.raises(VersionMismatchError, match="has learnt codes of version 00000000000000aa, and these are of"):
        table.set_codes(codes.flip(0), "ffffffffffffffff")
    assert torch.equal(table.codes_RL.long(), codes)
    table.set_codes(codes.flip(0), "ffffffffffffffff", ("00000000000000aa",))
    assert torch.equal(table.codes_RL.long(), codes.flip(0))


def test_state_brings_codes_their_version_and_what_follows_from_them() -> None:
    codes = some_codes().index_fill(0, torch.tensor([5]), -1)
    first, table = collection(codes)
    table.set_codes(codes, "0123456789abcdef")
    second, _ = collection()
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    ids = torch.arange(ROWS)
    assert torch.equal(second.vectors("item", ids), first.vectors("item", ids))
    with pytest.raises(VersionMismatchError, match="0123456789abcdef"):
        second.kinds["item"].set_codes(codes, "00000000000000aa")  # type: ignore[operator]


def test_a_file_of_codes_says_how_many_levels_there_are(tmp_path: Path) -> None:
    quantizer = RQKMeans(2, [5, 3]).fit(torch.randn(40, 4, generator=torch.Generator().manual_seed(0)))
    codes = ItemCodes.of(pl.Series(range(40)), quantizer.encode(torch.zeros(40, 4)), quantizer)
    codes.write(tmp_path / "codes.parquet")
    config = PrefixTable.Config(codes=str(tmp_path))
    assert (config.levels, config.codebook_size) == (2, (5, 3))
    assert PrefixTable.Config.model_validate(config.model_dump()) == config
    with pytest.raises(ValueError, match="nowhere does not exist: expected codes that"):
        PrefixTable.Config(codes=str(tmp_path / "nowhere"))
    deep = PrefixTable(ROWS, 4, 1.0, PrefixTable.Config(levels=6, codebook_size=2048, stored_rows=5000))
    assert [part.exact for part in deep.tokenizer.layout()] == [True] + 5 * [False]
    assert len({int(ask.rows[7]) for ask in deep.asks(torch.arange(ROWS))}) == 6
    with pytest.raises(ValueError, match="n is 4, expected 1 to 3"):
        PrefixTable.Config(n=4)
    with pytest.raises(ValueError, match="num_embeddings is 3, and there are 32 first codes"):
        collection(codebook_size=32, stored_rows=3)


def test_a_share_of_the_ids_teaches_the_unknown_one() -> None:
    kinds = {"item": {"kind": "individual", "unknown_share": 0.25}}
    embeddings = EmbeddingCollection(SCHEMA, Tables(embedding_dim=4, kinds=kinds))
    table = embeddings.kinds["item"]
    ids = torch.arange(ROWS).repeat(400)
    torch.manual_seed(0)
    (asked,) = table.train().asks(ids)
    unknown = (asked.rows == OUT_OF_VOCABULARY_ID) & (ids > OUT_OF_VOCABULARY_ID)
    assert float(unknown.float().mean()) == pytest.approx(0.25 * 28 / 30, abs=0.02)
    assert torch.equal(asked.rows[~unknown], ids[~unknown])
    assert torch.equal(table.eval().asks(ids)[0].rows, ids)


def entropy_of_new_items(kind: Any, seed: int) -> float:
    """NE on items without a training row, after one pass over clicks that an item's place in a tree explains."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 4, (600, 3), generator=generator)
    path = codes @ torch.tensor([16, 4, 1])
    effect = sum(
        0.8**depth * torch.randn(4 ** (depth + 1), generator=generator)[path // 4 ** (2 - depth)] for depth in range(3)
    )
    effect = effect + 0.2 * torch.randn(600, generator=generator)
    item = torch.randint(0, 450, (12_000,), generator=generator)
    new = torch.randint(450, 600, (4000,), generator=generator)
    chance = torch.sigmoid(effect)
    click, truth = (torch.bernoulli(chance[items], generator=generator) for items in (item, new))
    schema = Schema(features=(Categorical(name="item", num_embeddings=600),), labels=(Label(name="click"),))
    torch.manual_seed(seed)
    kinds = {} if kind == "full" else {"item": {"kind": "prefix", "levels": 3, "codebook_size": 4, "stored_rows": 150}}
    embeddings = EmbeddingCollection(schema, Tables(embedding_dim=4, init_std=0.1, kinds=kinds))
    if kind != "full":
        table = embeddings.kinds["item"]
        assert isinstance(table, PrefixTable)
        table.set_codes(codes[torch.randperm(600, generator=generator)] if kind == "shuffled" else codes)
    embeddings.set_optimizer(EmbeddingOptimizer(kind="adagrad", learning_rate=0.2))
    head = torch.nn.Linear(4, 1)
    descent = torch.optim.Adam(head.parameters(), 0.05)
    for rows in torch.arange(12_000).split(200):
        batch = replace(example_batch(schema, 200), ids_BF=item[rows, None])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(head(embeddings(batch).flat)[:, 0], click[rows])
        descent.zero_grad()
        loss.backward()
        descent.step()
    with torch.no_grad():
        return normalized_entropy(head(embeddings.vectors("item", new))[:, 0], truth)


def test_new_items_are_known_by_their_codes_and_not_by_shuffled_ones() -> None:
    for seed in (1, 2, 3):
        found = {kind: entropy_of_new_items(kind, seed) for kind in ("full", "semantic", "shuffled")}
        assert found["semantic"] < min(found["full"], found["shuffled"]) - 0.05, found
        assert found["semantic"] < 0.95 < found["full"]
