"""What a funnel would have earned in a simulated world, whose true click probabilities are known."""

# Shapes: R requests, S slots, I items, H history.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import polars as pl

from fullrank.data.dataset import Dataset
from fullrank.data.encoders import KEY_COLUMNS, Encoders
from fullrank.data.loader import batch_from_frame
from fullrank.data.simulate import World
from fullrank.funnel.catalogue import NO_ROW
from fullrank.funnel.funnel import Funnel
from fullrank.schema import FIRST_VOCABULARY_ID

Ints = npt.NDArray[np.int64]
REQUESTS_AT_ONCE = 64


@dataclass(frozen=True)
class SimulatedRequests:
    """Whole requests of a simulated log, and what is true of whoever asked.

    Attributes:
        frame: all their rows, in order.
        first: the row of each request's first slot.
        alive_RI: whether each ad may be shown.
    """

    world: World
    frame: pl.DataFrame
    first: pl.DataFrame
    user_R: Ints
    time_R: Ints
    device_R: Ints
    history_RH: Ints
    alive_RI: npt.NDArray[np.bool_]

    @classmethod
    def drawn(cls, dataset: Dataset, world: World, split: str, requests: int, seed: int) -> Self:
        """So many requests of a split at random, or all that there are."""
        request, key = pl.col(KEY_COLUMNS["request_id"]), KEY_COLUMNS["request_id"]
        frame = dataset.scan(split).collect().with_columns((request // 64).alias("__request"))
        shown = frame.group_by("__request", maintain_order=True).agg(pl.len().alias("shown"))
        whole = shown.filter(pl.col("shown") == world.config.slots)["__request"]
        chosen = whole.sample(min(requests, len(whole)), seed=seed, shuffle=True)
        frame = frame.filter(pl.col("__request").is_in(chosen.implode())).sort(key)
        first = frame.filter(request % 64 == 0)
        time_R = first[KEY_COLUMNS["timestamp"]].to_numpy().astype(np.int64)
        return cls(
            world,
            frame,
            first,
            first[KEY_COLUMNS["user_id"]].to_numpy().astype(np.int64),
            time_R,
            _decoded(dataset.encoders, "device", first["device"]),
            _histories(dataset.encoders, first, world),
            np.stack([world.alive(float(time)) for time in time_R])
            if len(time_R)
            else np.zeros((0, world.config.num_items), bool),
        )

    def __len__(self) -> int:
        return len(self.user_R)

    def earned(
        self, items_RS: Ints, rows: Ints | slice = slice(None)
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Expected value of lists, bid times true click probability summed over slots, and the probabilities (R, S).

        Args:
            items_RS: ads; `NO_ROW` earns nothing, nor does one that is no longer alive.
            rows: the requests that the lists are for; default all in order.
        """
        slot_RS = np.broadcast_to(np.arange(items_RS.shape[1]), items_RS.shape)
        user_R, time_R, device_R, history_RH = (
            column[rows] for column in (self.user_R, self.time_R, self.device_R, self.history_RH)
        )
        p_RS = self.world.click_probability(user_R, items_RS, time_R, device_R, slot_RS, history_RH)
        living_RS = np.take_along_axis(self.alive_RI[rows], items_RS, axis=1) & (items_RS != NO_ROW)
        return (p_RS * self.world.arrays["item_bid"][items_RS] * living_RS).sum(1), p_RS

    def best(self) -> Ints:
        """The list of each request by true probabilities in the first slot, shape (R, S).

        The slot shifts all logits alike, so this order is all but the best one.
        """
        slots, bid_I = self.world.config.slots, self.world.arrays["item_bid"]
        best_RS = np.empty((len(self), slots), np.int64)
        for begin in range(0, len(self), REQUESTS_AT_ONCE):
            part = slice(begin, begin + REQUESTS_AT_ONCE)
            items_RI = np.broadcast_to(np.arange(len(bid_I)), (len(self.user_R[part]), len(bid_I)))
            p_RI = self.world.click_probability(
                self.user_R[part],
                items_RI,
                self.time_R[part],
                self.device_R[part],
                np.zeros(items_RI.shape, np.int64),
                self.history_RH[part],
            )
            best_RS[part] = np.argsort(-(p_RI * bid_I * self.alive_RI[part]), axis=1)[:, :slots]
        return best_RS


def world_of(dataset: Dataset) -> World | None:
    """The world that a dataset was simulated in, if it lies beside it."""
    path = dataset.path / "world.npz"
    return World.load(path) if path.is_file() else None


def true_value(
    funnel: Funnel, dataset: Dataset, world: World, split: str = "test", *, requests: int = 500, seed: int = 0
) -> dict[str, Any]:
    """Expected value of one request, sum over slots of bid times true click probability, by different policies.

    Every policy fills the same slots for the same requests: the log's own, ads drawn at random from the living ones,
    the funnel, and the best possible one, which knows the true probability of every living ad. A funnel's ad that is
    no longer alive earns nothing.

    Returns:
        `random`, `log`, `funnel`, `best`: mean value per request; `share_of_best`; and `samples`: a few of the lists,
        each item with its predicted and its true click probability.
    """
    asked = SimulatedRequests.drawn(dataset, world, split, requests, seed)
    slots, count, bid = world.config.slots, len(asked), world.arrays["item_bid"]
    log_items = asked.frame[KEY_COLUMNS["item_id"]].to_numpy().astype(np.int64).reshape(count, slots)
    rng = np.random.default_rng(seed)
    random_items = np.argsort(rng.random(asked.alive_RI.shape) - asked.alive_RI, axis=1)[:, :slots]
    best_items = asked.best()
    # Behind the last of a list that is too short stands nothing, which earns nothing.
    ids = np.array([*(int(name) for name in funnel.items.ids), NO_ROW])
    ranking = funnel.without_deadlines().rank(batch_from_frame(asked.first, dataset.schema), slots)
    rows = np.full((count, slots), NO_ROW)
    rows[:, : ranking.items_UK.shape[1]] = ranking.items_UK.numpy()
    funnel_items = ids[rows]
    value, p_funnel = asked.earned(funnel_items)
    result: dict[str, Any] = {
        "requests": count,
        "random": float(asked.earned(random_items)[0].mean()),
        "log": float(asked.earned(log_items)[0].mean()),
        "funnel": float(value.mean()),
        "best": float(asked.earned(best_items)[0].mean()),
    }
    result["share_of_best"] = result["funnel"] / result["best"]
    predicted = ranking.probabilities_UKT[:, :, [label.name for label in dataset.schema.labels].index("click")]
    result["samples"] = [
        {
            "user_id": int(asked.user_R[row]),
            "items": [
                {
                    "item_id": int(funnel_items[row, place]),
                    "value": float(ranking.value_UK[row, place]),
                    "predicted": float(predicted[row, place]),
                    "true": float(p_funnel[row, place]),
                    "bid": float(bid[funnel_items[row, place]]),
                    "best": bool(funnel_items[row, place] in best_items[row]),
                }
                for place in range(slots)
                if funnel_items[row, place] != NO_ROW
            ],
        }
        for row in range(min(4, count))
    ]
    return result


def _decoded(encoders: Encoders, name: str, ids: pl.Series) -> Ints:
    values: Ints = np.array([int(value) for value in encoders.vocabularies[_table(encoders, name)].values.to_list()])
    decoded: Ints = values[np.maximum(ids.to_numpy() - FIRST_VOCABULARY_ID, 0)]
    return decoded


def _table(encoders: Encoders, name: str) -> str:
    return encoders.schema.embedded()[name].table_name


def _histories(encoders: Encoders, frame: pl.DataFrame, world: World) -> Ints:
    """Items of each row's history, -1 behind shorter ones.

    An item that training never saw has no name in the encoded log; another one of its category stands for it, which
    is all that the click probability asks of a history.
    """
    category_I = world.arrays["item_category"]
    first_of = {int(category): int(np.flatnonzero(category_I == category)[0]) for category in np.unique(category_I)}

    def names(column: str) -> Ints:
        values = encoders.vocabularies[_table(encoders, column)].values.to_list()
        ids = frame[column].explode().drop_nulls().to_numpy()
        decoded: Ints = np.array([-1] * FIRST_VOCABULARY_ID + [int(value) for value in values])[ids]
        return decoded

    items, categories = names("history.item"), names("history.category")
    stand_in = np.array([first_of.get(int(category), -1) for category in categories], dtype=np.int64)
    lengths = frame["history.item"].list.len().to_numpy()
    history = np.full((frame.height, max(1, int(lengths.max(initial=0)))), -1, np.int64)
    history[np.arange(history.shape[1]) < lengths[:, None]] = np.where(items >= 0, items, stand_in)
    return history
