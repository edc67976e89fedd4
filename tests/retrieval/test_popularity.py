"""Facts about the most clicked items."""

from __future__ import annotations

import polars as pl

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset
from fullrank.retrieval import Items, Popularity


def test_popularity_ranks_by_clicks(dataset: Dataset, items: Items, users: Batch) -> None:
    retriever = Popularity(dataset.schema).fit(dataset)
    retriever.index(items)
    clicks = dataset.scan("train").filter(pl.col("click") == 1).group_by("__item_id").len().collect()
    expected = clicks.sort(["len", "__item_id"], descending=[True, False])["__item_id"].to_list()
    assert retriever.search(users, 5).item_keys_BK.tolist() == [expected[:5]] * 12
