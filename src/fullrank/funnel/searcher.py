"""A retriever that stands alone, with all that a search for raw requests needs."""

# Shapes: B requests, K results.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import polars as pl

from fullrank.data.dataset import Dataset
from fullrank.data.encoders import Encoders
from fullrank.funnel.catalogue import Catalogue, all_rows, usual_context
from fullrank.funnel.requests import Request, RequestEncoder
from fullrank.retrieval import Items, Retriever, RetrieverSpec
from fullrank.retrieval.base import Progress


@dataclass(frozen=True)
class Searcher:
    """Attributes:
    encoders: of the log.
    items: those that may be found, all of them in the retriever's index.
    users: those that the log knows; None if it names none.
    context: one row, what a request does not say of when and where.
    retriever: fitted.
    """

    encoders: Encoders
    items: Catalogue
    users: Catalogue | None
    context: pl.DataFrame
    retriever: Retriever

    @classmethod
    def train(cls, spec: RetrieverSpec, dataset: Dataset, progress: Progress | None = None) -> Searcher:
        """Fit a retriever to the training part of a dataset, and index all items of the log.

        Raises:
            ValueError: if the log lacks what the retriever learns from, or names no item_id.
        """
        schema = dataset.schema
        items = Catalogue.of(all_rows(dataset, "item"), schema)
        users = Catalogue.of(all_rows(dataset, "user"), schema) if schema.keys.user_id is not None else None
        retriever = spec.build(schema).fit(dataset, progress=progress)
        retriever.index(Items(items.keys_I, items.rows.batch))
        return cls(dataset.encoders, items, users, usual_context(dataset), retriever)

    @cached_property
    def encode(self) -> RequestEncoder:
        return RequestEncoder(self.encoders, self.users, self.context, self.items)

    def search(self, requests: Sequence[Request], k: int) -> list[list[tuple[int | str, float]]]:
        """Ids and scores of the best items of each request, best first; fewer than k if no more are found.

        Raises:
            ValueError: if k is below 1, or a request has an unknown feature or a value of the wrong type.
        """
        found = self.retriever.search(self.encode(requests), k)
        ids, lists = self.items.ids, []
        for rows_K, scores_K in zip(self.items.places(found.item_keys_BK), found.scores_BK, strict=True):
            there_K = rows_K >= 0
            rows, scores = rows_K[there_K].tolist(), scores_K[there_K].tolist()
            lists.append([(ids[row], score) for row, score in zip(rows, scores, strict=True)])
        return lists
