"""What is left of the final stage's best list when the stages before it hand on fewer items, or more."""

# Shapes: R requests, N items of the catalogue, C candidates, S settings, K places of a list.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset
from fullrank.data.loader import batch_from_frame
from fullrank.data.simulate import World
from fullrank.funnel.catalogue import NO_ROW
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.stages import FINAL, StageSizes
from fullrank.funnel.true_value import SimulatedRequests
from fullrank.metrics import Bootstrap, MeanRows, bootstrap

Doubles = npt.NDArray[np.float64]
# How many items each stage hands on, from retrieval to the last that is looked at.
Setting = tuple[int, ...]

# Of the list that stages are judged by.
BEST = 10
# The whole catalogue is scored for each request; for a large one requests are fewer, but never fewer than these.
MOST_PAIRS, FEWEST_REQUESTS = 1_000_000, 10


@dataclass(frozen=True)
class Outcomes:
    """What is left of the final stage's best list under several settings, request by request.

    Attributes:
        settings: S of them.
        recall_RS: share of the best K items of the whole catalogue, by the final stage's value, that are handed on.
        value_RS: value of the best K that are handed on, by the final stage.
        whole_R: that of the best K of the whole catalogue.
        true_RS, true_whole_R, true_best_R: true value of those lists, and of the best possible one; None where nobody
            knows it. These lists have as many places as the simulated requests.
        user_R: int64 keys; None where the log names no users.
    """

    settings: tuple[Setting, ...]
    recall_RS: Doubles
    value_RS: Doubles
    whole_R: Doubles
    true_RS: Doubles | None
    true_whole_R: Doubles | None
    true_best_R: Doubles | None
    user_R: Tensor | None

    def __len__(self) -> int:
        return len(self.whole_R)

    def share(self, setting: Setting) -> float:
        """Of the value in the whole catalogue; NaN where that is not positive."""
        whole = float(self.whole_R.sum())
        return float(self.value_RS[:, self.settings.index(setting)].sum()) / whole if whole > 0 else math.nan

    def drawn(self, setting: Setting, seed: int) -> Bootstrap:
        """Means of recall, value, and true value where it is known, and the share of the value, users resampled."""
        place = self.settings.index(setting)
        values = {"recall": self.recall_RS[:, place], "value": self.value_RS[:, place], "whole": self.whole_R}
        if self.true_RS is not None:
            values["true_value"] = self.true_RS[:, place]
        rows = MeanRows({name: torch.from_numpy(value.copy()) for name, value in values.items()}, self.user_R)
        means = bootstrap(rows, seed=seed)
        whole = means.resampled.pop("whole")
        del means.estimate["whole"]
        means.estimate["share"] = self.share(setting)
        means.resampled["share"] = means.resampled["value"] / np.where(whole > 0, whole, np.nan)
        return means


@dataclass(frozen=True)
class Asked:
    """Requests to judge a funnel by: as a batch, and with what is true of them in a simulated world."""

    users: Batch
    truth: SimulatedRequests | None


def draw(dataset: Dataset, split: str, requests: int, seed: int, world: World | None = None) -> Asked:
    """Random rows of a split, whatever came of them; of a simulated log the first rows of random requests."""
    if world is not None:
        truth = SimulatedRequests.drawn(dataset, world, split, requests, seed)
        if len(truth):
            return Asked(batch_from_frame(truth.first, dataset.schema), truth)
    rows = dataset.rows(split)
    chosen = np.sort(np.random.default_rng(seed).choice(rows, min(requests, rows), replace=False))
    frame = dataset.scan(split).with_row_index("__row").filter(pl.col("__row").is_in(pl.Series(chosen).implode()))
    return Asked(batch_from_frame(frame.drop("__row").collect(), dataset.schema), None)


