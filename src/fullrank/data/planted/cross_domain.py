"""Task F: a user's interest drifts, and some columns, from another surface, show it: a teacher may have them."""

# Shapes: n rows, U users, I ads, K latent dimensions, L events.

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import polars as pl
from pydantic import Field

from fullrank.data.planted.task import Columns, Floats, Ints, PlantedTask, event_columns, labelled, sigmoid
from fullrank.data.simulate import DAY, START
from fullrank.schema import Categorical, EventId, Keys, Label, Numeric, Schema, Sequence

HISTORY = 20
TEST = 0.2


class CrossDomain(PlantedTask):
    """logit P(click) = base + strength ⟨u_i(t), v_j⟩ / √K, where each number of u_i returns to 0 with a half-life.

    The columns `elsewhere_0`, ... are u_i(t) and noise: what the user did on another surface, just then. The history
    has the user's last impressions, clicked or not. Who has the columns knows u but for the noise; who has the history
    alone has to infer it from some clicks.

    Rows are in order of time; the last fifth is the test part.

    Attributes:
        half_life_days: of an interest.
        noise: standard deviation of what the columns from elsewhere add; an interest's is 1.
    """

    name: ClassVar[str] = "cross-domain"

    rows: int = Field(default=36_000, ge=100)
    users: int = Field(default=400, ge=2)
    ads: int = Field(default=100, ge=2)
    days: int = Field(default=30, ge=1)
    latent_dim: int = Field(default=4, ge=1)
    half_life_days: float = Field(default=10.0, gt=0)
    noise: float = Field(default=1.0, ge=0)
    base: float = -1.0
    strength: float = Field(default=2.0, ge=0)

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """Columns of the other surface."""
        return tuple(f"elsewhere_{k}" for k in range(self.latent_dim))

    def log_schema(self) -> Schema:
        return Schema(
            features=(
                Categorical(name="user_id", role="user", encoding="identity", num_embeddings=self.users),
                Categorical(name="item_id", role="item", encoding="identity", num_embeddings=self.ads),
                *(Numeric(name=name, role="user", transform="standard") for name in self.elsewhere),
                Sequence(
                    name="history",
                    max_length=HISTORY,
                    fields=(
                        EventId(name="item", table="item_id", encoding="identity", num_embeddings=self.ads),
                        EventId(name="clicked", table="clicked", encoding="identity", num_embeddings=2),
                    ),
                ),
            ),
            labels=(Label(name="click"),),
            keys=Keys(request_id="request_id", user_id="user_id", item_id="item_id", timestamp="timestamp"),
        )

    def part_rows(self) -> dict[str, int]:
        test = round(self.rows * TEST)
        return {"train": self.rows - test, "test": test}

    def part_frames(self, part: str) -> Iterator[pl.DataFrame]:
        train = self.part_rows()["train"]
        yield self._log()[:train] if part == "train" else self._log()[train:]

    def _log(self) -> pl.DataFrame:
        rng = np.random.default_rng((self.seed, 2))
        content_IK = self.latents().standard_normal((self.ads, self.latent_dim))
        time = START + np.arange(self.rows) * (self.days * DAY) // self.rows
        user, ad = rng.integers(0, self.users, self.rows), rng.integers(0, self.ads, self.rows)
        # By user, in order of time: place of each row among its user's.
        order = np.argsort(user, kind="stable")
        begin = np.searchsorted(user[order], user[order])
        nth = np.empty(self.rows, np.int64)
        nth[order] = np.arange(self.rows) - begin
        interest_nK = self._interest(rng, user, time, nth)
        p = sigmoid(self.base + self.strength * (interest_nK * content_IK[ad]).sum(1) / self.latent_dim**0.5)
        shown_nK = interest_nK + self.noise * rng.standard_normal(interest_nK.shape)
        columns: Columns = {"request_id": np.arange(self.rows), "user_id": user, "item_id": ad, "timestamp": time}
        columns |= dict(zip(self.elsewhere, shown_nK.T, strict=True))
        frame = labelled(rng, columns, click=p)
        click = frame["click"].to_numpy()
        lengths = np.minimum(nth, HISTORY)
        place = np.empty(self.rows, np.int64)
        place[order] = np.arange(self.rows)
        before_nL = np.maximum(place[:, None] - lengths[:, None] + np.arange(HISTORY), 0)
        past_nL = order[np.minimum(before_nL, self.rows - 1)]
        history = {"item": ad[past_nL], "clicked": click[past_nL].astype(np.int64)}
        return frame.with_columns(event_columns("history", history, lengths))

    def _interest(self, rng: np.random.Generator, user: Ints, time: Ints, nth: Ints) -> Floats:
        """u_i(t) of each row: an Ornstein-Uhlenbeck process, seen when the user is."""
        current_UK = rng.standard_normal((self.users, self.latent_dim))
        seen_U = np.full(self.users, START)
        interest_nK = np.empty((len(user), self.latent_dim))
        for number in range(int(nth.max()) + 1):
            rows = np.flatnonzero(nth == number)
            who = user[rows]
            kept = np.exp2(-(time[rows] - seen_U[who]) / (DAY * self.half_life_days))[:, None]
            moved = rng.standard_normal((len(rows), self.latent_dim))
            current_UK[who] = kept * current_UK[who] + np.sqrt(1 - kept**2) * moved
            seen_U[who] = time[rows]
            interest_nK[rows] = current_UK[who]
        return interest_nK
