"""Task D: how much an event counts depends on how many hours ago it was, not on how many events came after it."""

# Shapes: n rows, L events.

from __future__ import annotations

from typing import ClassVar

import numpy as np
import polars as pl
from pydantic import Field

from fullrank.data.planted.task import Floats, IndependentRows, Ints, event_columns, labelled, sigmoid
from fullrank.data.simulate import DAY, START
from fullrank.schema import Categorical, EventId, EventNumber, Keys, Label, Schema, Sequence

HOUR = 3600


class Timed(IndependentRows):
    """An interest decays with half-life h: logit = base + strength · min(1, Σ_{events of the category} 2^(-age / h)).

    The pace at which a user acts differs by a factor of up to a thousand between rows, so the last event may be a
    minute or a month old, and its place in the history says little of its age. Some events happen in the same second;
    their order means nothing.

    Attributes:
        half_life_hours: h.
    """

    name: ClassVar[str] = "timed"

    categories: int = Field(default=8, ge=2)
    events: int = Field(default=20, ge=1)
    half_life_hours: float = Field(default=24.0, gt=0)
    base: float = -2.0
    strength: float = Field(default=4.0, gt=0)

    def log_schema(self) -> Schema:
        size = self.categories
        return Schema(
            features=(
                Categorical(name="category", role="item", encoding="identity", num_embeddings=size),
                Sequence(
                    name="history",
                    max_length=self.events,
                    fields=(
                        EventId(name="category", table="category", encoding="identity", num_embeddings=size),
                        EventNumber(name="age", transform="log1p"),
                    ),
                ),
            ),
            labels=(Label(name="click"),),
            keys=Keys(timestamp="timestamp"),
        )

    def logit(self, category: Ints, events_nL: Ints, times_nL: Ints, lengths: Ints, now: Ints) -> Floats:
        """True log-odds.

        Args:
            category: of the candidates, shape (n,).
            events_nL: categories of the events, padded at the end.
            times_nL: their times in seconds.
            lengths: events of each row.
            now: times of the requests in seconds, shape (n,).
        """
        age_nL = np.maximum(now[:, None] - times_nL, 0) / HOUR
        counts_nL = (events_nL == category[:, None]) & (np.arange(events_nL.shape[1]) < lengths[:, None])
        interest = (counts_nL * np.exp2(-age_nL / self.half_life_hours)).sum(1)
        logit: Floats = self.base + self.strength * np.minimum(interest, 1)
        return logit

    def block(self, rng: np.random.Generator, rows: int, first: int) -> pl.DataFrame:
        shape = (rows, self.events)
        lengths = rng.integers(0, self.events + 1, rows)
        now = START + (first + np.arange(rows)) * (30 * DAY) // self.rows
        # Seconds between events: from half a minute to half a day on average; a sixth of them 0.
        pace = HOUR * 12 * 1000 ** -rng.random(rows)
        gap_nL = np.ceil(rng.exponential(1, shape) * pace[:, None]) * (rng.random(shape) > 1 / 6)
        gap_nL[np.arange(self.events) >= lengths[:, None]] = 0
        # The last gap is the one to the request.
        age_nL = gap_nL[:, ::-1].cumsum(1)[:, ::-1].astype(np.int64)
        events_nL = rng.integers(0, self.categories, shape)
        category = rng.integers(0, self.categories, rows)
        times_nL = now[:, None] - age_nL
        p = sigmoid(self.logit(category, events_nL, times_nL, lengths, now))
        frame = labelled(rng, {"category": category, "timestamp": now}, click=p)
        history = {"category": events_nL, "age": age_nL.astype(np.float64)}
        return frame.with_columns(event_columns("history", history, lengths))