def affordable(funnel: Funnel, requests: int) -> int:
    """So many requests, or as many as the size of the catalogue leaves time for."""
    return min(requests, max(FEWEST_REQUESTS, MOST_PAIRS // max(1, funnel.items.active_I.numel())))


@torch.inference_mode()
def outcomes(funnel: Funnel, asked: Asked, settings: Sequence[Setting], k: int = BEST) -> Outcomes:
    """Score the whole catalogue for each request once, by all stages, and cut it as each setting says.

    No request needs more memory than the catalogue has items, so that their number does not matter.

    Args:
        settings: of up to as many sizes as there are stages before the final one.
    """
    users, truth = asked.users, asked.truth
    slots = truth.world.config.slots if truth is not None else 0
    ids = np.array([*(int(name) for name in funnel.items.ids), NO_ROW]) if truth is not None else np.array([])
    deepest = max(setting[0] for setting in settings)
    active_N = funnel.items.active_I
    recall_RS, value_RS = np.zeros((2, len(users), len(settings)))
    whole_R, true_RS, true_whole_R = np.zeros(len(users)), np.zeros(value_RS.shape), np.zeros(len(users))
    for row in range(len(users)):
        user = users[row : row + 1]
        found_C = funnel.items.places(funnel.retriever.search(user, deepest).item_keys_BK)[0]
        found_C = found_C[found_C != NO_ROW]
        final_N = funnel.values_of(FINAL, user, active_N[None])[0]
        best_K = _best(final_N, k)
        final_C = funnel.values_of(FINAL, user, found_C[None])[0]
        early = [funnel.values_of(stage, user, found_C[None])[0] for stage in funnel.early]
        best_C = torch.isin(found_C, active_N[best_K])
        whole_R[row] = _sum(final_N[best_K])
        lists_SK = np.full((len(settings), slots), NO_ROW)
        for place, kept_C in enumerate(_kept(early, found_C.numel(), settings)):
            list_K = kept_C[_best(final_C[kept_C], k)]
            recall_RS[row, place] = float(best_C[kept_C].sum()) / max(1, best_K.numel())
            value_RS[row, place] = _sum(final_C[list_K])
            shown = found_C[list_K[:slots]].numpy()
            lists_SK[place, : len(shown)] = shown
        if truth is not None:
            whole_K = active_N[best_K[:slots]].numpy()
            whole_K = np.pad(whole_K, (0, slots - len(whole_K)), constant_values=NO_ROW)
            lists = ids[np.concatenate([lists_SK, whole_K[None]])]
            earned, _ = truth.earned(lists, np.full(len(lists), row))
            true_RS[row], true_whole_R[row] = earned[:-1], earned[-1]
    known = truth is not None
    return Outcomes(
        tuple(settings),
        recall_RS,
        value_RS,
        whole_R,
        true_RS if known else None,
        true_whole_R if known else None,
        truth.earned(truth.best())[0] if truth is not None else None,
        users.user_B,
    )


def _kept(early: Sequence[Tensor], count: int, settings: Sequence[Setting]) -> list[Tensor]:
    """Places among the retrieved of what is left under each setting, each cut made once."""
    known: dict[Setting, Tensor] = {}

    def kept(setting: Setting) -> Tensor:
        if setting not in known:
            if len(setting) == 1:
                known[setting] = torch.arange(min(setting[0], count))
            else:
                before_C = kept(setting[:-1])
                if before_C.numel() > setting[-1]:
                    order = (*setting[:-1], -1)
                    if order not in known:
                        value_C = early[len(setting) - 2][before_C]
                        known[order] = before_C[value_C.argsort(descending=True, stable=True)]
                    before_C = known[order][: setting[-1]]
                known[setting] = before_C
        return known[setting]

    return [kept(setting) for setting in settings]


def _best(value_C: Tensor, k: int) -> Tensor:
    """Places of the k largest that are numbers, the largest first."""
    value_K, place_K = torch.topk(value_C, min(k, value_C.numel()))
    return place_K[value_K > -torch.inf]


def _sum(values: Tensor) -> float:
    return float(values.double().sum())


def point_of(found: Outcomes, setting: Setting, costs: dict[str, float]) -> dict[str, Any]:
    """What is said of a setting: `sizes`, costs, `recall`, `value`, `share`, and `true_value` where it is known."""
    place = found.settings.index(setting)
    point: dict[str, Any] = {
        "sizes": list(setting),
        **costs,
        "recall": float(found.recall_RS[:, place].mean()),
        "value": float(found.value_RS[:, place].mean()),
        "share": found.share(setting),
    }
    if found.true_RS is not None:
        point["true_value"] = float(found.true_RS[:, place].mean())
    return point


def front(found: Outcomes, costs: dict[Setting, float]) -> list[Setting]:
    """The settings than which none has more value at no more cost, from the cheapest on (the Pareto front)."""
    value = {setting: float(found.value_RS[:, found.settings.index(setting)].mean()) for setting in costs}
    best, kept = -math.inf, []
    for setting in sorted(costs, key=lambda setting: (costs[setting], -value[setting])):
        if value[setting] > best:
            best = value[setting]
            kept.append(setting)
    return kept


def sizes_of(funnel: Funnel) -> Setting:
    """What the stages before the final one hand on."""
    return (funnel.sizes.retrieve, *funnel.sizes.keeps(len(funnel.early)))


def as_sizes(setting: Setting) -> StageSizes:
    """The other way round."""
    retrieve, *keeps = setting
    return StageSizes(retrieve=retrieve, keep=tuple(keeps)) if keeps else StageSizes(retrieve=retrieve)


def settings_within(funnel: Funnel, *, most: int, k: int = BEST) -> list[Setting]:
    """All settings of counts a constant factor apart, from k to the catalogue or four times what retrieval hands on
    now, no stage handing on more than the one before; no more than `most` of them."""
    stages = 1 + len(funnel.early)
    deepest = min(funnel.items.active_I.numel(), max(2000, 4 * funnel.sizes.retrieve))
    # C(counts + stages - 1, stages) settings do not rise.
    counts = next(n for n in range(64, 0, -1) if n == 1 or math.comb(n + stages - 1, stages) <= most)
    # Below k, a list cannot be filled.
    grid = np.unique(np.geomspace(min(k, deepest), deepest, counts).round().astype(int)).tolist()
    settings: list[Setting] = [()]
    for _ in range(stages):
        settings = [(*setting, n) for setting in settings for n in grid if not setting or n <= setting[-1]]
    return settings
