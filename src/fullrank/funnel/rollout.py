"""A funnel in the simulated world: what it shows, with what probability it drew it, and what users do."""

# Shapes: R requests, C candidates, S slots, I items.

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import torch

from fullrank.data.dataset import Dataset
from fullrank.data.encoders import KEY_COLUMNS
from fullrank.data.loader import partial_batch
from fullrank.data.simulate import DAY, START, Histories, Requests, Shown, SimulationConfig, World, simulate
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.off_policy import LogColumns
from fullrank.funnel.slate import PolicySpec

# The time of the test part of a simulated log, which no part of a funnel has learnt from.
BEGIN = 0.9


class FunnelPolicy:
    """What a funnel shows to the users of a simulated world.

    Args:
        funnel: trained on a log of this world.
        slots: length of a list.
        policy: in place of the funnel's own.

    Raises:
        ValueError: if an item of the funnel is none of the world's.
    """

    def __init__(self, funnel: Funnel, world: World, slots: int, policy: PolicySpec | None = None) -> None:
        self.world, self.slots = world, slots
        self.funnel = funnel
        if policy is not None:
            self.funnel = funnel.with_slate(funnel.slate.model_copy(update={"policy": policy}))
        known = [name.isdecimal() and int(name) < world.config.num_items for name in map(str, funnel.items.ids)]
        if not all(known):
            raise ValueError(f"the funnel's item \"{funnel.items.ids[known.index(False)]}\" is none of the world's")
        self._item_I = np.array([*map(int, funnel.items.ids), -1], dtype=np.int64)

    def __call__(self, requests: Requests, rng: np.random.Generator) -> Shown:
        frame = self.funnel.encoders.transform(requests.frame(self.world), allow_missing=True)
        users = partial_batch(frame, self.funnel.schema)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        ranking = self.funnel.rank(users, self.slots, generator=generator)
        return Shown(self._item_I[ranking.items_UK.numpy()], ranking.propensity_UK.double().numpy())


def rollout(
    funnel: Funnel,
    world: World,
    impressions: int,
    *,
    seed: int = 0,
    policy: PolicySpec | None = None,
    before: Dataset | None = None,
) -> pl.DataFrame:
    """A log of the lists that a funnel draws in the world that it was trained in, during the last tenth of its time.

    Args:
        impressions: rows, if the funnel finds enough for every list.
        seed: of who asks, what is drawn and what is clicked; the world stays as it is.
        policy: in place of the funnel's own.
        before: the simulated log, whose clicks before that time users have in their histories; without it histories
            begin empty.

    Returns:
        Columns as those of `simulate`, with `propensity`, `slate` and `slot`.

    Raises:
        ValueError: if an item of the funnel is none of the world's.
    """
    settings = world.config.model_dump() | {"impressions": impressions, "seed": seed}
    # Users and items may follow from the number of impressions, and are the world's.
    sizes = {"users": world.config.num_users, "items": world.config.num_items}
    config = SimulationConfig.model_validate(settings | sizes)
    histories = None if before is None else histories_before(before, world)
    drawn = FunnelPolicy(funnel, world, config.slots, policy)
    return pl.concat(list(simulate(config, world, policy=drawn, histories=histories, begin=begin_of(world))))


def begin_of(world: World) -> float:
    """Day on which a rollout begins: that of the test part of the world's log."""
    return BEGIN * world.config.days


def histories_before(log: Dataset, world: World) -> Histories:
    """The last clicks of a simulated log before a rollout begins."""
    keys = [KEY_COLUMNS[name] for name in ("user_id", "item_id", "timestamp")]
    rows = pl.concat([log.scan(split).select(*keys, "click") for split in log.splits])
    before = (pl.col("click") == 1) & (pl.col(keys[2]) < START + int(begin_of(world) * DAY))
    clicks = rows.filter(before).sort(keys[2], maintain_order=True).select(keys).collect()
    histories = Histories(world.config.num_users)
    histories.add(*(clicks[name].to_numpy().astype(np.int64) for name in keys))
    return histories


def rollout_dataset(
    funnel: Funnel,
    world: World,
    out: Path,
    impressions: int,
    *,
    like: Path,
    seed: int = 0,
    policy: PolicySpec | None = None,
    before: Dataset | None = None,
    overwrite: bool = False,
) -> Dataset:
    """The log of `rollout` as a dataset, split by time, with the world beside it.

    Args:
        like: the funnel's bundle, whose encoders the dataset gets.
    """
    log = rollout(funnel, world, impressions, seed=seed, policy=policy, before=before)
    dataset = Dataset.from_frame(log, like=like, path=out, keep=list(LogColumns()[:3]), overwrite=overwrite)
    world.save(dataset.path / "world.npz")
    return dataset
