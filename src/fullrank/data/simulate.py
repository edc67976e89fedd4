"""A simulated ads world whose true click probability is known.

Generative equations (docs/simulator.md explains them). Interests and contents live in K dimensions.

* User i belongs to an observable group g(i) = (age group, gender) and has interest
  u_i(t) = c_g + 0.5 e_i + drift · (t / day) · d_i, where c_g, e_i, d_i are normal vectors of unit expected length.
* Ad j belongs to a category, a brand and a campaign; its content is v_j = m_category + 0.4 n_j, its quality q_j is
  normal. A campaign is born and retired on random days; its bid is log-normal.
* Showing j to i at time t in slot s, on device d, at hour h:
  logit click = b + 1.6 <u_i(t), v_j> + 0.5 q_j + 0.9 log(1 + matches) - 0.35 s + hour_h + fit_{d, category},
  where matches counts the last clicks of the user, at most 20, in the ad's category.
* A click converts with logit -1.6 + 0.8 q_j - 0.3 price_j, after an exponential delay of 6 hours on average.
* A shown ad is hidden by the user with logit -4 - 0.8 q_j, independently of the click.
* The log's own policy draws candidates by popularity (Zipf) among living campaigns, and shows those of highest
  0.8 <u_i(t), v_j> + noise, best first.

A user's history holds the clicks of earlier blocks of time: a click reaches it within `block_seconds`.
"""

# Shapes: U users, I items, R requests of a block, C candidates, S slots, H history, K dimensions.

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from fullrank.data import atomic
from fullrank.data.arrow import as_array
from fullrank.data.dataset import Dataset, write_dataset
from fullrank.schema import Categorical, EventId, EventNumber, Keys, Label, Numeric, Schema, Sequence

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

DAY = 86_400
START = 1_750_000_000 // DAY * DAY
HISTORY = 20
DIMENSIONS = 16
FRAME_ROWS = 131_072


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
        import io

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


def simulation_schema() -> Schema:
    """Columns of a simulated log."""

    def ids(names: tuple[str, ...], role: str) -> tuple[Categorical, ...]:
        return tuple(Categorical.model_validate({"name": name, "role": role}) for name in names)

    return Schema(
        features=(
            *ids(("user_id", "age_group", "gender", "country"), "user"),
            *ids(("item_id", "category", "brand", "campaign"), "item"),
            Numeric(name="price", role="item", transform="log1p", encoding="scalar"),
            *ids(("hour", "weekday", "device", "position"), "context"),
            Sequence(
                name="history",
                max_length=HISTORY,
                fields=(
                    EventId(name="item", table="item_id"),
                    EventId(name="category", table="category"),
                    EventNumber(name="age", transform="log1p"),
                ),
            ),
        ),
        labels=(Label(name="click"), Label(name="conversion", delay_seconds=6 * 3600), Label(name="hide")),
        keys=Keys(request_id="request_id", user_id="user_id", item_id="item_id", timestamp="timestamp", bid="bid"),
    )


class _Histories:
    """The last clicks of every user in ring buffers."""

    def __init__(self, users: int) -> None:
        self.items = np.full((users, HISTORY), -1, np.int64)
        self.times = np.zeros((users, HISTORY), np.int64)
        self.counts = np.zeros(users, np.int64)

    def read(self, users: Ints) -> tuple[Ints, Ints]:
        """Items and times (R, H), oldest first, -1 in front where there are fewer."""
        places = (self.counts[users][:, None] + np.arange(HISTORY)) % HISTORY
        rows = users[:, None]
        return self.items[rows, places], self.times[rows, places]

    def add(self, users: Ints, items: Ints, times: Ints) -> None:
        """Clicks in time order; several of one user are kept in that order."""
        order = np.argsort(users, kind="stable")
        users, items, times = users[order], items[order], times[order]
        first = np.r_[True, users[1:] != users[:-1]]
        start = np.maximum.accumulate(np.where(first, np.arange(len(users)), 0))
        nth = np.arange(len(users)) - start
        places = (self.counts[users] + nth) % HISTORY
        self.items[users, places] = items
        self.times[users, places] = times
        np.add.at(self.counts, users, 1)


