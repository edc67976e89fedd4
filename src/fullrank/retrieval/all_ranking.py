"""All-ranking evaluation, as tables of implicit feedback have it: each user's best items of the whole catalogue."""

# Shapes: B users of a block, P pairs, K results, R relevant items.

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import torch
from torch import Tensor

from fullrank.batch import RowGather
from fullrank.data.dataset import Dataset
from fullrank.data.encoders import KEY_COLUMNS
from fullrank.data.loader import partial_batch
from fullrank.metrics import ranked_ndcg_at_k, recall_at_k
from fullrank.retrieval.base import NO_ITEM, Items, Retriever, item_keys

USERS_AT_ONCE = 512
_USER, _ITEM = KEY_COLUMNS["user_id"], KEY_COLUMNS["item_id"]


def training_items(log: Dataset) -> Items:
    """All items of the training part, with the features last seen there."""
    catalogue = log.catalogue("item")
    return Items(item_keys(catalogue[_ITEM]), partial_batch(catalogue, log.schema))


def evaluate_all_ranking(
    retriever: Retriever, log: Dataset, split: str = "test", *, ks: Sequence[int] = (20, 100)
) -> dict[str, float]:
    """Recall and NDCG of the best items of each user who has an item to be found, averaged over these users.

    The items to be found are those of a user's positive rows of the split. Items of the user's positive rows in
    training are taken out of the list, and do not count. Everything that the retriever has indexed is ranked; an item
    that it has not is never found. The result is exact if the search is: a list longer than wanted by the number of
    items taken in training holds the best k others.

    Args:
        retriever: fitted, with the items indexed.

    Returns:
        `users`, and `recall_at_<k>` and `ndcg_at_<k>` for each k.

    Raises:
        ValueError: if the log names no user_id or item_id, has no binary label, or no user has an item to be found.

    Source: He et al., LightGCN, SIGIR 2020, section 4.1, and the works it follows.
    """
    taken = _lists(log, "train", "taken")
    wanted = _lists(log, split, "wanted").join(taken, on=_USER, how="left").with_columns(pl.col("taken").fill_null([]))
    wanted = wanted.with_columns(pl.col("wanted").list.set_difference("taken")).filter(pl.col("wanted").list.len() > 0)
    if not wanted.height:
        raise ValueError(f'{log.path}: no user has an item in "{split}" that is not in training')
    # Users who took equally many stand together, so that no list is longer than it has to be.
    wanted = wanted.sort(pl.col("taken").list.len(), _USER)
    known = pl.concat([log.catalogue("user"), log.catalogue("user", split)]).unique(_USER, keep="first")
    users = RowGather(partial_batch(wanted.select(_USER).join(known, on=_USER, maintain_order="left"), log.schema))
    most = max(ks)
    sums: dict[str, float] = {}
    for begin in range(0, wanted.height, USERS_AT_ONCE):
        part = wanted[begin : begin + USERS_AT_ONCE]
        taken_BR, relevant_BR = _padded(part["taken"]), _padded(part["wanted"])
        batch = users.take(torch.arange(begin, begin + part.height))
        found_BK = retriever.search(batch, most + taken_BR.shape[1]).item_keys_BK
        ranked_BK = _without(found_BK, taken_BR)[:, :most]
        for k in ks:
            for name, metric in (("recall", recall_at_k), ("ndcg", ranked_ndcg_at_k)):
                key = f"{name}_at_{k}"
                sums[key] = sums.get(key, 0.0) + part.height * metric(ranked_BK, relevant_BR, k)
    return {"users": float(wanted.height), **{name: value / wanted.height for name, value in sums.items()}}


def _lists(log: Dataset, split: str, name: str) -> pl.DataFrame:
    """Keys of the items of each user's positive rows."""
    for key in ("user_id", "item_id"):
        if getattr(log.schema.keys, key) is None:
            raise ValueError(f"{log.path}: all-ranking evaluation needs a {key} among the schema's keys")
    label = next((label.name for label in log.schema.labels if label.kind == "binary"), None)
    if label is None:
        raise ValueError(f"{log.path}: all-ranking evaluation needs a binary label")
    rows = log.scan(split).filter(pl.col(label) == 1).select(_USER, _ITEM).drop_nulls().unique().collect()
    keys = pl.Series(name, item_keys(rows[_ITEM]).numpy())
    return rows.select(_USER).with_columns(keys).group_by(_USER).agg(name)


def _padded(lists: pl.Series) -> Tensor:
    """Lists as rows, `NO_ITEM` behind the last."""
    lengths = torch.from_numpy(lists.list.len().cast(pl.Int64).to_numpy().copy())
    padded = torch.full((len(lists), int(lengths.max())), NO_ITEM)
    inside = torch.arange(padded.shape[1]) < lengths[:, None]
    padded[inside] = torch.from_numpy(lists.explode().drop_nulls().to_numpy().copy())
    return padded


def _without(ranked_BK: Tensor, taken_BR: Tensor) -> Tensor:
    """The lists without some of their items, in order, `NO_ITEM` behind the last."""
    sorted_BR = taken_BR.sort(1).values
    if not sorted_BR.shape[1]:
        return ranked_BK
    place_BK = torch.searchsorted(sorted_BR, ranked_BK).clamp_max(sorted_BR.shape[1] - 1)
    gone_BK = (sorted_BR.gather(1, place_BK) == ranked_BK) | (ranked_BK == NO_ITEM)
    order_BK = gone_BK.to(torch.int8).sort(dim=1, stable=True).indices
    return ranked_BK.masked_fill(gone_BK, NO_ITEM).gather(1, order_BK)
