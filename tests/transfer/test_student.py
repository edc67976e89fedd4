"""Facts about a student: where it equals the ranker in it, and what reaches it through its history."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset
from fullrank.data.loader import Loader, batch_from_frame
from fullrank.data.planted import planted_dataset
from fullrank.embeddings import Tables
from fullrank.models import RankerSpec
from fullrank.training import Trainer, TrainerConfig, load_model, save_model
from fullrank.transfer.codec import pack, unpack
from fullrank.transfer.histories import AGE, CODES, HistoryConfig, HistoryPooling, decoded, history_columns
from fullrank.transfer.lookup import HistorySequence
from fullrank.transfer.student import TEACHER, Student, export_student

BASE = {"name": "dcn_v2", "hidden": [16, 8], "num_cross_layers": 1, "embedding_init": 0.1}
SEVERAL = {"name": "mmoe", "expert_hidden": [8, 4], "hidden": [4], "embedding_init": 0.1}
DIM = 5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Two binary labels."""
    return planted_dataset(tmp_path_factory.mktemp("data") / "d", "cascade", 2000)


@pytest.fixture(scope="module")
def batches(dataset: Dataset) -> list[Batch]:
    """With a teacher's labels, a few of which are missing, and histories of up to three events."""
    rng, found = np.random.default_rng(0), []
    for batch in Loader(dataset, "train", 256):
        rows = len(batch)
        lengths = rng.integers(0, 4, rows)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        n = int(offsets[-1])
        codes = pack(rng.uniform(-1, 1, (n, DIM)).astype(np.float32))
        zeros = np.zeros(n, np.int64)
        sequence = HistorySequence(codes, offsets, zeros + 10, zeros, zeros.astype(np.int16), ("v1",), DIM, 4, DIM)
        frame = pl.DataFrame(history_columns(sequence, 3))
        extra = {name: torch.from_numpy(frame[name].to_numpy().copy()) for name in (CODES, AGE)}
        teacher = torch.rand(rows, 2)
        teacher[rng.random(rows) < 0.2] = torch.nan
        found.append(replace(batch, extra={**extra, TEACHER: teacher}))
    return found


def fitted(spec: dict[str, Any], dataset: Dataset, batches: list[Batch]) -> Any:
    torch.manual_seed(0)
    model = RankerSpec.of(spec).build(dataset.schema)
    Trainer(TrainerConfig(epochs=1, seed=1)).fit(model, batches)
    return model.eval()


def same_weights(student: Student, alone: torch.nn.Module) -> bool:
    mine = student.backbone.state_dict()
    return all(torch.equal(mine[name], value) for name, value in alone.state_dict().items())


@pytest.mark.parametrize("base", [BASE, SEVERAL], ids=["dcn_v2", "mmoe"])
@pytest.mark.parametrize("mode", ["kd", "aux_head", "aux_head+adapter"])
def test_without_weight_or_labels_a_student_is_the_ranker_in_it(
    base: dict[str, Any], mode: str, dataset: Dataset, batches: list[Batch]
) -> None:
    """Bit for bit, over an epoch."""
    alone = fitted(base, dataset, batches)
    spec = {"name": "student", "backbone": base, "distillation": {"mode": mode, "weight": 0}}
    assert same_weights(fitted(spec, dataset, batches), alone)
    masked = [replace(b, extra={**b.extra, TEACHER: torch.full_like(b.extra[TEACHER], torch.nan)}) for b in batches]
    spec["distillation"] = {"mode": mode, "weight": 2}
    assert same_weights(fitted(spec, dataset, masked), alone)
    assert not same_weights(fitted(spec, dataset, batches), alone)
    assert same_weights(fitted({"name": "student", "backbone": base}, dataset, batches), alone)


@pytest.mark.parametrize("pooling", ["sum", "mean", "target_attention"])
def test_an_exported_student_predicts_the_same_with_fewer_numbers(
    pooling: str, dataset: Dataset, batches: list[Batch], tmp_path: Path
) -> None:
    history = {"pooling": pooling, "dim": DIM, "length": 3, "prefix": 4}
    spec = {"name": "student", "backbone": BASE, "distillation": {"mode": "aux_head+adapter"}, "history": history}
    model = fitted(spec, dataset, batches)
    save_model(model, tmp_path / "whole", dataset.encoders)
    served = export_student(tmp_path / "whole", tmp_path / "served")
    again = load_model(tmp_path / "served")
    before = model(batches[0]).logits_BT
    assert torch.equal(again(batches[0]).logits_BT, before) and torch.equal(served(batches[0]).logits_BT, before)
    assert again.num_parameters().dense < model.num_parameters().dense
    assert not any(name.startswith("heads") for name in again.state_dict())
    # What it has seen in histories counts; where there is none, that is what it says without the columns too.
    moved = replace(batches[0], extra={**batches[0].extra, CODES: batches[0].extra[CODES].flip(0)})
    has = ~batches[0].extra[AGE].isnan().all(1)
    assert not torch.allclose(again(moved).logits_BT[has], before[has], atol=1e-5)
    cold = again(replace(batches[0], extra={})).logits_BT
    assert torch.allclose(cold[~has], before[~has], atol=1e-6) and before.isfinite().all()