def simulate(config: SimulationConfig, world: World | None = None) -> Iterator[pl.DataFrame]:
    """The log in time order: raw columns of `simulation_schema`, `__true_click`, `__true_conversion`, `__true_hide`,
    and `conversion_delay` in seconds (null without a conversion). Deterministic by seed."""
    world = world or World.make(config)
    a = world.arrays
    rng = np.random.default_rng((config.seed, 2))
    requests = -(-config.impressions // config.slots)
    per_block = max(50, min(2_000, requests // 100))
    activity = np.cumsum(a["user_activity"] / a["user_activity"].sum())
    histories = _Histories(config.num_users)
    pending: list[pl.DataFrame] = []
    rows = 0
    for first in range(0, requests, per_block):
        size = min(per_block, requests - first)
        numbers = np.arange(first, first + size)
        timestamp = START + (numbers * (config.days * DAY) // requests).astype(np.int64)
        users = np.minimum(np.searchsorted(activity, rng.random(size)), config.num_users - 1)
        device = rng.choice(3, size, p=[0.6, 0.3, 0.1])
        # The log's policy: candidates by popularity among living campaigns, shown by noisy affinity.
        weight = np.cumsum(a["item_popularity"] * world.alive(float(timestamp[0])))
        drawn = np.searchsorted(weight, rng.random((size, config.candidates)) * weight[-1], side="right")
        drawn = np.minimum(drawn, config.num_items - 1)
        affinity = np.einsum("rk,rck->rc", world.interest(users, timestamp), a["item_content"][drawn])
        score = 0.8 * affinity + rng.gumbel(size=drawn.shape) * 0.5
        ordered = np.sort(drawn, axis=1)  # an ad is shown at most once in a request
        again = np.zeros(drawn.shape, bool)
        again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        by_id = np.argsort(drawn, axis=1, kind="stable")
        repeated = np.zeros(drawn.shape, bool)
        np.put_along_axis(repeated, by_id, again, axis=1)
        score[repeated] = -np.inf
        shown = np.argsort(-score, axis=1, kind="stable")[:, : config.slots]
        valid = ~np.take_along_axis(repeated, shown, axis=1)
        items = np.take_along_axis(drawn, shown, axis=1)
        slot = np.broadcast_to(np.arange(items.shape[1]), items.shape)
        past_items, past_times = histories.read(users)
        p_click = world.click_probability(users, items, timestamp, device, slot, past_items)
        p_convert, p_hide = world.conversion_probability(items), world.hide_probability(items)
        click = rng.random(items.shape) < p_click
        convert = click & (rng.random(items.shape) < p_convert)
        hide = rng.random(items.shape) < p_hide
        delay = rng.exponential(6 * 3600, items.shape)
        kept = np.flatnonzero(valid.reshape(-1))
        row = kept // items.shape[1]

        def flat(values: npt.NDArray[Any], kept: Ints = kept) -> npt.NDArray[Any]:
            return values.reshape(-1)[kept]

        item, user, when = flat(items), users[row], timestamp[row]
        lengths = (past_items >= 0).sum(1)
        real = (past_items >= 0).reshape(-1)
        age = np.maximum(timestamp[:, None] - past_times, 0)
        frame = pl.DataFrame(
            {
                "request_id": numbers[row] * 64 + flat(slot),
                "user_id": user,
                "age_group": a["user_age"][user],
                "gender": a["user_gender"][user],
                "country": a["user_country"][user],
                "item_id": item,
                "category": a["item_category"][item],
                "brand": a["item_brand"][item],
                "campaign": a["item_campaign"][item],
                "price": a["item_price"][item],
                "hour": when % DAY // 3600,
                "weekday": when // DAY % 7,
                "device": device[row],
                "position": flat(slot),
                "timestamp": when,
                "bid": a["item_bid"][item],
                "click": flat(click).astype(np.int8),
                "conversion": flat(convert).astype(np.int8),
                "hide": flat(hide).astype(np.int8),
                "conversion_delay": pl.Series(flat(delay), dtype=pl.Float64).set(pl.Series(~flat(convert)), None),
                "__true_click": flat(p_click).astype(np.float32),
                "__true_conversion": flat(p_click * p_convert).astype(np.float32),
                "__true_hide": flat(p_hide).astype(np.float32),
            }
        )
        past = {
            "history.item": past_items.reshape(-1)[real],
            "history.category": a["item_category"][past_items.reshape(-1)[real]],
            "history.age": age.reshape(-1)[real].astype(np.float64),
        }
        frame = frame.with_columns(_lists(name, values, lengths, row) for name, values in past.items())
        clicked = flat(click)
        histories.add(user[clicked], item[clicked], when[clicked])
        pending.append(frame)
        rows += frame.height
        if rows >= FRAME_ROWS:
            yield pl.concat(pending)
            pending, rows = [], 0
    if pending:
        yield pl.concat(pending)


def _lists(name: str, values: npt.NDArray[Any], lengths: Ints, row: Ints) -> pl.Series:
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    lists = pl.Series(name, pl.from_arrow(pa.LargeListArray.from_arrays(as_array(offsets), as_array(values))))
    return lists.gather(row)


def simulate_dataset(
    out: Path,
    impressions: int = 1_000_000,
    seed: int = 0,
    *,
    true_probabilities: bool = True,
    overwrite: bool = False,
    **options: Any,
) -> Dataset:
    """Simulate a log into a dataset directory, the last fifth of the time for validation and test, and the world into
    `world.npz` inside it.

    Args:
        impressions: rows to make (a few less, where a request drew the same ad twice).
        true_probabilities: keep the columns `__true_<label>`.
        options: further fields of `SimulationConfig`.
    """
    config = SimulationConfig(impressions=impressions, seed=seed, **options)
    world = World.make(config)
    frames = simulate(config, world)
    cuts = (START + int(0.8 * config.days * DAY), START + int(0.9 * config.days * DAY))
    waiting: list[pl.DataFrame] = []

    def part(low: int | None, high: int | None) -> Iterator[pl.DataFrame]:
        """Rows before `high`; the rest of the frame waits for the next part."""
        while True:
            frame = waiting.pop() if waiting else next(frames, None)
            if frame is None:
                return
            if not true_probabilities:
                frame = frame.drop(pl.selectors.starts_with("__true_"))
            now = frame if high is None else frame.filter(pl.col("timestamp") < high)
            if now.height:
                yield now
            if high is not None and now.height < frame.height:
                waiting.append(frame.filter(pl.col("timestamp") >= high))
                return

    parts = {"train": part(None, cuts[0]), "valid": part(cuts[0], cuts[1]), "test": part(cuts[1], None)}
    source = f"simulated, {config.model_dump_json()}"
    dataset = write_dataset(out, simulation_schema(), parts, source=source, overwrite=overwrite)
    world.save(dataset.path / "world.npz")
    return dataset
