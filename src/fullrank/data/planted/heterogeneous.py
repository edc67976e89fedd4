"""Task B: what the history means depends on the context, and what the profile means depends on the history."""

# Shapes: n rows, L events, U users, C categories, P preferred categories.

from __future__ import annotations

from functools import cached_property
from typing import ClassVar, Self

import numpy as np
import polars as pl
from pydantic import Field, model_validator

from fullrank.data.planted.task import Floats, IndependentRows, Ints, event_columns, labelled, sigmoid, unit_variance
from fullrank.schema import Categorical, EventId, Keys, Label, Schema, Sequence

INTENT_EVENTS = 3


class Heterogeneous(IndependentRows):
    """A user's events follow lasting preferences; the last three show what the user wants now, the intent.

    With I the intent (the category of the last three events), m the share of the earlier events that lie in the
    item's category, and S the surface on which the item is shown:

        logit = base + short · [S is even] ([item in I] - ½) + long · [S is odd] (2 min(2m, 1) - 1)
                + profile · parity(I) · E[group, brand]

    * From features to history: the surface decides which part of the history is to be read.
    * From history to features: the parity of the intent, ±1, flips the sign of an effect of group and brand, which
      vanishes on average. Neither alone says anything of the other.

    A user's rows are sessions of one user with an intent each. The user's id is a key, for GAUC and the split (users
    of one part are in no other), and no feature: what is learnt has to hold for users never seen.

    Attributes:
        sessions: rows of a user.
        short, long, profile: strengths of the three effects.
    """

    name: ClassVar[str] = "heterogeneous"

    sessions: int = Field(default=10, ge=1)
    items: int = Field(default=600, ge=1)
    categories: int = Field(default=12, ge=4)
    brands: int = Field(default=20, ge=2)
    groups: int = Field(default=8, ge=2)
    surfaces: int = Field(default=6, ge=2)
    events: int = Field(default=16, ge=INTENT_EVENTS + 1)
    preferred: int = Field(default=3, ge=1)
    base: float = -0.6
    short: float = Field(default=3.0, ge=0)
    long: float = Field(default=1.5, ge=0)
    profile: float = Field(default=1.2, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.categories % 2 or self.surfaces % 2:
            raise ValueError(f"categories and surfaces must be even, got {self.categories} and {self.surfaces}")
        if self.items < self.categories:
            raise ValueError(f"every category needs an item, got {self.items} items for {self.categories} categories")
        if self.preferred > self.categories:
            raise ValueError(f"preferred is {self.preferred} of {self.categories} categories")
        return self

    def log_schema(self) -> Schema:
        sizes = {"item_id": self.items, "category": self.categories}
        return Schema(
            features=(
                Categorical(name="group", role="user", encoding="identity", num_embeddings=self.groups),
                Categorical(name="item_id", role="item", encoding="identity", num_embeddings=self.items),
                Categorical(name="category", role="item", encoding="identity", num_embeddings=self.categories),
                Categorical(name="brand", role="item", encoding="identity", num_embeddings=self.brands),
                Categorical(name="surface", encoding="identity", num_embeddings=self.surfaces),
                Sequence(
                    name="history",
                    max_length=self.events,
                    fields=tuple(
                        EventId(name=name, table=table, encoding="identity", num_embeddings=sizes[table])
                        for name, table in (("item", "item_id"), ("category", "category"))
                    ),
                ),
            ),
            labels=(Label(name="click"),),
            keys=Keys(user_id="user_id", item_id="item_id"),
        )

    @cached_property
    def brand_I(self) -> Ints:
        return self.latents().integers(0, self.brands, self.items)

    @cached_property
    def profile_effect(self) -> Floats:
        """E, shape (groups, brands): mean 0 in every row and column, variance 1."""
        effect = self.latents(1).standard_normal((self.groups, self.brands))
        return unit_variance(effect - effect.mean(0) - effect.mean(1, keepdims=True) + effect.mean())

    def category_of(self, items: Ints) -> Ints:
        return items % self.categories

    def logit(self, group: Ints, item: Ints, surface: Ints, events_nL: Ints, lengths: Ints) -> Floats:
        """True log-odds.

        Args:
            group, item, surface: shape (n,).
            events_nL: items of the history, oldest first, padded at the end.
            lengths: events of each row, at least 4.
        """
        category = self.category_of(item)
        place = np.arange(events_nL.shape[1])
        same_nL = self.category_of(events_nL) == category[:, None]
        early = lengths - INTENT_EVENTS
        share = (same_nL & (place < early[:, None])).sum(1) / early
        intent = self.category_of(events_nL[np.arange(len(item)), lengths - 1])
        parity = 1 - 2 * (intent % 2)
        even = surface % 2 == 0
        logit: Floats = (
            self.base
            + self.short * even * ((category == intent) - 0.5)
            + self.long * ~even * (2 * np.minimum(2 * share, 1) - 1)
            + self.profile * parity * self.profile_effect[group, self.brand_I[item]]
        )
        return logit

    def block(self, rng: np.random.Generator, rows: int, first: int) -> pl.DataFrame:
        users = -(-rows // self.sessions)
        user = np.arange(rows) // self.sessions
        group_U = rng.integers(0, self.groups, users)
        preferred_UP = rng.permuted(np.tile(np.arange(self.categories), (users, 1)), axis=1)[:, : self.preferred]
        lengths = rng.integers(INTENT_EVENTS + 1 + (self.events - INTENT_EVENTS - 1) // 2, self.events + 1, rows)
        intent = rng.integers(0, self.categories, rows)

        def liked(shape: tuple[int, ...]) -> Ints:
            """Categories that the users of these rows prefer."""
            chosen = rng.integers(0, self.preferred, shape)
            return np.take_along_axis(preferred_UP[user], chosen.reshape(rows, -1), 1).reshape(shape)

        shape = (rows, self.events)
        categories_nL = np.where(rng.random(shape) < 0.8, liked(shape), rng.integers(0, self.categories, shape))
        place = np.arange(self.events)
        recent_nL = place >= lengths[:, None] - INTENT_EVENTS
        events_nL = self._items(rng, np.where(recent_nL, intent[:, None], categories_nL))
        # Candidates: a third of what the user wants now, a third of what the user likes, a third of anything.
        source = rng.integers(0, 3, rows)
        category = np.choose(source, [intent, liked((rows,)), rng.integers(0, self.categories, rows)])
        item = self._items(rng, category)
        group, surface = group_U[user], rng.integers(0, self.surfaces, rows)
        columns = {
            "user_id": first + user,
            "group": group,
            "item_id": item,
            "category": category,
            "brand": self.brand_I[item],
            "surface": surface,
        }
        frame = labelled(rng, columns, click=sigmoid(self.logit(group, item, surface, events_nL, lengths)))
        history = {"item": events_nL, "category": self.category_of(events_nL)}
        return frame.with_columns(event_columns("history", history, lengths))

    def _items(self, rng: np.random.Generator, categories: Ints) -> Ints:
        """A random item of each category."""
        available = (self.items - 1 - categories) // self.categories + 1
        return categories + self.categories * (rng.random(categories.shape) * available).astype(np.int64)
