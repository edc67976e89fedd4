"""Facts about the container of tensors: whatever is done to rows is done to every column."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fullrank.batch import Batch, RowGather


def example(rows: int = 7, seed: int = 0) -> Batch:
    """Every field filled, lists of 0 to 3 entries."""
    generator = torch.Generator().manual_seed(seed)
    ids_KB = torch.randint(0, 4, (3, rows), generator=generator)
    events_EB = torch.randint(0, 4, (1, rows), generator=generator)
    return Batch(
        numeric_BN=torch.rand(rows, 2, generator=generator),
        ids_BF=torch.randint(0, 9, (rows, 4), generator=generator),
        jagged_keys=("tags", "history.item", "history.kind"),
        jagged_values=torch.randint(0, 99, (int(ids_KB.sum()),), generator=generator),
        jagged_lengths_KB=ids_KB,
        event_keys=("history.age",),
        event_values=torch.rand(int(events_EB.sum()), generator=generator),
        event_lengths_EB=events_EB,
        labels_BT=torch.rand(rows, 1, generator=generator),
        weights_B=torch.rand(rows, generator=generator),
        timestamp_B=torch.arange(rows),
        user_B=torch.randint(0, 3, (rows,), generator=generator),
        extra={"teacher": torch.rand(rows, generator=generator), "vector": torch.rand(rows, 5, generator=generator)},
    )


def row(batch: Batch, place: int) -> dict[str, object]:
    """All that a batch says of one row, read field by field."""
    said: dict[str, object] = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if field.name.endswith(("_BN", "_BF", "_BT", "_B")):
            said[field.name] = value[place].tolist()
    said.update({name: column[place].tolist() for name, column in batch.extra.items()})
    for key in batch.jagged_keys:
        values, lengths_B = batch.jagged(key)
        said[key] = values.split(lengths_B.tolist())[place].tolist()
    for key in batch.event_keys:
        values, lengths_B = batch.events(key)
        said[key] = values.split(lengths_B.tolist())[place].tolist()
    return said


def rows(batch: Batch) -> list[dict[str, object]]:
    return [row(batch, place) for place in range(len(batch))]


def test_every_field_is_followed() -> None:
    """The helper above reads what a field holds off its name: a new field has to be in the example, and in it."""
    said = row(example(), 0)
    lists = {"jagged_keys", "jagged_values", "jagged_lengths_KB", "event_keys", "event_values", "event_lengths_EB"}
    assert {field.name for field in dataclasses.fields(Batch)} - lists - {"extra"} <= said.keys()


def test_taken_rows_are_the_rows_in_the_order_asked_for() -> None:
    batch = example()
    wanted = [3, 0, 0, 6]
    assert rows(batch.take(torch.tensor(wanted))) == [row(batch, place) for place in wanted]
    assert rows(RowGather(batch[4:5]).take(torch.zeros(3, dtype=torch.int64))) == [row(batch, 4)] * 3
    assert len(batch.take(torch.tensor([], dtype=torch.int64))) == 0


def test_a_slice_and_its_complement_joined_are_the_batch() -> None:
    batch = example()
    assert rows(batch[2:5]) == rows(batch)[2:5]
    assert rows(Batch.cat([batch[:2], batch[2:2], batch[2:5], batch[5:]])) == rows(batch)


def test_what_one_batch_lacks_the_joined_one_lacks_but_further_columns_are_never_dropped() -> None:
    batch, other = example(), dataclasses.replace(example(), weights_B=None)
    assert Batch.cat([batch, other]).weights_B is None
    with pytest.raises(ValueError, match="differ in their extra columns"):
        Batch.cat([batch, dataclasses.replace(batch, extra={})])
    with pytest.raises(ValueError, match="differ in their jagged_keys"):
        Batch.cat([batch, dataclasses.replace(batch, jagged_keys=("a", "b", "c"))])
    with pytest.raises(ValueError, match="no batch"):
        Batch.cat([])


def test_every_tensor_moves() -> None:
    moved = example().to("meta")
    tensors = list(moved.tensors())
    assert len(tensors) == 12
    assert all(tensor.is_meta for tensor in tensors)
    assert all(column.is_meta for column in moved.extra.values())
    example().record_stream(torch.Stream("cpu"))  # nothing to wait for, and no error
