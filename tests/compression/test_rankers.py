"""Facts about rankers whose tables are codes, for every kind of table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fullrank.batch import Batch
from fullrank.compression import quantize_ranker, quantize_table
from fullrank.embeddings import EmbeddingCollection
from fullrank.models import Ranker, RankerSpec
from fullrank.schema import Categorical, EventId, Label, MultiCategorical, Schema, Sequence
from fullrank.training import Trainer, TrainerConfig
from fullrank.training.saving import load_model, save_model

SCHEMA = Schema(
    features=(
        Categorical(name="user", num_embeddings=50),
        Categorical(name="plain", num_embeddings=11),
        Categorical(name="item", num_embeddings=30),
        MultiCategorical(name="liked", table="item", num_embeddings=30),
        MultiCategorical(name="genres", num_embeddings=40),
        Sequence(name="history", fields=(EventId(name="item", table="item", num_embeddings=30),)),
    ),
    labels=(Label(name="y"),),
)
KINDS: dict[str, Any] = {
    "user": {"kind": "quotient_remainder", "collisions": 3},
    "item": {"kind": "mixed_dimension", "dims": [8, 4, 1], "shares": [0.3, 0.3]},
    "genres": {"kind": "prefix", "levels": 2, "codebook_size": 7, "stored_rows": 60},
}


def a_ranker(name: str = "dlrm", **config: Any) -> Ranker:
    torch.manual_seed(0)
    spec = RankerSpec.of({"name": name, "embedding_dim": 8, "embedding_init": 0.5, **config})
    return spec.build(SCHEMA).eval()


def a_batch(rows: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(1)

    def ids(below: int, count: int) -> torch.Tensor:
        return torch.randint(0, below, (count,), generator=generator)

    lengths = torch.randint(0, 5, (3, rows), generator=generator)
    sizes = lengths.sum(1).tolist()
    return Batch(
        numeric_BN=torch.zeros(rows, 0),
        ids_BF=torch.stack([ids(50, rows), ids(11, rows), ids(30, rows)], 1),
        jagged_keys=("liked", "genres", "history.item"),
        jagged_values=torch.cat([ids(below, size) for below, size in zip((30, 40, 30), sizes, strict=True)]),
        jagged_lengths_KB=lengths,
        event_keys=(),
        event_values=torch.zeros(0),
        event_lengths_EB=torch.zeros(0, rows, dtype=torch.int64),
        labels_BT=torch.zeros(rows, 1),
    )


def with_dequantized_tables(ranker: Ranker, bits: Any) -> Ranker:
    """The float32 ranker whose rows are what the codes of each part say, one part after the other."""
    state = ranker.state_dict()
    for key, value in state.items():
        if ".tables." in f".{key}" and value.shape[1] > 1 and value.is_floating_point():
            state[key] = quantize_table(value, bits, "greedy").dequantize()
    copy = RankerSpec.of({"name": ranker.name, **ranker.config.model_dump()}).build(SCHEMA)
    copy.load_state_dict(state)
    return copy.eval()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("dlrm", {}),  # one buffer, plain tables
        ("dlrm", {"tables": KINDS}),
        ("deepfm", {"tables": KINDS}),  # weights of width 1 beside the vectors
        ("din", {"tables": KINDS}),  # events
        ("hilomoe", {"backbone": {"name": "dcn_v2", "embedding_dim": 8, "embedding_init": 0.5, "tables": KINDS}}),
    ],
)
def test_a_ranker_of_codes_says_what_one_of_dequantised_rows_says(name: str, config: dict[str, Any], bits: Any) -> None:
    ranker, batch = a_ranker(name, **config), a_batch()
    before = ranker(batch).logits_BT
    smaller, parts = quantize_ranker(ranker, bits, "greedy")
    found = smaller(batch).logits_BT
    torch.testing.assert_close(found, with_dequantized_tables(ranker, bits)(batch).logits_BT, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found, before) and ranker(batch).logits_BT.equal(before)
    assert smaller.num_parameters() == ranker.num_parameters()
    left = [part for part in parts if part.left]
    assert all(part.width == 1 and "1 wide" in str(part.left) and part.before == part.after for part in left)
    assert sum(part.after for part in parts if not part.left) < 0.8 * sum(
        part.before for part in parts if not part.left
    )
    packed = {key: value for key, value in smaller.state_dict().items() if value.dtype == torch.uint8}
    assert {key: value.nbytes for key, value in packed.items()} == {p.name: p.after for p in parts if not p.left}
    kept = smaller.state_dict().keys() - packed.keys()
    assert all(smaller.state_dict()[key].equal(ranker.state_dict()[key]) for key in kept)


def test_nothing_in_memory_is_wider_than_the_codes() -> None:
    smaller, parts = quantize_ranker(a_ranker())
    collection = next(module for module in smaller.modules() if isinstance(module, EmbeddingCollection))
    held = [*collection.parameters(), *(b for n, b in collection.named_buffers() if "packed" in n)]
    assert sum(tensor.nbytes for tensor in held) == sum(part.after for part in parts)
    assert collection.packed_tables() == sorted(SCHEMA.tables())


def test_vectors_of_ids_are_those_of_the_codes() -> None:
    ranker = a_ranker(tables=KINDS)
    smaller, _ = quantize_ranker(ranker, 8)
    found, ids_N = [], torch.tensor([0, 3, 29, 3])
    for model in (ranker, smaller):
        collection = next(module for module in model.modules() if isinstance(module, EmbeddingCollection))
        found.append(collection.vectors("item", ids_N))
    torch.testing.assert_close(found[1], found[0], rtol=0.02, atol=0.02)


def test_some_tables_only_and_none_whose_error_is_large() -> None:
    ranker = a_ranker()
    smaller, parts = quantize_ranker(ranker, tables=["user", "item"])
    assert smaller.packed_tables() == ["item", "user"]
    assert {part.table: part.left for part in parts if part.left} == dict.fromkeys(("plain", "genres"), "not chosen")
    smaller, parts = quantize_ranker(ranker, 2, max_error=0.01)
    assert not smaller.packed_tables()
    assert all(str(part.left).startswith("its error would be 0.") for part in parts)


def test_a_table_beyond_fp16_is_left() -> None:
    ranker = a_ranker()
    state = ranker.state_dict()
    key = next(key for key in state if key.endswith("tables.user.weight"))
    state[key][7, 0] = 1e6
    ranker.load_state_dict(state)
    smaller, parts = quantize_ranker(ranker)
    assert smaller.packed_tables() == ["genres", "item", "plain"]
    assert [part.left for part in parts if part.left] == ['table "user": row 7 has 1e+06, beyond the 65504 of fp16']


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tables": ["users"]}, 'there is no table "users"; the model has user, plain, item, genres'),
        ({"method": "row_codebook"}, "method row_codebook has no form that is served: expected one of minmax, "),
        ({"bits": 5}, "bits is 5, expected 2, 4 or 8"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_ranker(a_ranker(), **options)


def test_codes_are_not_quantised_again_and_not_trained() -> None:
    smaller, _ = quantize_ranker(a_ranker())
    with pytest.raises(ValueError, match='table "genres" is quantised already: start from the float32 model'):
        quantize_ranker(smaller)
    loader: list[Batch] = [a_batch()]
    with pytest.raises(ValueError, match='table "genres" is quantised, which is for serving: train the model with its'):
        Trainer(TrainerConfig(epochs=1)).fit(smaller, loader)  # type: ignore[arg-type]


def test_a_saved_ranker_says_the_same_and_damage_is_found(tmp_path: Path) -> None:
    smaller, parts = quantize_ranker(a_ranker(tables=KINDS))
    save_model(smaller, tmp_path / "bundle")
    loaded, batch = load_model(tmp_path / "bundle"), a_batch()
    assert loaded(batch).logits_BT.equal(smaller(batch).logits_BT)
    assert loaded.packed_tables() == smaller.packed_tables()
    key = next(part.name for part in parts if part.table == "user")
    weights = smaller.state_dict()
    weights[key][3, -3:] = torch.tensor([0xFC, 0x00, 0xFE], dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=f'"{key}" has a NaN or infinite scale or bias'):
        a_ranker_like(smaller).load_state_dict(weights)
    # Of width 8, four bytes of codes and four of numbers: the shape alone does not tell codes from numbers.
    weights = smaller.state_dict()
    weights[key] = weights[key].float()
    with pytest.raises(RuntimeError, match="has torch.float32, expected packed rows of torch.uint8"):
        a_ranker_like(smaller).load_state_dict(weights)
    state = a_ranker(tables=KINDS).state_dict()
    state[key] = state[key].to(torch.uint8)
    with pytest.raises(RuntimeError, match="has torch.uint8, expected torch.float32"):
        a_ranker(tables=KINDS).load_state_dict(state)


def a_ranker_like(ranker: Ranker) -> Ranker:
    return RankerSpec.of({"name": ranker.name, **ranker.config.model_dump()}).build(SCHEMA)
