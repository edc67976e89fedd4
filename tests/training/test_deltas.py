"""A bundle and its deltas are the model that was trained, for every kind of table; what does not follow is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tables import SCHEMA, frame
from torch import Tensor

from fullrank.embeddings import EmbeddingOptimizer
from fullrank.models import Ranker, RankerSpec
from fullrank.schema import Categorical, Schema
from fullrank.training import TrainerConfig, load_model, save_model
from fullrank.training.deltas import Position, apply_delta, changes, position_of, read_delta, write_delta
from fullrank.training.learner import Fitted, batches_of

KINDS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "hash": {"kind": "hash", "stored_rows": 20},
    "quotient_remainder": {"kind": "quotient_remainder", "collisions": 3},
    "features": {"kind": "quotient_remainder", "collisions": 3, "operation": "features"},
    "path": {"kind": "quotient_remainder", "collisions": 3, "operation": "path"},
    "chinese_remainder": {"kind": "chinese_remainder"},
    "mixed_dimension": {"kind": "mixed_dimension", "dims": [4, 2], "shares": [0.4]},
    "prefix": {"kind": "prefix", "levels": 2, "codebook_size": 4},
    "admitted": {"kind": "admitted", "capacity": 12, "admit_after": 2, "dropout": 0.2, "half_life": 3},
}
RAW = Schema(
    features=tuple(
        Categorical(name="item", encoding="raw") if feature.name == "item" else feature for feature in SCHEMA.features
    ),
    labels=SCHEMA.labels,
    keys=SCHEMA.keys,
)


def fitted(kind: str, embedding: str = "adagrad", storage: str = "float32") -> Fitted:
    torch.manual_seed(0)
    spec = {"name": "deepfm", "embedding_dim": 4, "embedding_init": 0.5, "hidden": [8], "tables": {"item": KINDS[kind]}}
    model = RankerSpec.of(spec).build(RAW if kind == "admitted" else SCHEMA)
    how = EmbeddingOptimizer.model_validate({"kind": embedding, "storage": storage})
    return Fitted(model, TrainerConfig(batch_size=50, learning_rate=0.05), how)


def rows(seed: int, kind: str) -> Any:
    some = frame(200, seed)
    return some.with_columns(item=some["item"].cast(int)) if kind == "admitted" else some


def state_of(model: Ranker) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: Ranker, right: Ranker) -> bool:
    one, other = left.state_dict(), right.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("kind", "embedding", "storage"),
    [*((kind, "adagrad", "float32") for kind in KINDS), ("full", "dense", "float32"), ("full", "adagrad", "split")],
)
def test_a_bundle_and_its_deltas_are_the_trained_model(kind: str, embedding: str, storage: str, tmp_path: Path) -> None:
    learner = fitted(kind, embedding, storage)
    learner.learn(rows(1, kind), 1)
    save_model(learner.model, tmp_path / "base")
    served, live = load_model(tmp_path / "base"), learner.model
    here = position = position_of(tmp_path / "base")
    before = state_of(live)
    for number in (1, 2):
        learner.learn(rows(10 + number, kind).head(60), number)
        path = tmp_path / f"delta-{number}"
        here = write_delta(path, before, live.state_dict(), here, schema=live.schema, until=number)
        before = state_of(live)
        position = apply_delta(served, path, position)
        assert position == here
    save_model(live, tmp_path / "full")
    whole = load_model(tmp_path / "full")
    assert same(served, whole)
    (batch,) = batches_of(rows(20, kind), live.schema, 1000)
    with torch.no_grad():  # also what is not state, such as the map from ids to rows
        assert torch.equal(served(batch).logits_BT, whole(batch).logits_BT)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle `base`, deltas `1` to `3`, and a delta `other` of the same model after another bundle."""
    place = tmp_path_factory.mktemp("chain")
    learner = fitted("full")
    learner.learn(rows(1, "full"), 1)
    save_model(learner.model, place / "base")
    here = position_of(place / "base")
    for number in (1, 2, 3):
        before = state_of(learner.model)
        learner.learn(rows(number, "full").head(10), number)
        here = write_delta(place / f"{number}", before, learner.model.state_dict(), here, schema=SCHEMA, until=number)
    write_delta(place / "other", before, learner.model.state_dict(), Position("f" * 64), schema=SCHEMA, until=3)
    return place


def test_a_delta_has_the_touched_rows_and_no_others(chain: Path) -> None:
    looked_up = frame(200, 2).head(10)["item"].n_unique()
    about, _ = read_delta(chain / "2")
    assert next(rows for name, rows in about.rows.items() if "item" in name) == looked_up


def test_applied_again_a_delta_changes_nothing(chain: Path) -> None:
    model, position = load_model(chain / "base"), position_of(chain / "base")
    for number in (1, 2):
        position = apply_delta(model, chain / f"{number}", position)
    then = state_of(model)
    for number in (2, 1):
        assert apply_delta(model, chain / f"{number}", position) == position
    assert all(torch.equal(then[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("gap", "is delta 3, and the model has had 1"),
        ("foreign", "is for another bundle"),
        ("schema", "with another schema"),
        ("flip", "does not match its hash"),
        ("cut", "is not a whole delta"),
        ("missing", "is not a whole delta"),
        ("misfit", "does not fit the model"),
        ("nan", "NaN"),
    ],
)
def test_what_does_not_follow_is_refused_and_changes_nothing(
    chain: Path, tmp_path: Path, change: str, message: str
) -> None:
    model = load_model(chain / "base")
    position = apply_delta(model, chain / "1", position_of(chain / "base"))
    then = state_of(model)
    path = {"gap": chain / "3", "foreign": chain / "other", "missing": chain / "9"}.get(change, tmp_path / "2")
    if path.parent == tmp_path:
        path.mkdir()
        text, tensors = ((chain / "2" / name).read_bytes() for name in ("delta.json", "tensors.safetensors"))
        if change == "schema":
            text = json.dumps({**json.loads(text), "table_schema": "0" * 64}).encode()
        elif change == "flip":
            tensors = tensors[:-1] + bytes([tensors[-1] ^ 1])
        elif change == "cut":
            text = text[: len(text) // 2]
        (path / "delta.json").write_bytes(text)
        (path / "tensors.safetensors").write_bytes(tensors)
        if change in ("misfit", "nan"):
            shutil.rmtree(path)
            name = next(name for name in then if "item" in name)
            new = torch.zeros(60, 9) if change == "misfit" else torch.full_like(then[name], torch.nan)
            old = new + 1 if change == "misfit" else then[name]
            write_delta(path, {name: old}, {name: new}, position, schema=SCHEMA, until=2)
    with pytest.raises(ValueError, match=message) as refused:
        apply_delta(model, path, position)
    assert "\n" not in str(refused.value)
    assert all(torch.equal(then[name], value) for name, value in model.state_dict().items())


def test_all_bits_count() -> None:
    """-0 and 0 are equal numbers and other bits; so are two NaNs."""
    found = changes({"a": torch.tensor([[0.0], [1.0], [2.0]])}, {"a": torch.tensor([[-0.0], [1.0], [2.0]])})
    assert found["rows|a"].tolist() == [0]
    assert changes({"n": torch.tensor([torch.nan])}, {"n": torch.tensor([torch.nan])}) == {}
