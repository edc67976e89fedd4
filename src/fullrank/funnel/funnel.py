"""Retrieval, early stages, final stage and value, put together."""

# Shapes: U users, I items, C candidates of a user, P (user, candidate) pairs, V width of a vector, T tasks, K results.

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Self

import polars as pl
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fullrank.batch import Batch, RowGather
from fullrank.data.encoders import Encoders
from fullrank.data.loader import partial_batch
from fullrank.funnel.attributes import Attributes
from fullrank.funnel.candidates import Candidates
from fullrank.funnel.catalogue import NO_ROW, Catalogue
from fullrank.funnel.counters import Counters
from fullrank.funnel.deadline import (
    AT_ONCE,
    Clock,
    Deadline,
    behind,
    check_deadlines,
    check_milliseconds,
    score_in_time,
)
from fullrank.funnel.item_vectors import ItemVectors
from fullrank.funnel.ranking import RankedItem, Ranking, Recommendation, Terms, below, is_whole
from fullrank.funnel.requests import Request, RequestEncoder
from fullrank.funnel.rules import EMPTY
from fullrank.funnel.scorer import Observe, ScoredItem, Scorer, trust_ids
from fullrank.funnel.slate import SlateConfig
from fullrank.funnel.slate_making import SlateMaker
from fullrank.funnel.stages import FINAL, RETRIEVAL, StageSizes, TwoSided, check_names
from fullrank.funnel.totals import CounterState
from fullrank.models.base import Ranker
from fullrank.retrieval.base import Items, Retriever, SearchResult, check_k
from fullrank.retrieval.exact import top_k
from fullrank.retrieval.pairing import Pairing

