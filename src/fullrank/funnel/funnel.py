"""Retrieval, early stages, final stage and value, put together."""

# Shapes: U users, I items, C candidates of a user, P (user, candidate) pairs, V width of a vector, T tasks, K results.

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import polars as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from fullrank.batch import Batch, RowGather
from fullrank.data.encoders import Encoders
from fullrank.data.loader import partial_batch
from fullrank.funnel.catalogue import NO_ROW, Catalogue
from fullrank.funnel.requests import Request, RequestEncoder
from fullrank.funnel.scorer import Observe, ScoredItem, Scorer, trust_ids
from fullrank.funnel.stages import FINAL, RETRIEVAL, StageSizes, TwoSided, check_names
from fullrank.models.base import Ranker
from fullrank.retrieval.base import Items, Retriever, check_k
from fullrank.retrieval.exact import top_k
from fullrank.retrieval.pairing import Pairing

# Rows of one forward pass of a ranker; more users than fit are served in turn.
PAIRS_AT_ONCE = 16_384


class Ranking(NamedTuple):
    """Candidates of each user as rows of the item catalogue, best first, and what each stage thought.

    A user may have fewer than another: behind the last stand `NO_ROW`, a value of -inf and predictions of NaN.

    Attributes:
        items_UK: rows of the catalogue.
        value_UK: by the final stage; -inf where the formula gave no number.
        probabilities_UKT: of binary tasks; predictions of regression tasks.
        passed: by the name of each stage but the final one, the rows that it handed on, in its order, shape (U, C).
        cost_U: items that retrieval scored.
    """

    items_UK: Tensor
    value_UK: Tensor
    probabilities_UKT: Tensor
    passed: dict[str, Tensor]
    cost_U: Tensor

    @property
    def retrieved_UC(self) -> Tensor:
        """What retrieval handed on."""
        return self.passed[RETRIEVAL]

    @property
    def kept_UC(self) -> Tensor:
        """What the final stage was handed."""
        return next(reversed(self.passed.values()))

    def counts(self) -> list[dict[str, int]]:
        """How many candidates each stage looked at, for each user."""
        handed = {RETRIEVAL: self.cost_U.tolist()}
        for stage, rows_UC in zip([*list(self.passed)[1:], FINAL], self.passed.values(), strict=True):
            all_there = _is_whole(rows_UC)
            handed[stage] = [rows_UC.shape[1]] * len(rows_UC) if all_there else (rows_UC != NO_ROW).sum(1).tolist()
        return [dict(zip(handed, numbers, strict=True)) for numbers in zip(*handed.values(), strict=True)]


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
        early: rankers by the names of their stages, in order; each sees what the one before handed on. A single one may
            be given without a name, and is called `early`.
        value: formula over tasks and `bid`; see `default_formula`.

    Raises:
        ValueError: if the names of early stages, or their number and that of `sizes`, do not fit.
    """

    def __init__(
        self,
        *,
        encoders: Encoders,
        items: Catalogue,
        users: Catalogue | None,
        context: pl.DataFrame,
        retriever: Retriever,
        early: Ranker | Mapping[str, Ranker],
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
        self.early = {"early": early} if isinstance(early, Ranker) else dict(early)
        self.scorer = Scorer(encoders, final, value)
        self.final = final
        self.value = self.scorer.value
        self.sizes = sizes or StageSizes()
        self.encode = RequestEncoder(encoders, users, context)
        self.pairing = Pairing.of(self.schema)
        check_names(self.early)
        self.sizes.keeps(len(self.early))
        self._prepared: dict[str, tuple[TwoSided, Tensor]] = {}
        for name, ranker in self.early.items():
            trust_ids(ranker.eval())
            if isinstance(ranker, TwoSided):
                self._prepared[name] = ranker, _item_vectors(ranker, items.rows.batch)
        bid_I = items.bid_I
        self._bid_I = None if bid_I is None else bid_I.float()

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
        keeps = sizes.keeps(len(self.early))
        at_once = max(1, PAIRS_AT_ONCE // sizes.finalists(len(self.early)))
        if len(users) > at_once:
            return _below([self.rank(users[i : i + at_once], k, observe) for i in range(0, len(users), at_once)])
        mark = time.perf_counter()

        def lap(stage: str) -> None:
            nonlocal mark
            now = time.perf_counter()
            if observe is not None:
                observe(stage, now - mark)
            mark = now

        # A list longer than a stage's share needs more candidates in the stages before.
        keeps = tuple(max(keep, k) for keep in keeps)
        found = self.retriever.search(users, max(sizes.retrieve, k, *keeps))
        items_UC = self.items.places(found.item_keys_BK)
        passed, whole = {RETRIEVAL: items_UC}, _is_whole(items_UC)
        lap(RETRIEVAL)
        for stage, keep in zip(self.early, keeps, strict=True):
            if items_UC.shape[1] > keep:
                _, place_UC = top_k(self._early_values(stage, users, items_UC, whole), keep)
                items_UC = items_UC.gather(1, place_UC)
            passed[stage] = items_UC
            lap(stage)
        logits_UCT = self._pair_logits(self.final, users, items_UC, whole)
        value_UK, place_UK = top_k(self._values(logits_UCT, items_UC, whole), k)
        probabilities_UCT = self.scorer.predictions(logits_UCT)
        probabilities_UKT = probabilities_UCT.gather(1, place_UK[:, :, None].expand(-1, -1, len(self.scorer.tasks)))
        lap(FINAL)
        return Ranking(items_UC.gather(1, place_UK), value_UK, probabilities_UKT, passed, found.cost_B)

    @torch.inference_mode()
    def stage_values(self, users: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What retrieval finds, as rows of the catalogue (U, C), and its value by each stage after, likewise."""
        items_UC = self.items.places(self.retriever.search(users, self.sizes.retrieve).item_keys_BK)
        whole = _is_whole(items_UC)
        values = {stage: self._early_values(stage, users, items_UC, whole) for stage in self.early}
        values[FINAL] = self._values(self._pair_logits(self.final, users, items_UC, whole), items_UC, whole)
        return items_UC, values

    @torch.inference_mode()
    def judge(self, users: Batch, items_UC: Tensor) -> tuple[Tensor, Tensor]:
        """What the final stage predicts of given rows of the catalogue, (U, C, T), and their value, (U, C).

        Where a row is `NO_ROW`, predictions are NaN and the value is -inf.
        """
        whole = _is_whole(items_UC)
        logits_UCT = self._pair_logits(self.final, users, items_UC, whole)
        return self.scorer.predictions(logits_UCT), self._values(logits_UCT, items_UC, whole)

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
        names = self.items.ids
        lists = zip(
            ranking.items_UK.tolist(),
            ranking.value_UK.tolist(),
            ranking.probabilities_UKT.tolist(),
            ranking.counts(),
            strict=True,
        )
        return [
            Recommendation(
                [
                    ScoredItem(names[row], value, dict(zip(self.scorer.tasks, predictions, strict=True)))
                    for row, value, predictions in zip(rows, values, numbers, strict=True)
                    if value > -torch.inf
                ],
                counts,
            )
            for rows, values, numbers, counts in lists
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

    def _early_values(self, stage: str, users: Batch, items_UC: Tensor, whole: bool) -> Tensor:
        if stage not in self._prepared:
            return self._values(self._pair_logits(self.early[stage], users, items_UC, whole), items_UC, whole)
        ranker, vectors_IV = self._prepared[stage]
        # A place without an item has one's vector all the same; its value is taken away after.
        rows_UC = items_UC if whole else items_UC.clamp_min(0)
        vectors_PV = vectors_IV.index_select(0, rows_UC.reshape(-1))
        return self._values(ranker.score(users, vectors_PV.view(*items_UC.shape, -1)), items_UC, whole)

    def _pair_logits(self, ranker: Ranker, users: Batch, items_UC: Tensor, whole: bool) -> Tensor:
        """logits_UCT of a ranker on pairs, NaN where there is no item: those places are no pairs."""
        count_U, count_C = items_UC.shape
        rows, user_P, item_P = RowGather(users), torch.arange(count_U).repeat_interleave(count_C), items_UC.reshape(-1)
        there_P = None if whole else item_P != NO_ROW
        if there_P is not None:
            user_P, item_P = user_P[there_P], item_P[there_P]
        pieces: list[Tensor] = []
        for begin in range(0, user_P.numel(), PAIRS_AT_ONCE):
            part = slice(begin, begin + PAIRS_AT_ONCE)
            pieces.append(ranker(self.pairing(rows, user_P[part], self.items.rows, item_P[part])).logits_BT)
        logits_PT = torch.cat(pieces) if pieces else torch.zeros(0, len(self.scorer.tasks))
        if there_P is not None:
            all_PT = logits_PT.new_full((there_P.numel(), logits_PT.shape[1]), torch.nan)
            all_PT[there_P] = logits_PT
            logits_PT = all_PT
        return logits_PT.view(count_U, count_C, logits_PT.shape[1])

    def _values(self, logits_UCT: Tensor, items_UC: Tensor, whole: bool) -> Tensor:
        value_UC = self.scorer.values(logits_UCT, None if self._bid_I is None else self._bid_I[items_UC])
        return value_UC if whole else value_UC.masked_fill(items_UC == NO_ROW, -torch.inf)


def _is_whole(items_UC: Tensor) -> bool:
    """Whether there is an item in every place, as with an exact index: nothing has to be left out then."""
    return not items_UC.numel() or int(items_UC.min()) != NO_ROW


@torch.inference_mode()
def _item_vectors(ranker: TwoSided, items: Batch, rows_at_once: int = 8192) -> Tensor:
    pieces = [ranker.item_vectors(items[i : i + rows_at_once]) for i in range(0, len(items), rows_at_once)]
    return torch.cat(pieces)


def _below(parts: Sequence[Ranking]) -> Ranking:
    """Rankings of some users, then of others."""

    def joined(tensors: Sequence[Tensor], filler: float) -> Tensor:
        width = max(tensor.shape[1] for tensor in tensors)
        return torch.cat([F.pad(t, (*(0, 0) * (t.ndim - 2), 0, width - t.shape[1]), value=filler) for t in tensors])

    return Ranking(
        joined([part.items_UK for part in parts], NO_ROW),
        joined([part.value_UK for part in parts], -torch.inf),
        joined([part.probabilities_UKT for part in parts], torch.nan),
        {stage: joined([part.passed[stage] for part in parts], NO_ROW) for stage in parts[0].passed},
        torch.cat([part.cost_U for part in parts]),
    )