def test_a_student_does_not_see_what_it_is_to_be_without(dataset: Dataset, batches: list[Batch]) -> None:
    names = [feature.name for feature in dataset.schema.features]
    model = fitted({"name": "student", "backbone": BASE, "without": names[:1]}, dataset, batches)
    batch = batches[0]
    other = replace(batch, ids_BF=batch.ids_BF.clone())
    other.ids_BF[:, 0] = other.ids_BF[:, 0].flip(0)
    assert torch.equal(model(other).logits_BT, model(batch).logits_BT)
    alone = RankerSpec.of(BASE).build(dataset.schema.without(names[:1]))
    assert alone.num_parameters() == model.num_parameters()


def test_poolers_are_what_they_say(dataset: Dataset) -> None:
    rng = np.random.default_rng(1)
    z = np.clip(rng.uniform(-1, 1, (5, DIM)), -1, 0.9).astype(np.float32)
    rounded = torch.from_numpy(unpack(pack(z), DIM))
    zeros = np.zeros(5, np.int64)
    offsets = np.array([0, 3, 3, 5])
    sequence = HistorySequence(pack(z), offsets, zeros, zeros, zeros.astype(np.int16), ("v1",), DIM, 4, DIM)
    frame = pl.DataFrame(history_columns(sequence, 4))
    rows = next(iter(Loader(dataset, "train", 3)))
    batch = replace(rows, extra={name: torch.from_numpy(frame[name].to_numpy().copy()) for name in (CODES, AGE)})
    for pooling in ("sum", "mean"):
        module = HistoryPooling(HistoryConfig(pooling=pooling, dim=DIM, length=4), dataset.schema, Tables())
        pooled, there = module(batch)
        parts = [rounded[:3], rounded[3:]]
        expected = torch.stack([p.mean(0) if pooling == "mean" else p.sum(0) / 2 for p in parts])
        assert torch.allclose(pooled[[0, 2]], expected) and not pooled[1].any() and there.tolist() == [1, 0, 1]
    attention = HistoryPooling(HistoryConfig(pooling="target_attention", dim=DIM), dataset.schema, Tables())
    pooled, _ = attention(batch)
    values, there_BL = decoded(batch, attention.config)
    assert not pooled[1].any() and pooled.isfinite().all() and there_BL.sum(1).tolist() == [3, 0, 2]
    # Weights that sum to 1: within what it pools.
    assert (pooled[0] <= values[0].amax(0) + 1e-6).all()


def test_the_columns_of_a_history_pass_through_a_frame(dataset: Dataset) -> None:
    codes = pack(np.random.default_rng(2).uniform(-1, 1, (4, 32)).astype(np.float32))
    zeros = np.zeros(4, np.int64)
    offsets = np.array([0, 4, 4])
    sequence = HistorySequence(codes, offsets, zeros + 5_000_000, zeros, zeros.astype(np.int16), ("v",), 32, 4, 32)
    rows = dataset.scan("train").head(2).collect().with_columns(history_columns(sequence, 6))
    batch = batch_from_frame(rows, dataset.schema, extra=[CODES, AGE])
    values, there = decoded(batch, HistoryConfig(dim=32))
    assert np.array_equal(values[0, 2:].numpy(), unpack(codes, 32)) and there[0].tolist() == [False] * 2 + [True] * 4
    assert batch.extra[AGE][0, 2] == 5 and not there[1].any()


def test_what_a_student_needs_is_said(dataset: Dataset, batches: list[Batch], tmp_path: Path) -> None:
    schema = dataset.schema

    def build(**fields: Any) -> Any:
        return RankerSpec.of({"name": "student", "backbone": BASE, **fields}).build(schema)

    with pytest.raises(ValueError, match='the log has no feature "nothing"'):
        build(without=["nothing"])
    with pytest.raises(ValueError, match="use mode kd"):
        build(backbone={"name": "lr"}, distillation={"mode": "aux_head"})
    with pytest.raises(ValueError, match="no columns"):
        build(history={"dim": DIM}).train()(replace(batches[0], extra={}))
    with pytest.raises(ValueError, match=f'no column "{TEACHER}"'):
        build(distillation={}).train()(replace(batches[0], extra={}))
    save_model(RankerSpec.of(BASE).build(schema), tmp_path / "plain", dataset.encoders)
    with pytest.raises(ValueError, match="holds a dcn_v2, expected a student"):
        export_student(tmp_path / "plain", tmp_path / "out")
