"""Tables for ids that come and go: a row for those seen often enough, taken from those no longer seen."""

# Shapes: R rows, N ids looked up, U distinct ids among them, M of these that have no row, H hash functions of the
# sketch, C its counters.

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from fullrank.embeddings.id_map import NO_ROW, IdMap, mixed
from fullrank.embeddings.table import Ask, Fresh, Part, Table, TableConfig
from fullrank.schema import FIRST_VOCABULARY_ID, OUT_OF_VOCABULARY_ID

NO_ID = -1
# Counters of the sketch for each id that can be admitted, and how many of them an id has.
_COUNTERS, _HASHES = 2, 4
# Lookups for each counter after which the sketch is halved.
_FILLED = 8
_MOST = 255


class AdmittedTable(Table):
    """e(i) = W[row(i)] for the ids that have a row, and the vector of the out-of-vocabulary id for all others.

    Ids are counted as training looks them up. One that has been seen `admit_after` times gets a row, which starts as
    that of the out-of-vocabulary id, so that the model says of it what it said before. When all rows are taken, another
    id has to go: with `evict: lfu` the one that was seen least often, if the new one was seen more often; with
    `evict: ttl` the one that was seen longest ago, if that is more than `ttl` steps ago; with `none` nobody, and the
    new id stays out of vocabulary. A row that is given away loses its values and its optimiser state. No two ids ever
    share a row.

    Out of training nothing is counted and nothing moves: an id has the row that training gave it, or none, so that a
    full table says the same in training and in serving.

    Counts of ids that have no row are those of a count-min sketch with conservative update, so an id may get a row
    earlier than it should, hardly ever later: when the sketch has counted 8 lookups for each counter of a hash function
    it is halved, or else it would be full in the end. All counts, those of the rows too, are halved every `half_life`
    steps, with which ids that were frequent long ago go.

    Attributes:
        ids_R: int64, the id of each row, `NO_ID` of free ones. The first two rows are those of the missing and of the
            out-of-vocabulary id.
        counts_R: int32, how often it was seen; 0 of free ones.
        seen_R: int32, the step when it was last seen.
        sketch_HC: uint8, counts of the ids that have no row.
        totals: int64: steps so far, ids that have a row, ids that ever got one, ids that lost it, and lookups that the
            sketch has counted since it was last halved.
    """

    class Config(TableConfig):
        """Attributes:
        capacity: ids that can have a row at a time.
        admit_after: times that training has to look an id up before it gets one.
        evict: whom a new id displaces when the table is full: `lfu`, `ttl` or `none`.
        half_life: steps after which all counts are halved; None for never.
        ttl: steps without being seen after which an id may be displaced.
        dropout: share of the lookups of training that are answered as out of vocabulary, whose row learns from them
            what a new id is like.
        """

        kind: Literal["admitted"] = "admitted"
        capacity: int = Field(ge=1, le=1 << 30)
        admit_after: int = Field(default=2, ge=1, le=_MOST)
        evict: Literal["lfu", "ttl", "none"] = "lfu"
        half_life: int | None = Field(default=None, ge=1)
        ttl: int | None = Field(default=None, ge=1)
        dropout: float = Field(default=0.01, ge=0, lt=1)

        @model_validator(mode="after")
        def _ttl_is_used(self) -> Self:
            if (self.ttl is not None) != (self.evict == "ttl"):
                raise ValueError(f'evict "{self.evict}" and ttl {self.ttl}: expected a ttl with "ttl", none without')
            return self

    grows = learns_ids = True
    config: Config
    ids_R: Tensor
    counts_R: Tensor
    seen_R: Tensor
    sketch_HC: Tensor
    totals: Tensor

    def __init__(self, rows: int, width: int, init_std: float, config: Config) -> None:
        super().__init__(rows, width, init_std, config)
        stored = config.capacity + FIRST_VOCABULARY_ID
        self.parts = (Part("rows", stored, width, init_std),)
        self._counters = 1 << (_COUNTERS * config.capacity - 1).bit_length()
        self.register_buffer("ids_R", torch.full((stored,), NO_ID, dtype=torch.int64))
        self.register_buffer("counts_R", torch.zeros(stored, dtype=torch.int32))
        self.register_buffer("seen_R", torch.zeros(stored, dtype=torch.int32))
        self.register_buffer("sketch_HC", torch.zeros(_HASHES, self._counters, dtype=torch.uint8))
        self.register_buffer("totals", torch.zeros(5, dtype=torch.int64))
        self._map: IdMap | None = None  # follows from ids_R
        self._evicted: list[tuple[int, Tensor]] = []
        self.register_load_state_dict_post_hook(lambda table, _: table.check())  # type: ignore[no-untyped-call]

    def check(self) -> None:
        """Raises:
        ValueError: if two rows have the same id, or a row has one that is none.
        """
        self._map = None
        ids = self.live_ids()
        first_free = FIRST_VOCABULARY_ID + int(self.totals[1])
        taken_R = self.ids_R != NO_ID
        if bool(taken_R[:FIRST_VOCABULARY_ID].any()) or int(taken_R.sum()) != int(self.totals[1]):
            raise ValueError(f"the rows of admitted ids are damaged: {int(taken_R.sum())} of {int(self.totals[1])} ids")
        if not bool(taken_R[FIRST_VOCABULARY_ID:first_free].all()):
            raise ValueError("the rows of admitted ids are damaged: there are free ones among them")
        if ids.numel() and (int(ids.min()) < FIRST_VOCABULARY_ID or int(ids.max()) >= self.rows):
            raise ValueError(f"admitted ids are {int(ids.min())} to {int(ids.max())}, expected 2 to {self.rows - 1}")
        if len(torch.unique(ids)) < ids.numel():
            raise ValueError("two rows of admitted ids have the same id")

    def live_ids(self) -> Tensor:
        """The ids that have a row, in the order of the rows."""
        return self.ids_R[self.ids_R != NO_ID]

    def take_evicted(self) -> list[tuple[int, Tensor]]:
        """The steps and ids of those who lost their rows since this was last called."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def _rows(self, ids_N: Tensor) -> Tensor:
        if self._map is None or self._map.ids_R is not self.ids_R:  # moved, as by `to`
            self._map = IdMap(self.ids_R, (self.ids_R != NO_ID).nonzero().squeeze(1))
        rows_N = self._map.rows(ids_N)
        return torch.where(ids_N < FIRST_VOCABULARY_ID, ids_N, rows_N)

    def asks(self, ids_N: Tensor) -> list[Ask]:
        rows_N = self._rows(ids_N)
        return [Ask(0, rows_N.masked_fill_(rows_N == NO_ROW, OUT_OF_VOCABULARY_ID))]

    def combine(self, ids_N: Tensor, asks: Sequence[Ask], vectors: Sequence[Tensor]) -> Tensor:
        return vectors[0]

    @torch.no_grad()
    def learn(self, ids_N: Tensor) -> tuple[Tensor, list[Fresh]]:
        """Count the ids of a step and admit whose turn has come; which rows these get, and, by id drop-out, which ids
        the step looks up instead."""
        self.totals[0] += 1
        if self.config.half_life is not None and int(self.totals[0]) % self.config.half_life == 0:
            self.counts_R >>= 1
            self._age_sketch()
        ids_U, count_U = torch.unique(ids_N[ids_N >= FIRST_VOCABULARY_ID], return_counts=True)
        rows_U = self._rows(ids_U)
        known_U = rows_U != NO_ROW
        seen = rows_U[known_U]
        self.counts_R[seen] += count_U[known_U].int()
        self.seen_R[seen] = self.totals[0].int()
        total_M = self._counted(ids_U[~known_U], count_U[~known_U])
        ripe_M = total_M >= self.config.admit_after
        fresh = self._admit(ids_U[~known_U][ripe_M], total_M[ripe_M])
        if self.config.dropout:
            dropped_N = torch.rand(ids_N.numel(), device=ids_N.device) < self.config.dropout
            ids_N = ids_N.masked_fill(dropped_N & (ids_N >= FIRST_VOCABULARY_ID), OUT_OF_VOCABULARY_ID)
        return ids_N, [] if fresh is None else [Fresh(0, fresh, OUT_OF_VOCABULARY_ID)]

    def _counted(self, ids_M: Tensor, count_M: Tensor) -> Tensor:
        """Add to the counts of distinct ids that have no row; what they are then."""
        salts_H = torch.arange(1, _HASHES + 1, device=ids_M.device)[:, None] << 40
        place_HM = mixed(ids_M + salts_H) & (self._counters - 1)
        total_M = self.sketch_HC.gather(1, place_HM).amin(0).long() + count_M
        total_M.clamp_max_(_MOST)
        # No counter of an id is raised above what its lowest one says of it.
        self.sketch_HC.scatter_reduce_(1, place_HM, total_M.to(torch.uint8).expand_as(place_HM), "amax")
        self.totals[4] += int(count_M.sum())
        if int(self.totals[4]) >= _FILLED * self._counters:
            self._age_sketch()
        return total_M

    def _age_sketch(self) -> None:
        self.sketch_HC >>= 1
        self.totals[4] = 0

    def _admit(self, ids_M: Tensor, total_M: Tensor) -> Tensor | None:
        """Give rows to ids, the most frequent first; those rows."""
        order_M = torch.sort(total_M, descending=True, stable=True).indices
        ids_M, total_M = ids_M[order_M], total_M[order_M]
        free = range(FIRST_VOCABULARY_ID + int(self.totals[1]), len(self.ids_R))[: ids_M.numel()]
        rows = torch.arange(free.start, free.stop, device=ids_M.device)
        if rows.numel() < ids_M.numel():
            rows = torch.cat([rows, self._evict(total_M[rows.numel() :])])
        ids, total = ids_M[: rows.numel()], total_M[: rows.numel()]
        if not rows.numel():
            return None
        assert self._map is not None
        self.ids_R[rows], self.counts_R[rows] = ids, total.int()
        self._map.add(rows)
        self.seen_R[rows] = self.totals[0].int()
        self.totals[1] += len(free)
        self.totals[2] += rows.numel()
        return rows

    def _evict(self, total_M: Tensor) -> Tensor:
        """Take rows from ids for at most M others that were seen so often, which fall; those rows."""
        step, first = int(self.totals[0]), FIRST_VOCABULARY_ID
        idle_R = (self.ids_R[first:] != NO_ID) & (self.seen_R[first:] < step)
        match self.config.evict:
            case "none":
                return total_M.new_zeros(0)
            case "lfu":
                score_R, below = self.counts_R[first:], int(total_M[0])
            case "ttl":
                assert self.config.ttl is not None
                score_R, below = self.seen_R[first:], step - self.config.ttl
        rows = (idle_R & (score_R < below)).nonzero().squeeze(1)
        if rows.numel() > total_M.numel():
            bar = int(np.partition(score_R[rows].cpu().numpy(), total_M.numel() - 1)[total_M.numel() - 1])
            rows = rows[score_R[rows] <= bar]
        rows = rows[torch.sort(score_R[rows], stable=True).indices][: total_M.numel()]
        if self.config.evict == "lfu":
            # The most frequent newcomer displaces the least frequent id, until one was not seen more often.
            rows = rows[score_R[rows] < total_M[: rows.numel()]]
        rows = rows + first
        gone = self.ids_R[rows]
        if gone.numel():
            assert self._map is not None
            self._map.remove(rows)
            self._evicted.append((step, gone.cpu()))
            self.totals[3] += gone.numel()
        return rows
