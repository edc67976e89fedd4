"""How many of the clicked items each stage of a funnel lets through, and what the early stages cost the final one."""

# Shapes: R requests, B requests at once, C candidates, K results.

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from torch import Tensor

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset
from fullrank.data.encoders import KEY_COLUMNS
from fullrank.data.loader import batch_from_frame
from fullrank.funnel.catalogue import NO_ROW
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.stages import FINAL
from fullrank.metrics import Bootstrap, MeanRows, ads_recall, bootstrap, kendall_tau, pair_consistency
from fullrank.retrieval import Popularity, item_keys
from fullrank.retrieval.base import Items
from fullrank.retrieval.exact import top_k

REQUESTS_AT_ONCE = 256


def clicked_requests(dataset: Dataset, split: str, requests: int, seed: int) -> tuple[Batch, pl.DataFrame] | None:
    """Random rows of a split whose first binary label is 1, as a batch and as a frame; None if there are none."""
    label = next((label.name for label in dataset.schema.labels if label.kind == "binary"), None)
    if label is None:
        return None
    item = KEY_COLUMNS["item_id"]
    frame = dataset.scan(split).filter((pl.col(label) == 1) & pl.col(item).is_not_null()).collect()
    if not frame.height:
        return None
    frame = frame.sample(min(requests, frame.height), seed=seed, shuffle=True)
    return batch_from_frame(frame, dataset.schema), frame


@dataclass(frozen=True)
class Hits:
    """Whether the clicked item of each request was found.

    Attributes:
        found: by place, bool of shape (R,): `retrieval_at_100`, `popularity_at_100` (the most clicked items),
            `retrieval` (all that it hands on), each early stage, `final_at_100`, `final_at_10`.
        retrievable_R: whether the item may be retrieved at all.
        user_R: int64 keys; None where the log names no users.
        cost_R: items that retrieval scored.
    """

    found: dict[str, Tensor]
    retrievable_R: Tensor
    user_R: Tensor | None
    cost_R: Tensor

    def recall(self, chosen_R: Tensor | None = None, *, seed: int = 0) -> Bootstrap | None:
        """Share of the items found, requests of a user resampled together; None if there is no request.

        Args:
            chosen_R: requests to take; default those whose item may be retrieved: that others are not found is the
                catalogue's matter, not the model's.
        """
        chosen_R = self.retrievable_R if chosen_R is None else chosen_R
        if not bool(chosen_R.any()):
            return None
        users = None if self.user_R is None else self.user_R[chosen_R]
        return bootstrap(MeanRows({name: hit_R[chosen_R] for name, hit_R in self.found.items()}, users), seed=seed)


@torch.inference_mode()
def hits(funnel: Funnel, dataset: Dataset, split: str, requests: int, seed: int) -> Hits | None:
    """Ask the funnel for lists for clicked rows; None if there are none."""
    drawn = clicked_requests(dataset, split, requests, seed)
    if drawn is None:
        return None
    users, frame = drawn
    wanted_R = item_keys(frame[KEY_COLUMNS["item_id"]])
    active_I = funnel.items.active_I
    popularity = Popularity(dataset.schema).fit(dataset)
    popularity.index(Items(funnel.items.keys_I[active_I], funnel.items.rows.batch[:0]))
    popular_K = popularity.search(users[:1], 100).item_keys_BK[0]
    found: dict[str, list[Tensor]] = {}
    costs: list[Tensor] = []
    sizes, keys_of = funnel.sizes, funnel.items.keys_of
    for begin in range(0, len(users), REQUESTS_AT_ONCE):
        part, wanted_B1 = users[begin : begin + REQUESTS_AT_ONCE], wanted_R[begin : begin + REQUESTS_AT_ONCE, None]
        # A list longer than the final stage's share would widen the stages before it, and flatter them.
        ranking = funnel.rank(part, min(100, sizes.finalists(len(funnel.early))))
        searched = funnel.retriever.search(part, max(100, sizes.retrieve))
        retrieved_BC, ranked_BK = searched.item_keys_BK, keys_of(ranking.items_UK)
        costs.append(searched.cost_B)
        places = {
            "retrieval_at_100": retrieved_BC[:, :100] == wanted_B1,
            "popularity_at_100": popular_K[None] == wanted_B1,
            "retrieval": retrieved_BC[:, : sizes.retrieve] == wanted_B1,
            **{stage: keys_of(ranking.passed[stage]) == wanted_B1 for stage in funnel.early},
            "final_at_100": ranked_BK == wanted_B1,
            "final_at_10": ranked_BK[:, :10] == wanted_B1,
        }
        for name, hit in places.items():
            found.setdefault(name, []).append(hit.any(1))
    return Hits(
        {name: torch.cat(parts) for name, parts in found.items()},
        torch.isin(wanted_R, funnel.items.keys_I[active_I]),
        users.user_B,
        torch.cat(costs),
    )


def early_recall(funnel: Funnel, dataset: Dataset, split: str, requests: int, seed: int) -> dict[str, Any]:
    """How well the early stages stand in for the final one; see `evaluate_funnel`."""
    drawn = clicked_requests(dataset, split, requests, seed) if funnel.early else None
    if drawn is None:
        return {}
    users = drawn[0]
    shares: list[float] = []
    best, reached, lowest = 0.0, 0.0, math.inf
    alone: dict[str, dict[str, list[float]]] = {stage: {} for stage in funnel.early}
    for row in range(len(users)):
        items_1C, values = funnel.stage_values(users[row : row + 1])
        there_C = items_1C[0] != NO_ROW
        if not bool(there_C.any()):
            continue
        final_C = values.pop(FINAL)[0, there_C].double()
        kept_C = torch.arange(final_C.numel())
        for (stage, value_1C), keep in zip(values.items(), funnel.sizes.keeps(len(values)), strict=True):
            for name, number in _agreement(final_C[None], value_1C[:, there_C], keep).items():
                alone[stage].setdefault(name, []).append(number)
            kept_C = kept_C[top_k(value_1C[:, there_C][:, kept_C], keep)[1][0]]
        best_C = top_k(final_C[None], 10)[1][0]
        shares.append(float(torch.isin(best_C, kept_C).double().mean()))
        lowest = min(lowest, float(final_C.min()))
        best += float(final_C[best_C].sum())
        reached += float(top_k(final_C[kept_C][None], 10)[0].sum())
    result: dict[str, Any] = {
        "requests": float(len(users)),
        "top_10": sum(shares) / len(shares) if shares else math.nan,
    }
    result["stages"] = {
        stage: {name: _mean(numbers) for name, numbers in found.items()} for stage, found in alone.items()
    }
    if lowest >= 0 and best > 0:
        result["value_of_top_10"] = reached / best
    return result


def _agreement(final_1C: Tensor, early_1C: Tensor, keep: int) -> dict[str, float]:
    """Of one early stage by itself, on all that was retrieved for a request."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one candidate, or of ties: such a request has no say
        return {
            "top_10": ads_recall(final_1C, early_1C, min(10, final_1C.shape[1]), keep),
            "kendall": kendall_tau(final_1C, early_1C),
            "consistency": pair_consistency(final_1C, early_1C),
        }


def _mean(numbers: Sequence[float]) -> float:
    known = [number for number in numbers if not math.isnan(number)]
    return sum(known) / len(known) if known else math.nan
