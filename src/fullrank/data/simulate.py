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

# Shapes: R requests of a block, C candidates, S slots, H history.

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from fullrank.data.arrow import as_array
from fullrank.data.dataset import Dataset, write_dataset
from fullrank.data.world import DAY, START, Ints, SimulationConfig, World
from fullrank.schema import Categorical, EventId, EventNumber, Keys, Label, Numeric, Schema, Sequence

__all__ = [
    "DAY",
    "START",
    "Histories",
    "LogPolicy",
    "Policy",
    "Requests",
    "Shown",
    "SimulationConfig",
    "World",
    "simulate",
    "simulate_dataset",
    "simulation_schema",
]

HISTORY = 20
FRAME_ROWS = 131_072


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


class Histories:
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


@dataclass(frozen=True)
class Requests:
    """A block of requests, before anything is shown.

    Attributes:
        users, timestamp, device: shape (R,).
        past_items, past_times: shape (R, H), the user's last clicks, oldest first, -1 in front where there are fewer.
    """

    users: Ints
    timestamp: Ints
    device: Ints
    past_items: Ints
    past_times: Ints

    def frame(self, world: World) -> pl.DataFrame:
        """What is known of each: raw user and context columns of `simulation_schema`, the position that of slot 0."""
        a = world.arrays
        real = (self.past_items >= 0).reshape(-1)
        items, age = self.past_items.reshape(-1)[real], np.maximum(self.timestamp[:, None] - self.past_times, 0)
        past = {
            "history.item": items,
            "history.category": a["item_category"][items],
            "history.age": age.reshape(-1)[real].astype(np.float64),
        }
        lengths = (self.past_items >= 0).sum(1)
        return pl.DataFrame(
            {
                "user_id": self.users,
                "age_group": a["user_age"][self.users],
                "gender": a["user_gender"][self.users],
                "country": a["user_country"][self.users],
                "hour": self.timestamp % DAY // 3600,
                "weekday": self.timestamp // DAY % 7,
                "device": self.device,
                "position": np.zeros(len(self.users), np.int64),
                "timestamp": self.timestamp,
                **{name: _lists(name, values, lengths) for name, values in past.items()},
            }
        )


class Shown(NamedTuple):
    """What a policy shows to a block of requests.

    Attributes:
        items: shape (R, S), -1 for nothing, behind all others.
        propensity: shape (R, S), the probability that each was drawn with, given the slots above; None if not known.
    """

    items: Ints
    propensity: npt.NDArray[np.float64] | None = None


Policy = Callable[[Requests, np.random.Generator], Shown]


class LogPolicy:
    """The log's own: candidates by popularity among living campaigns, shown by noisy affinity."""

    def __init__(self, config: SimulationConfig, world: World) -> None:
        self.config, self.world = config, world

    def __call__(self, requests: Requests, rng: np.random.Generator) -> Shown:
        config, world, a = self.config, self.world, self.world.arrays
        weight = np.cumsum(a["item_popularity"] * world.alive(float(requests.timestamp[0])))
        drawn = np.searchsorted(weight, rng.random((len(requests.users), config.candidates)) * weight[-1], side="right")
        drawn = np.minimum(drawn, config.num_items - 1)
        interest = world.interest(requests.users, requests.timestamp)
        affinity = np.einsum("rk,rck->rc", interest, a["item_content"][drawn])
        score = 0.8 * affinity + rng.gumbel(size=drawn.shape) * 0.5
        ordered = np.sort(drawn, axis=1)  # an ad is shown at most once in a request
        again = np.zeros(drawn.shape, bool)
        again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        by_id = np.argsort(drawn, axis=1, kind="stable")
        repeated = np.zeros(drawn.shape, bool)
        np.put_along_axis(repeated, by_id, again, axis=1)
        score[repeated] = -np.inf
        shown = np.argsort(-score, axis=1, kind="stable")[:, : config.slots]
        items = np.take_along_axis(np.where(repeated, -1, drawn), shown, axis=1)
        return Shown(items)


