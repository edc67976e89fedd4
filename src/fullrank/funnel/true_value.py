"""What a funnel would have earned in a simulated world, whose true click probabilities are known."""

# Shapes: R requests, S slots, I items, H history.

from __future__ import annotations

from typing import Any

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
    slots = world.config.slots
    frame = dataset.scan(split).collect().with_columns((pl.col(KEY_COLUMNS["request_id"]) // 64).alias("__request"))
    shown = frame.group_by("__request", maintain_order=True).agg(pl.len().alias("shown"))
    whole = shown.filter(pl.col("shown") == slots)["__request"]
    chosen = whole.sample(min(requests, len(whole)), seed=seed, shuffle=True)
    frame = frame.filter(pl.col("__request").is_in(chosen.implode())).sort(KEY_COLUMNS["request_id"])
    first = frame.filter(pl.col(KEY_COLUMNS["request_id"]) % 64 == 0)
    count = first.height
    users = first[KEY_COLUMNS["user_id"]].to_numpy().astype(np.int64)
    times = first[KEY_COLUMNS["timestamp"]].to_numpy().astype(np.int64)
    device = _decoded(dataset.encoders, "device", first["device"])
    history = _histories(dataset.encoders, first, world)
    bid = world.arrays["item_bid"]
    everything = np.arange(world.config.num_items)
    alive = np.stack([world.alive(float(time)) for time in times])
    slot = np.broadcast_to(np.arange(slots), (count, slots))

    def earned(items: Ints) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        p = world.click_probability(users, items, times, device, slot, history)
        living = np.take_along_axis(alive, items, axis=1)
        return (p * bid[items] * living * (items != NO_ROW)).sum(1), p

    log_items = frame[KEY_COLUMNS["item_id"]].to_numpy().astype(np.int64).reshape(count, slots)
    rng = np.random.default_rng(seed)
    random_items = np.argsort(rng.random(alive.shape) - alive, axis=1)[:, :slots]
    best_items = np.empty((count, slots), np.int64)
    for begin in range(0, count, REQUESTS_AT_ONCE):
        part = slice(begin, begin + REQUESTS_AT_ONCE)
        rows = users[part]
        p = world.click_probability(
            rows,
            np.broadcast_to(everything, (len(rows), len(everything))),
            times[part],
            device[part],
            np.zeros((len(rows), len(everything)), np.int64),
            history[part],
        )
        # The slot shifts all logits alike, so the order by value in the first slot is all but the best order.
        best_items[part] = np.argsort(-(p * bid * alive[part]), axis=1)[:, :slots]
    # Behind the last of a list that is too short stands nothing, which earns nothing.
    ids = np.array([*(int(name) for name in funnel.items.ids), NO_ROW])
    ranking = funnel.rank(batch_from_frame(first, dataset.schema), slots)
    rows = np.full((count, slots), NO_ROW)
    rows[:, : ranking.items_UK.shape[1]] = ranking.items_UK.numpy()
    funnel_items = ids[rows]
    value, p_funnel = earned(funnel_items)
    result: dict[str, Any] = {
        "requests": count,
        "random": float(earned(random_items)[0].mean()),
        "log": float(earned(log_items)[0].mean()),
        "funnel": float(value.mean()),
        "best": float(earned(best_items)[0].mean()),
    }
    result["share_of_best"] = result["funnel"] / result["best"]
    predicted = ranking.probabilities_UKT[:, :, [label.name for label in dataset.schema.labels].index("click")]
    result["samples"] = [
        {
            "user_id": int(users[row]),
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
