"""Task E: what an early stage has to keep is decided by a value that no single label tells."""

# Shapes: n rows, U users (one request each), I ads, K latent dimensions.

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import ClassVar

import numpy as np
import polars as pl
from pydantic import Field

from fullrank.data.planted.task import BLOCK_ROWS, Floats, Ints, PlantedTask, labelled, sigmoid
from fullrank.data.splits import PARTS
from fullrank.schema import Categorical, Keys, Label, Schema

IMPRESSIONS = 30
HIDE_COST = 3.0


class Cascade(PlantedTask):
    """Users × ads with value = bid · P(click) - 3 P(hide); baiting ads are clicked more and hidden more.

        logit click = -1.5 + 1.2 ⟨u, v⟩ + 0.6 bait,   logit hide = -3 + 0.6 ⟨u', v⟩ + bait

    with normal latent vectors u, u', v of unit expected length and a normal `bait` of each ad. The labels are
    independent given the probabilities.

    Training and validation rows are impressions: a log's noisy policy showed each user 30 ads of high value. Test rows
    are requests with every ad as a candidate, so that recall is measured on what an early stage has to choose from,
    not on what an earlier policy chose. Ids are the only features, the bid is a key.

    Attributes:
        rows: impressions, so rows / 30 users.
        requests: how many users have a request among the test rows.
        noise: of the log's policy, in units of the value's standard deviation.
    """

    name: ClassVar[str] = "cascade"

    rows: int = Field(default=15_000, ge=2 * IMPRESSIONS)
    ads: int = Field(default=200, ge=IMPRESSIONS)
    requests: int = Field(default=500, ge=1)
    latent_dim: int = Field(default=8, ge=1)
    noise: float = Field(default=1.0, ge=0)

    def log_schema(self) -> Schema:
        return Schema(
            features=(
                Categorical(name="user_id", role="user", encoding="identity", num_embeddings=self.users),
                Categorical(name="item_id", role="item", encoding="identity", num_embeddings=self.ads),
            ),
            labels=(Label(name="click"), Label(name="hide")),
            keys=Keys(request_id="request_id", user_id="user_id", item_id="item_id", bid="bid"),
        )

    @property
    def users(self) -> int:
        return self.rows // IMPRESSIONS

    @cached_property
    def bid_I(self) -> Floats:
        return np.exp(0.4 * self.latents(0).standard_normal(self.ads))

    @cached_property
    def probabilities_2UI(self) -> Floats:
        """True probabilities of a click and of a hide of every user and ad."""
        k = self.latent_dim
        u_2UK = self.latents(1).standard_normal((2, self.users, k)) / np.sqrt(np.sqrt(k))
        v_KI = self.latents(2).standard_normal((k, self.ads)) / np.sqrt(np.sqrt(k))
        bait_I = self.latents(3).standard_normal(self.ads)
        logits_2UI = u_2UK @ v_KI
        logits_2UI[0] = -1.5 + 1.2 * logits_2UI[0] + 0.6 * bait_I
        logits_2UI[1] = -3 + 0.6 * logits_2UI[1] + bait_I
        return sigmoid(logits_2UI)

    @cached_property
    def value_UI(self) -> Floats:
        """Expected value of showing each user each ad: what a final stage that knows everything ranks by."""
        click_UI, hide_UI = self.probabilities_2UI
        value_UI: Floats = self.bid_I * click_UI - HIDE_COST * hide_UI
        return value_UI

    def part_rows(self) -> dict[str, int]:
        valid = IMPRESSIONS // 10
        sizes = {"train": self.users * (IMPRESSIONS - valid), "valid": self.users * valid}
        return {**sizes, "test": min(self.requests, self.users) * self.ads}

    def part_frames(self, part: str) -> Iterator[pl.DataFrame]:
        valid = IMPRESSIONS // 10
        number = PARTS.index(part)
        shown = slice(valid, None) if part == "train" else slice(0, valid)
        of_user = self.ads if part == "test" else IMPRESSIONS
        last = min(self.requests, self.users) if part == "test" else self.users
        size = max(1, BLOCK_ROWS // of_user)
        for block, begin in enumerate(range(0, last, size)):
            user_U = np.arange(begin, min(begin + size, last))
            if part == "test":
                ads_UC = np.broadcast_to(np.arange(self.ads), (len(user_U), self.ads))
            else:
                ads_UC = self._shown(np.random.default_rng((self.seed, 2, block)), user_U)[:, shown]
            rng = np.random.default_rng((self.seed, 3, number, block))
            # A row's id is its own: an ad that was shown is also a candidate of the user's test request.
            first = self.users * self.ads if part == "test" else 0
            yield self._frame(rng, first, np.repeat(user_U, ads_UC.shape[1]), ads_UC.reshape(-1))

    def _shown(self, rng: np.random.Generator, user_U: Ints) -> Ints:
        """The ads that the log's policy showed to some users, in no particular order, shape (U, 30)."""
        value_UI = self.value_UI[user_U]
        score_UI = value_UI + self.noise * self.value_UI.std() * rng.standard_normal(value_UI.shape)
        best = np.argpartition(-score_UI, IMPRESSIONS - 1, axis=1)[:, :IMPRESSIONS]
        return rng.permuted(best, axis=1)

    def _frame(self, rng: np.random.Generator, first: int, user: Ints, ad: Ints) -> pl.DataFrame:
        click, hide = self.probabilities_2UI[:, user, ad]
        columns = {"request_id": first + user * self.ads + ad, "user_id": user, "item_id": ad, "bid": self.bid_I[ad]}
        return labelled(rng, columns, click=click, hide=hide)