def simulate(
    config: SimulationConfig,
    world: World | None = None,
    *,
    policy: Policy | None = None,
    histories: Histories | None = None,
    begin: float = 0.0,
) -> Iterator[pl.DataFrame]:
    """The log in time order: raw columns of `simulation_schema`, `__true_click`, `__true_conversion`, `__true_hide`,
    and `conversion_delay` in seconds (null without a conversion). Deterministic by seed.

    Args:
        policy: what is shown; default the log's own. If it knows its propensities there are three further columns:
            `propensity`, `slate` (the number of the request) and `slot`. What it shows that is not alive is not
            clicked.
        histories: clicks from before, which the log's are added to.
        begin: day on which the log begins; it ends with the day `config.days`.
    """
    world = world or World.make(config)
    a = world.arrays
    rng = np.random.default_rng((config.seed, 2))
    requests = -(-config.impressions // config.slots)
    per_block = max(50, min(2_000, requests // 100))
    activity = np.cumsum(a["user_activity"] / a["user_activity"].sum())
    policy = policy or LogPolicy(config, world)
    histories = histories or Histories(config.num_users)
    first_second, seconds = START + int(begin * DAY), config.days * DAY - int(begin * DAY)
    pending: list[pl.DataFrame] = []
    rows = 0
    for first in range(0, requests, per_block):
        size = min(per_block, requests - first)
        numbers = np.arange(first, first + size)
        timestamp = first_second + (numbers * seconds // requests).astype(np.int64)
        users = np.minimum(np.searchsorted(activity, rng.random(size)), config.num_users - 1)
        device = rng.choice(3, size, p=[0.6, 0.3, 0.1])
        block = Requests(users, timestamp, device, *histories.read(users))
        items, propensity = policy(block, rng)
        slot = np.broadcast_to(np.arange(items.shape[1]), items.shape)
        p_click = world.click_probability(users, items, timestamp, device, slot, block.past_items)
        p_click = p_click * world.alive(float(timestamp[0]))[items]
        p_convert, p_hide = world.conversion_probability(items), world.hide_probability(items)
        click = rng.random(items.shape) < p_click
        convert = click & (rng.random(items.shape) < p_convert)
        hide = rng.random(items.shape) < p_hide
        delay = rng.exponential(6 * 3600, items.shape)
        kept = np.flatnonzero(items.reshape(-1) >= 0)
        row = kept // items.shape[1]

        def flat(values: npt.NDArray[Any], kept: Ints = kept) -> npt.NDArray[Any]:
            return values.reshape(-1)[kept]

        item, converted = flat(items), flat(convert)
        asked = block.frame(world)[row]
        frame = pl.DataFrame(
            {
                "request_id": numbers[row] * 64 + flat(slot),
                **{name: asked[name] for name in ("user_id", "age_group", "gender", "country")},
                "item_id": item,
                "category": a["item_category"][item],
                "brand": a["item_brand"][item],
                "campaign": a["item_campaign"][item],
                "price": a["item_price"][item],
                **{name: asked[name] for name in ("hour", "weekday", "device")},
                "position": flat(slot),
                "timestamp": asked["timestamp"],
                "bid": a["item_bid"][item],
                "click": flat(click).astype(np.int8),
                "conversion": converted.astype(np.int8),
                "hide": flat(hide).astype(np.int8),
                "conversion_delay": pl.Series(flat(delay), dtype=pl.Float64).set(pl.Series(~converted), None),
                "__true_click": flat(p_click).astype(np.float32),
                "__true_conversion": flat(p_click * p_convert).astype(np.float32),
                "__true_hide": flat(p_hide).astype(np.float32),
                **{name: asked[name] for name in asked.columns if name.startswith("history.")},
            }
        )
        if propensity is not None:
            frame = frame.with_columns(
                propensity=flat(propensity), slate=pl.Series(numbers[row]), slot=pl.Series(flat(slot))
            )
        clicked = flat(click)
        histories.add(users[row][clicked], item[clicked], timestamp[row][clicked])
        pending.append(frame)
        rows += frame.height
        if rows >= FRAME_ROWS:
            yield pl.concat(pending)
            pending, rows = [], 0
    if pending:
        yield pl.concat(pending)


def _lists(name: str, values: npt.NDArray[Any], lengths: Ints) -> pl.Series:
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return pl.Series(name, pl.from_arrow(pa.LargeListArray.from_arrays(as_array(offsets), as_array(values))))


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
