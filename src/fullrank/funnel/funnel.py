"""Retrieval, early stage, final stage and value, put together."""

# Shapes: U users, I items, C candidates of a user, P (user, candidate) pairs, T tasks, K results.

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import polars as pl
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fullrank.batch import Batch, RowGather
from fullrank.data.encoders import Encoders
from fullrank.data.loader import partial_batch
from fullrank.funnel.catalogue import Catalogue
from fullrank.funnel.requests import Request, RequestEncoder
from fullrank.funnel.scorer import Observe, ScoredItem, Scorer
from fullrank.models.base import Ranker
from fullrank.models.early_stage import EarlyStageRanker
from fullrank.retrieval.base import Items, Retriever, check_k
from fullrank.retrieval.exact import top_k
from fullrank.retrieval.pairing import Pairing

# Rows of one forward pass of the final stage; more users than fit are served in turn.
PAIRS_AT_ONCE = 16_384


class StageSizes(BaseModel):
    """How many candidates pass each stage.

    Attributes:
        retrieve: items that retrieval hands to the early stage.
        keep: items that the early stage hands to the final stage.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    retrieve: int = Field(default=1000, ge=1)
    keep: int = Field(default=200, ge=1)


class Ranking(NamedTuple):
    """Candidates of each user as rows of the item catalogue, best first, and what each stage thought.

    Attributes:
        items_UK: rows of the catalogue.
        value_UK: by the final stage; -inf where the formula gave no number.
        probabilities_UKT: of binary tasks; predictions of regression tasks.
        retrieved_UC, kept_UC: rows that passed retrieval, in its order, and the early stage, in its order.
    """

    items_UK: Tensor
    value_UK: Tensor
    probabilities_UKT: Tensor
    retrieved_UC: Tensor
    kept_UC: Tensor


@dataclass(frozen=True)
class Recommendation:
    """A ranked list, and how many candidates each stage looked at."""

    items: list[ScoredItem]
    candidates: dict[str, int]


class Funnel:
    """The whole way from a request to a list.

    Args:
        encoders: of training; its schema is the schema of every stage.
        items: catalogue; its active rows are what `retriever` searches.
        users: what is known of users; None serves everyone by what the request says.
        context: one encoded row with what a request that is silent about its context is taken to say.
        value: formula over tasks and `bid`; see `default_formula`.
    """

    def __init__(
        self,
        *,
        encoders: Encoders,
        items: Catalogue,
        users: Catalogue | None,
        context: pl.DataFrame,
        retriever: Retriever,
        early: EarlyStageRanker,
        final: Ranker,
        value: str | None = None,
        sizes: StageSizes | None = None,
    ) -> None:
        self.encoders = encoders
        self.schema = encoders.schema
        self.items = items
        self.users = users
        self.context = context
        self.retriever = retriever
        self.early = early.eval()
        self.scorer = Scorer(encoders, final, value)
        self.final = final
        self.value = self.scorer.value
        self.sizes = sizes or StageSizes()
        self.encode = RequestEncoder(encoders, users, context)
        self.pairing = Pairing.of(self.schema)
        # Ids come from the encoders and from a catalogue that the next line looks up whole.
        self.early.towers.ids.check_ids = False
        with torch.inference_mode():
            self._early_vectors_IV = self._item_vectors(items.rows.batch)
        bid_I = items.bid_I
        self._bid_I = None if bid_I is None else bid_I.float()

    def _item_vectors(self, items: Batch, rows_at_once: int = 8192) -> Tensor:
        pieces = [self.early.item_vectors(items[i : i + rows_at_once]) for i in range(0, len(items), rows_at_once)]
        return torch.cat(pieces)

    def _early_vectors(self, items_UC: Tensor) -> Tensor:
        vectors = self._early_vectors_IV.index_select(0, items_UC.reshape(-1))
        return vectors.view(*items_UC.shape, -1)

    def index_active(self) -> None:
        """Make the active items of the catalogue, and no other, retrievable."""
        active_I = self.items.active_I
        self.retriever.index(Items(self.items.keys_I[active_I], self.items.rows.take(active_I)))

    @torch.inference_mode()
    def rank(self, users: Batch, k: int, observe: Observe | None = None) -> Ranking:
        """The best k items of each row of `users`, whose user and context columns are filled.

        Args:
            observe: told the name of each stage and the seconds it took.

        Raises:
            ValueError: if k is below 1.
        """
        check_k(k)
        sizes = self.sizes
        at_once = max(1, PAIRS_AT_ONCE // max(sizes.keep, 1))
        if len(users) > at_once:
            parts = [self.rank(users[i : i + at_once], k, observe) for i in range(0, len(users), at_once)]
            return Ranking(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        mark = time.perf_counter()

        def lap(stage: str) -> None:
            nonlocal mark
            now = time.perf_counter()
            if observe is not None:
                observe(stage, now - mark)
            mark = now

        # A list longer than the final stage's share needs more candidates in the stages before.
        keep = max(sizes.keep, k)
        found = self.retriever.search(users, max(sizes.retrieve, keep))
        retrieved_UC = self.items.places(found.item_keys_BK)
        lap("retrieval")
        if retrieved_UC.shape[1] > keep:
            early_UCT = self.early.score(users, self._early_vectors(retrieved_UC))
            _, place_UC = top_k(self._values(early_UCT, retrieved_UC), keep)
            kept_UC = retrieved_UC.gather(1, place_UC)
        else:
            kept_UC = retrieved_UC
        lap("early")
        logits_UCT = self._final_logits(users, kept_UC)
        value_UC = self._values(logits_UCT, kept_UC)
        value_UK, place_UK = top_k(value_UC, k)
        probabilities_UCT = self.scorer.predictions(logits_UCT)
        probabilities_UKT = probabilities_UCT.gather(1, place_UK[:, :, None].expand(-1, -1, len(self.scorer.tasks)))
        lap("final")
        return Ranking(kept_UC.gather(1, place_UK), value_UK, probabilities_UKT, retrieved_UC, kept_UC)

    @torch.inference_mode()
    def stage_values(self, users: Batch) -> tuple[Tensor, Tensor]:
        """Value of everything that retrieval finds, by the early and by the final stage, both (U, C)."""
        found = self.retriever.search(users, self.sizes.retrieve)
        retrieved_UC = self.items.places(found.item_keys_BK)
        early_UCT = self.early.score(users, self._early_vectors(retrieved_UC))
        final_UCT = self._final_logits(users, retrieved_UC)
        return self._values(early_UCT, retrieved_UC), self._values(final_UCT, retrieved_UC)

    def recommend(
        self, requests: Sequence[Request], k: int = 10, observe: Observe | None = None
    ) -> list[Recommendation]:
        """The best k items for each request, all there are if k is larger; unknown users are served.

        Raises:
            ValueError: if k is below 1, or a request gives an unknown feature or one of the wrong type.
        """
        check_k(k)
        if not requests:
            return []
        mark = time.perf_counter()
        users = self.encode(requests)
        if observe is not None:
            observe("encode", time.perf_counter() - mark)
        ranking = self.rank(users, k, observe)
        counts = {
            "retrieval": self.retriever.cost(),
            "early": ranking.retrieved_UC.shape[1],
            "final": ranking.kept_UC.shape[1],
        }
        names = self.items.ids
        lists = zip(
            ranking.items_UK.tolist(), ranking.value_UK.tolist(), ranking.probabilities_UKT.tolist(), strict=True
        )
        return [
            Recommendation(
                [
                    ScoredItem(names[row], value, dict(zip(self.scorer.tasks, predictions, strict=True)))
                    for row, value, predictions in zip(*triple, strict=True)
                    if value > -torch.inf
                ],
                counts,
            )
            for triple in lists
        ]

    @torch.inference_mode()
    def score(self, request: Request, item_ids: Sequence[int | str]) -> list[ScoredItem]:
        """The final stage's view of the named items, in the given order.

        An item that is not in the catalogue is scored as one of which nothing but its id is known, at the median bid.

        Raises:
            ValueError: if the request gives an unknown feature or one of the wrong type.
        """
        if not item_ids:
            return []
        users = RowGather(self.encode([request]))
        places = [self.items.row_of.get(str(item_id)) for item_id in item_ids]
        known = [place for place in places if place is not None]
        features = self.items.rows.take(torch.tensor(known, dtype=torch.int64))
        unknown = [item_id for item_id, place in zip(item_ids, places, strict=True) if place is None]
        if unknown:
            features = Batch.cat([features, self._unknown_items(unknown)])
        # The known stand first in `features`, then the unknown, each in the order of the request.
        is_unknown = torch.tensor([place is None for place in places])
        row_C = torch.where(is_unknown, len(known) + is_unknown.cumsum(0) - 1, (~is_unknown).cumsum(0) - 1)
        bid_C = None
        if self._bid_I is not None:
            bid_C = torch.cat([self._bid_I[known], self._bid_I.median().expand(len(unknown))])[row_C]
        pairs = self.pairing(users, torch.zeros_like(row_C), RowGather(features), row_C)
        return self.scorer.scored(item_ids, self.final(pairs).logits_BT, bid_C)

    def _unknown_items(self, item_ids: Sequence[int | str]) -> Batch:
        name = self.schema.keys.item_id
        blank = pl.DataFrame({"__row": range(len(item_ids))})
        for feature in self.schema.categorical:
            if feature.name == name and feature.role == "item":
                raw = pl.DataFrame({name: [str(item_id) for item_id in item_ids]})
                blank = blank.with_columns(self.encoders.transform(raw, allow_missing=True)[name])
        return partial_batch(blank, self.schema)

    def _final_logits(self, users: Batch, items_UC: Tensor) -> Tensor:
        count_U, count_C = items_UC.shape
        rows, user_P, item_P = RowGather(users), torch.arange(count_U).repeat_interleave(count_C), items_UC.reshape(-1)
        pieces: list[Tensor] = []
        for begin in range(0, user_P.numel(), PAIRS_AT_ONCE):
            part = slice(begin, begin + PAIRS_AT_ONCE)
            pieces.append(self.final(self.pairing(rows, user_P[part], self.items.rows, item_P[part])).logits_BT)
        return torch.cat(pieces).view(count_U, count_C, -1)

    def _values(self, logits_UCT: Tensor, items_UC: Tensor) -> Tensor:
        return self.scorer.values(logits_UCT, None if self._bid_I is None else self._bid_I[items_UC])
