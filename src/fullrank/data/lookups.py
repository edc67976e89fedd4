"""How often each id of each table is looked up in the rows of a dataset."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from fullrank.data.dataset import Dataset
from fullrank.schema import RAW_IDS


def lookup_counts(dataset: Dataset, split: str = "train") -> dict[str, npt.NDArray[np.int64]]:
    """By table: lookups of each id in the rows of a split, reserved ids included, shape (rows of the table,).

    All columns that share a table are counted together; each id of a bag and each event of a sequence is a lookup.
    Tables of raw ids are left out.
    """
    sizes = dataset.schema.tables()
    counts = {table: np.zeros(rows, np.int64) for table, rows in sizes.items() if rows < RAW_IDS}
    lists = set(dataset.schema.jagged_keys)
    for name, feature in dataset.schema.embedded().items():
        if feature.table_name not in counts:
            continue
        ids = pl.col(name).explode(empty_as_null=False) if name in lists else pl.col(name)
        found = dataset.scan(split).select(ids).group_by(name).len().drop_nulls(name).collect()
        counts[feature.table_name][found[name].to_numpy()] += found["len"].to_numpy().astype(np.int64)
    return counts
