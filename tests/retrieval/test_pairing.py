"""Facts about pairs of users and items."""

from __future__ import annotations

import torch

from fullrank.batch import RowGather
from fullrank.data.dataset import Dataset
from fullrank.data.loader import partial_batch
from fullrank.retrieval.pairing import Pairing


def rows_equal(batch: object, other: object) -> None:
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(getattr(other, name))), name


def test_pairs_hold_the_columns_of_user_and_item(dataset: Dataset) -> None:
    """Pairing the rows of a log with themselves gives the log back, in any order and multiplicity."""
    frame = dataset.scan("test").collect().drop("__timestamp", "__user_id")
    whole = RowGather(partial_batch(frame.drop("click"), dataset.schema))
    pairing = Pairing.of(dataset.schema)
    rows = torch.randint(0, 200, (333,), generator=torch.Generator().manual_seed(0))
    rows_equal(pairing(whole, rows, whole, rows), whole.take(rows))
    # One user against many items goes another way through the code.
    one = RowGather(whole.batch[17:18])
    pairs = pairing(one, torch.zeros(333, dtype=torch.int64), whole, rows)
    rows_equal(pairs, pairing(whole, torch.full((333,), 17), whole, rows))