# Rows of one forward pass of a ranker; more users than fit are served in turn.
PAIRS_AT_ONCE = 16_384


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
        slate: how a list is made of the final stage's values; default the largest first.
        deadlines: milliseconds by stage that it may take for the users of one pass; one that cannot finish hands on
            what it was handed, in that order, behind what it has scored.
        item_vectors: by early stage that looks at items beforehand, what it saw; default: it looks now.
        until: time of the log's last row, in seconds since 1970, if it is known: later events are not in it.
        counters: sums at the log's end, from which counters go on with events; default: they stay as they are.

    Attributes:
        clock: what deadlines and times are read from.
        prepared: early stages that look at items beforehand, each with its vectors of the catalogue.

    Raises:
        ValueError: if the names of early stages, or their number and that of `sizes`, do not fit, a deadline is of no
            stage, a bid of the catalogue is negative or infinite, or `slate` does not fit the schema or the formula.
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
        slate: SlateConfig | None = None,
        deadlines: Mapping[str, float] | None = None,
        item_vectors: Mapping[str, Tensor] | None = None,
        until: int | None = None,
        counters: CounterState | None = None,
    ) -> None:
        self.encoders = encoders
        self.schema = encoders.schema
        self.items = items
        self.users = users
        self.context = context
        self._candidates = Candidates(encoders, items, retriever)
        stages = {"early": early} if isinstance(early, Ranker) else early
        self._take_rankers(stages, final, value, item_vectors or {})
        self.value = self.scorer.value
        self.sizes = sizes or StageSizes()
        self.until = until
        going_on = None if counters is None else Counters(encoders, counters, users, items)
        self.encode = RequestEncoder(encoders, users, context, items, until, going_on)
        self.pairing = Pairing.of(self.schema)
        check_names(self.early)
        self.sizes.keeps(len(self.early))
        self.deadlines = check_deadlines(deadlines or {}, [RETRIEVAL, *self.early, FINAL])
        self.clock: Clock = time.perf_counter
        bid_I = items.bid_I
        self._bid_I = None if bid_I is None else bid_I.float()
        self.slate = slate or SlateConfig()
        self._make_slate = SlateMaker(self.slate, items, self.scorer)
        self._draws = torch.Generator()
        self._draws.seed()

    def _take_rankers(
        self,
        early: Mapping[str, Ranker],
        final: Ranker,
        value: str | None,
        item_vectors: Mapping[str, Tensor],
    ) -> None:
        """Take over rankers, and all that follows from them alone."""
        self.early, self.final = dict(early), final
        self.scorer = Scorer(self.encoders, final, value)
        self.prepared: dict[str, tuple[TwoSided, ItemVectors]] = {}
        for name, ranker in self.early.items():
            trust_ids(ranker.eval())
            if isinstance(ranker, TwoSided):
                known_IV = item_vectors.get(name)
                if known_IV is None:
                    known_IV = _item_vectors(ranker, self.items.rows.batch)
                self.prepared[name] = ranker, ItemVectors(known_IV)

    def with_parts(self, **parts: Any) -> Self:
        """A funnel of the same parts but these, made anew.

        Args:
            parts: arguments of the constructor.

        Raises:
            ValueError: as the constructor.
        """
        own = {
            "encoders": self.encoders,
            "items": self.items,
            "users": self.users,
            "context": self.context,
            "retriever": self.retriever,
            "early": self.early,
            "final": self.final,
            "value": self.value.text,
            "sizes": self.sizes,
            "slate": self.slate,
            "deadlines": self.deadlines,
            "until": self.until,
            "counters": None if self.counters is None else self.counters.state,
        }
        return type(self)(**{**own, **parts})

    @property
    def retriever(self) -> Retriever:
        """Of the first stage."""
        return self._candidates.retriever

    @property
    def counters(self) -> Counters | None:
        """Those that go on with events."""
        return self.encode.counters

    @property
    def rankers(self) -> dict[str, Ranker]:
        """Of all stages after retrieval, in order."""
        return {**self.early, FINAL: self.final}

    def with_rankers(self, rankers: Mapping[str, Ranker]) -> Self:
        """A funnel of the same catalogue, index and settings with other rankers of the same stages."""
        other = copy.copy(self)
        other._take_rankers({name: rankers[name] for name in self.early}, rankers[FINAL], self.value.text, {})
        other._make_slate = SlateMaker(self.slate, self.items, other.scorer)
        return other

    def with_slate(self, slate: SlateConfig) -> Self:
        """A funnel of the same stages that makes its lists in another way.

        Raises:
            ValueError: if `slate` does not fit the schema or the formula.
        """
        other = copy.copy(self)
        other.slate, other._make_slate = slate, SlateMaker(slate, self.items, self.scorer)
        return other

    def without_deadlines(self) -> Self:
        """The same funnel with all the time that it needs: what is evaluated is not how fast the machine is."""
        other = copy.copy(self)
        other.deadlines = {}
        return other

    @torch.inference_mode()
    def with_items(self, items: Catalogue, was_I: Tensor, retriever: Retriever) -> Self:
        """A funnel of the same models over another catalogue.

        Args:
            was_I: for each of its rows the one of this funnel's catalogue that it equals, `NO_ROW` for another.
            retriever: of the same kind, with the active items of the catalogue.
        """
        other = copy.copy(self)
        other.__dict__.pop("attributes", None)
        other.items, other.encode = items, self.encode.with_items(items)
        other._candidates = Candidates(self.encoders, items, retriever)
        other._bid_I = None if items.bid_I is None else items.bid_I.float()
        other._make_slate = SlateMaker(self.slate, items, self.scorer)
        other.prepared = {}
        for stage, (ranker, vectors) in self.prepared.items():
            seen = partial(_seen, ranker, items)
            other.prepared[stage] = ranker, vectors.changed(was_I, seen)
        return other

    def index_active(self) -> None:
        """Make the active items of the catalogue, and no other, retrievable."""
        active_I = self.items.active_I
        self.retriever.index(Items(self.items.keys_I[active_I], self.items.rows.take(active_I)))

    def rank(
        self,
        users: Batch,
        k: int,
        observe: Observe | None = None,
        *,
        terms: Terms | None = None,
        generator: torch.Generator | None = None,
        deadline_ms: float | None = None,
    ) -> Ranking:
        """The best k items of each row of `users`, whose user and context columns are filled.

        Args:
            observe: told the name of each stage and the seconds it took.
            terms: which items may be recommended to whom; default all.
            generator: of the draws of a policy that explores; without one the list is greedy.
            deadline_ms: milliseconds after which no more work is begun; the answer is then what the stages have come
                to, and says so. A stage that raises, or gives a user only NaN, is treated alike. Retrieval is one
                piece: before it the most shown items stand in for what it would find, after it what it found late is
                used.

        Raises:
            ValueError: if k is below 1, or the deadline is no time.
        """
        check_k(k)
        if deadline_ms is not None:
            check_milliseconds("deadline_ms", deadline_ms)
        return self._rank(
            users, k, observe, Deadline(self.clock, self.deadlines, deadline_ms), terms or Terms(), generator
        )

    @torch.inference_mode()
    def _rank(
        self,
        users: Batch,
        k: int,
        observe: Observe | None,
        deadline: Deadline,
        terms: Terms,
        generator: torch.Generator | None,
    ) -> Ranking:
        sizes = self.sizes
        keeps = sizes.keeps(len(self.early))
        at_once = max(1, PAIRS_AT_ONCE // sizes.finalists(len(self.early)))
        if len(users) > at_once:
            parts = [slice(i, i + at_once) for i in range(0, len(users), at_once)]
            return below([self._rank(users[p], k, observe, deadline, terms.of(p), generator) for p in parts])
        mark = self.clock()

        def lap(stage: str, scored_UC: Tensor | None) -> None:
            nonlocal mark
            now = self.clock()
            if observe is not None:
                observe(stage, now - mark)
            mark = now
            if scored_UC is not None and not bool(scored_UC.all()):
                degraded[stage] = ~scored_UC.all(1)

        # A list longer than a stage's share needs more candidates in the stages before.
        keeps = tuple(max(keep, k) for keep in keeps)
        degraded: dict[str, Tensor] = {}
        items_UC, cost_U, found_U1 = self._candidates(users, max(sizes.retrieve, k, *keeps), deadline, terms)
        passed, whole = {RETRIEVAL: items_UC}, is_whole(items_UC)
        lap(RETRIEVAL, found_U1)
        for stage, keep in zip(self.early, keeps, strict=True):
            scored_UC = None
            if items_UC.shape[1] > keep:
                _, value_UC, scored_UC = self._valued(stage, users, items_UC, whole, deadline)
                items_UC = items_UC.gather(1, top_k(value_UC, keep)[1])
            passed[stage] = items_UC
            lap(stage, scored_UC)
        logits_UCT, value_UC, scored_UC = self._valued(FINAL, users, items_UC, whole, deadline)
        all_there = scored_UC is None or bool(scored_UC.all())
        # Where values are not all there, nothing is drawn by them.
        draws = generator if all_there else None
        slate = self._make_slate(value_UC, logits_UCT, items_UC, k, shown=terms.shown, generator=draws)
        empty_UK, place_UK = slate.places_UK == EMPTY, slate.places_UK.clamp_min(0)
        value_UK = value_UC.gather(1, place_UK)
        if scored_UC is not None:
            value_UK = value_UK.masked_fill(~scored_UC.gather(1, place_UK), torch.nan)
        probabilities_UCT = self.scorer.predictions(logits_UCT)
        probabilities_UKT = probabilities_UCT.gather(1, place_UK[:, :, None].expand(-1, -1, len(self.scorer.tasks)))
        lap(FINAL, scored_UC)
        return Ranking(
            items_UC.gather(1, place_UK).masked_fill_(empty_UK, NO_ROW),
            value_UK.masked_fill_(empty_UK, -torch.inf),
            probabilities_UKT.masked_fill_(empty_UK[:, :, None], torch.nan),
            passed,
            cost_U,
            slate.propensity_UK,
            degraded,
            slate.payment_UK,
        )

    @torch.inference_mode()
    def stage_values(self, users: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What retrieval finds, as rows of the catalogue (U, C), and its value by each stage after, likewise."""
        items_UC = self.items.places(self.retriever.search(users, self.sizes.retrieve).item_keys_BK)
        return items_UC, {stage: self.values_of(stage, users, items_UC) for stage in (*self.early, FINAL)}

    @torch.inference_mode()
    def predictions_of(self, stage: str, users: Batch, items_UC: Tensor) -> tuple[Tensor, Tensor]:
        """Values, as of `values_of`, and predictions_UCT of a stage after retrieval, NaN where there is no item."""
        whole = is_whole(items_UC)
        logits_UCT = self._score(stage, users, items_UC, whole)
        return self._values(logits_UCT, items_UC, whole), self.scorer.predictions(logits_UCT)

    @torch.inference_mode()
    def values_of(self, stage: str, users: Batch, items_UC: Tensor) -> Tensor:
        """The value of rows of the catalogue by a stage after retrieval, -inf where there is no item, shape (U, C)."""
        return self.predictions_of(stage, users, items_UC)[0]

    def recommend(
        self,
        requests: Sequence[Request],
        k: int = 10,
        observe: Observe | None = None,
        *,
        generator: torch.Generator | None = None,
        deadline_ms: float | None = None,
    ) -> list[Recommendation]:
        """The best k items for each request, all there are if k is larger; unknown users are served.

        Args:
            observe, deadline_ms: as of `rank`; reading the requests counts.
            generator: of the draws of a policy that explores; default one that begins anew in each process.

        Raises:
            ValueError: if k is below 1, the deadline is no time, or a request gives an unknown feature or one of the
                wrong type.
        """
        check_k(k)
        if deadline_ms is not None:
            check_milliseconds("deadline_ms", deadline_ms)
        if not requests:
            return []
        if len(requests) > 1 and any(request.filter is not None for request in requests):
            return [
                found
                for request in requests
                for found in self.recommend([request], k, observe, generator=generator, deadline_ms=deadline_ms)
            ]
        deadline, mark = Deadline(self.clock, self.deadlines, deadline_ms), self.clock()
        users = self.encode(requests)
        if observe is not None:
            observe("encode", self.clock() - mark)
        ranking = self._rank(users, k, observe, deadline, self.terms(requests), generator or self._draws)
        there_UK = ranking.items_UK != NO_ROW
        names = iter(self.items.ids_of(ranking.items_UK[there_UK]))
        payments = ranking.payment_UK
        lists = zip(
            ranking.items_UK.tolist(),
            ranking.value_UK.tolist(),
            ranking.probabilities_UKT.tolist(),
            ranking.propensity_UK.tolist(),
            [[None] * ranking.items_UK.shape[1]] * len(requests) if payments is None else payments.tolist(),
            strict=True,
        )
        return [
            Recommendation(
                [
                    RankedItem(next(names), None if math.isnan(value) else value, self._named(predictions), *drawn)
                    for row, value, predictions, *drawn in zip(*columns, strict=True)
                    if row != NO_ROW
                ],
                counts,
                tuple(degraded),
            )
            for columns, counts, degraded in zip(lists, ranking.counts(), ranking.degradations(), strict=True)
        ]

    def terms(self, requests: Sequence[Request]) -> Terms:
        """What requests without filters, or a single one, say of the items.

        Raises:
            ValueError: if the filter speaks of an unknown column.
        """
        excluded_UE = None
        if any(request.exclude for request in requests):
            places = (self.items.find(list(request.exclude)) for request in requests)
            rows = [torch.unique(each[each != NO_ROW]) for each in places]
            excluded_UE = pad_sequence(rows, batch_first=True, padding_value=NO_ROW)
        wanted = requests[0].filter
        return Terms(
            [request.shown for request in requests] if any(request.shown for request in requests) else None,
            excluded_UE,
            None if wanted is None else self.attributes.chosen(wanted),
        )

    @cached_property
    def attributes(self) -> Attributes:
        """What filters may speak of."""
        return Attributes(self.items, self.encoders)

    def _named(self, predictions: Sequence[float]) -> dict[str, float]:
        """By task; none at all of an item that the final stage did not come to."""
        if all(math.isnan(number) for number in predictions):
            return {}
        return dict(zip(self.scorer.tasks, predictions, strict=True))

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
        places = self.items.find(item_ids)
        is_unknown = places == NO_ROW
        known = places[~is_unknown]
        features = self.items.rows.take(known)
        unknown = [item_id for item_id, absent in zip(item_ids, is_unknown.tolist(), strict=True) if absent]
        if unknown:
            features = Batch.cat([features, self._unknown_items(unknown)])
        # The known stand first in `features`, then the unknown, each in the order of the request.
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
        batch = partial_batch(blank, self.schema)
        return batch if self.counters is None else self.counters.on_unknown_items(batch, item_ids)

    def searched(self, users: Batch, count: int, terms: Terms) -> SearchResult:
        """What retrieval finds for users, of what may be recommended to them."""
        return self._candidates.searched(users, count, terms)

    def _valued(
        self, stage: str, users: Batch, items_UC: Tensor, whole: bool, deadline: Deadline
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """logits_UCT of a stage, the values by which it orders its candidates, and which of them it came to, None for
        all, both of shape (U, C)."""
        logits_UCT, scored_UC = score_in_time(
            stage,
            lambda columns: self._score(stage, users, items_UC[:, columns], whole),
            (*items_UC.shape, len(self.scorer.tasks)),
            deadline,
            # What looks at items beforehand is done at once: its user's side would be computed again for each part.
            at_once=items_UC.shape[1] if stage in self.prepared else AT_ONCE,
        )
        value_UC = self._values(logits_UCT, items_UC, whole)
        if scored_UC is not None:
            # No candidates are no failure.
            scored_UC = scored_UC if whole else scored_UC | (items_UC == NO_ROW)
            value_UC = behind(value_UC, scored_UC)
        return logits_UCT, value_UC, scored_UC

    def _score(self, stage: str, users: Batch, items_UC: Tensor, whole: bool) -> Tensor:
        """logits_UCT of a stage, anything where there is no item."""
        if stage not in self.prepared:
            ranker = self.final if stage == FINAL else self.early[stage]
            return self._pair_logits(ranker, users, items_UC, whole)
        prepared, vectors = self.prepared[stage]
        rows_UC = items_UC if whole else items_UC.clamp_min(0)
        vectors_PV = vectors.take(rows_UC.reshape(-1))
        return prepared.score(users, vectors_PV.view(*items_UC.shape, vectors_PV.shape[1]))

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


def _seen(ranker: TwoSided, items: Catalogue, rows: Tensor) -> Tensor:
    """What a stage sees of some rows of a catalogue."""
    return _item_vectors(ranker, items.rows.take(rows))


@torch.no_grad()
def _item_vectors(ranker: TwoSided, items: Batch, rows_at_once: int = 8192) -> Tensor:
    pieces = [ranker.item_vectors(items[i : i + rows_at_once]) for i in range(0, len(items), rows_at_once)]
    return torch.cat(pieces)
