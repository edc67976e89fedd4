"""What is true of the users and the ads of a simulated world; its equations are in `fullrank.data.simulate`."""

# Shapes: U users, I items, R requests, S slots, H history, K dimensions.

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from fullrank.data import atomic

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

DAY = 86_400
START = 1_750_000_000 // DAY * DAY
DIMENSIONS = 16


class SimulationConfig(BaseModel):
    """Size of a world.

    Attributes:
        impressions: rows of the log.
        seed: of the world and of what happens in it.
        users, items: default to numbers in proportion to the impressions.
        days: length of the log; campaigns are born and retired within it.
        slots: ads shown to a request.
        candidates: ads that the log's policy chooses them from.
        drift: length of the change of an interest in a day.
        rate: logit of a click on an average ad in the first slot.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    impressions: int = Field(default=1_000_000, ge=100)
    seed: int = Field(default=0, ge=0)
    users: int | None = Field(default=None, ge=2)
    items: int | None = Field(default=None, ge=50)
    days: int = Field(default=10, ge=1)
    slots: int = Field(default=4, ge=1)
    candidates: int = Field(default=16, ge=1)
    drift: float = Field(default=0.03, ge=0)
    rate: float = -3.2

    @property
    def num_users(self) -> int:
        return self.users or min(20_000, max(50, self.impressions // 50))

    @property
    def num_items(self) -> int:
        return self.items or min(5_000, max(100, self.impressions // 200))


@dataclass
class World:
    """Everything that is true of the users and the ads; saved beside the dataset so that a funnel can be judged by
    what it would have earned."""

    config: SimulationConfig
    arrays: dict[str, npt.NDArray[Any]]

    @classmethod
    def make(cls, config: SimulationConfig) -> Self:
        rng = np.random.default_rng((config.seed, 1))
        users, items, k = config.num_users, config.num_items, DIMENSIONS

        def normal(*shape: int) -> Floats:
            return (rng.standard_normal(shape) / math.sqrt(k)).astype(np.float32)

        categories, brands, campaigns = 20, 200, max(20, items // 10)
        age, gender = rng.integers(0, 6, users), rng.integers(0, 2, users)
        category, campaign = rng.integers(0, categories, items), rng.integers(0, campaigns, items)
        birth = rng.uniform(-0.7 * config.days, 0.9 * config.days, campaigns)
        life = rng.exponential(0.8 * config.days, campaigns) + 1
        birth[: campaigns // 4], life[: campaigns // 4] = -1.0, 10.0 * config.days  # some last the whole log
        order = rng.permutation(items)
        popularity = (1.0 / (1 + np.arange(items)) ** 0.8)[np.argsort(order)]
        return cls(
            config,
            {
                "user_age": age,
                "user_gender": gender,
                "user_country": rng.integers(0, 8, users),
                "user_interest": normal(12, k)[age * 2 + gender] * 1.6 + 0.5 * normal(users, k),
                "user_drift": normal(users, k),
                "user_activity": rng.gamma(1.2, 1.0, users) + 0.05,
                "item_category": category,
                "item_brand": rng.integers(0, brands, items),
                "item_campaign": campaign,
                "item_content": normal(categories, k)[category] * 1.6 + 0.4 * normal(items, k),
                "item_quality": rng.standard_normal(items).astype(np.float32),
                "item_price": np.exp(rng.standard_normal(items) * 0.7).astype(np.float32),
                "item_bid": np.exp(rng.standard_normal(campaigns) * 0.5)[campaign].astype(np.float32),
                "item_popularity": popularity,
                "item_birth": birth[campaign],
                "item_death": (birth + life)[campaign],
                "hour_effect": (0.35 * np.sin((np.arange(24) - 14) * math.pi / 12)).astype(np.float32),
                "device_category": (rng.standard_normal((3, categories)) * 0.35).astype(np.float32),
            },
        )

    def interest(self, users: Ints, timestamp: Ints) -> Floats:
        days = ((timestamp - START) / DAY).astype(np.float32)[..., None]
        result: Floats = self.arrays["user_interest"][users] + (
            self.config.drift * days * self.arrays["user_drift"][users]
        ).astype(np.float32)
        return result

    def alive(self, timestamp: float) -> npt.NDArray[np.bool_]:
        """Which ads may be shown at a time, shape (I,)."""
        day = (timestamp - START) / DAY
        return (self.arrays["item_birth"] <= day) & (day < self.arrays["item_death"])

    def click_probability(
        self, users: Ints, items: Ints, timestamp: Ints, device: Ints, slot: Ints, history: Ints
    ) -> npt.NDArray[np.float64]:
        """True probability of a click.

        Args:
            users, timestamp, device: shape (R,).
            items, slot: shape (R, S).
            history: shape (R, H), items of the user's last clicks, -1 where there is none.
        """
        a = self.arrays
        category = a["item_category"][items]
        past = np.where(history >= 0, a["item_category"][np.maximum(history, 0)], -1)
        matches = (past[:, None, :] == category[:, :, None]).sum(2)
        affinity = np.einsum("rk,rsk->rs", self.interest(users, timestamp), a["item_content"][items])
        logit = (
            self.config.rate
            + 1.6 * affinity
            + 0.5 * a["item_quality"][items]
            + 0.9 * np.log1p(matches)
            - 0.35 * slot
            + a["hour_effect"][timestamp % DAY // 3600][:, None]
            + a["device_category"][device[:, None], category]
        )
        probability: npt.NDArray[np.float64] = 1 / (1 + np.exp(-logit.astype(np.float64)))
        return probability

    def conversion_probability(self, items: Ints) -> npt.NDArray[np.float64]:
        """Of a click, by item."""
        logit = -1.6 + 0.8 * self.arrays["item_quality"][items] - 0.3 * self.arrays["item_price"][items]
        return 1 / (1 + np.exp(-logit.astype(np.float64)))

    def hide_probability(self, items: Ints) -> npt.NDArray[np.float64]:
        """Of an impression, by item."""
        return 1 / (1 + np.exp(4 + 0.8 * self.arrays["item_quality"][items].astype(np.float64)))

    def save(self, path: Path) -> None:
        content = io.BytesIO()
        config = np.frombuffer(self.config.model_dump_json().encode(), dtype=np.uint8)
        np.savez_compressed(content, allow_pickle=False, config=config, **self.arrays)
        atomic.write_bytes(path, content.getvalue())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a saved world; holds numbers only.

        Raises:
            ValueError: if the file is not one.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            config = SimulationConfig.model_validate_json(arrays.pop("config").tobytes())
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(f"{path} is not a simulated world: {error}") from None
        return cls(config, arrays)
