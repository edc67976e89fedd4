"""How good each stage of a funnel is on a split of a log, and how good the lists are."""

# Shapes: n rows, R requests, T tasks, K list length.

from __future__ import annotations

import math
from typing import Any

import polars as pl
import torch
from torch import Tensor

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset
from fullrank.data.encoders import KEY_COLUMNS
from fullrank.data.loader import Loader, batch_from_frame
from fullrank.funnel.catalogue import NO_ROW
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.scorer import Scorer
from fullrank.funnel.stages import FINAL
from fullrank.metrics import BinaryMetrics, reliability
from fullrank.models.base import Ranker
from fullrank.retrieval import Popularity, item_keys
from fullrank.retrieval.base import Items
from fullrank.retrieval.exact import top_k

ROWS_AT_ONCE = 16_384
REQUESTS_AT_ONCE = 256


def evaluate_funnel(
    funnel: Funnel | Scorer, dataset: Dataset, split: str = "test", *, requests: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Metrics of every stage on one split; a single ranker counts as a final stage, and there are no recalls.

    Args:
        requests: clicked rows, drawn at random, for the recalls.

    Returns:
        `stages.<stage>.<task>`, the stage being `final` or an early one: what `BinaryMetrics.compute` gives; with the
        simulator's true probabilities also `oracle_ne`, `oracle_auc` and `gap_closed`, the share of the way from
        predicting the mean (NE 1) to the oracle. `calibration_curve`: predicted and observed click rate of ten equal
        bins.
        `recall`: share of the clicked items, among those that may be retrieved, that are in the first 100 of
        retrieval (and of the most clicked items), among all that retrieval hands on, among those that each early stage
        keeps, and in the final list. The later stages sort by value, not by click, so they do drop cheap clicks.
        `early_recall`: how well the early stages stand in for the final one, which for this scores everything that was
        retrieved: share of its 10 most valuable items that they keep, and of their value.
        `cost`: items that retrieval scored for a request: `mean` and `largest`.

    Raises:
        ValueError: if the dataset has another schema or was encoded by other encoders than the funnel's, or has no
            such split.
    """
    check_same_encoding(funnel, dataset)
    if dataset.rows(split) == 0:
        raise ValueError(f'{dataset.path}: split "{split}" is empty')
    report: dict[str, Any] = {"split": split, "rows": dataset.rows(split), "stages": {}}
    oracle = _oracle(dataset, split)
    models: dict[str, Ranker] = {} if isinstance(funnel, Scorer) else dict(funnel.early)
    models[FINAL] = funnel.model if isinstance(funnel, Scorer) else funnel.final
    for stage, model in models.items():
        metrics, logits_n, labels_n = _rows(model, dataset, split)
        for task, values in metrics.items():
            if task in oracle and not math.isnan(oracle[task]["ne"]):
                values["oracle_ne"], values["oracle_auc"] = oracle[task]["ne"], oracle[task]["auc"]
                values["gap_closed"] = (1 - values["ne"]) / (1 - values["oracle_ne"])
        report["stages"][stage] = metrics
        if stage == FINAL and logits_n.numel():
            curve = reliability(logits_n, labels_n, bins=10)
            report["calibration_curve"] = {
                "predicted": curve.predicted_K.tolist(),
                "observed": curve.observed_K.tolist(),
                "rows": curve.rows_K.tolist(),
            }
    if isinstance(funnel, Funnel):
        report["recall"], report["cost"] = _recall(funnel, dataset, split, requests, seed)
        report["early_recall"] = _early_recall(funnel, dataset, split, max(1, requests // 20), seed)
    return report


def check_same_encoding(funnel: Funnel | Scorer, dataset: Dataset) -> None:
    """Raises:
    ValueError: if ids in the dataset do not mean what they mean to the funnel.
    """
    if not funnel.encoders.agrees_with(dataset.encoders):
        raise ValueError(
            f"{dataset.path} has another schema or other vocabularies than the bundle: import a later log with "
            "`fullrank data import ... --like BUNDLE`"
        )


def _early_recall(funnel: Funnel, dataset: Dataset, split: str, requests: int, seed: int) -> dict[str, float]:
    drawn = clicked_requests(dataset, split, requests, seed) if funnel.early else None
    if drawn is None:
        return {}
    users = drawn[0]
    shares: list[float] = []
    best, reached, lowest = 0.0, 0.0, math.inf
    for row in range(len(users)):
        items_1C, values = funnel.stage_values(users[row : row + 1])
        there_C = items_1C[0] != NO_ROW
        if not bool(there_C.any()):
            continue
        final_C = values.pop(FINAL)[0, there_C].double()
        kept_C = torch.arange(final_C.numel())
        for value_1C, keep in zip(values.values(), funnel.sizes.keeps(len(values)), strict=True):
            kept_C = kept_C[top_k(value_1C[:, there_C][:, kept_C], keep)[1][0]]
        best_C = top_k(final_C[None], 10)[1][0]
        shares.append(float(torch.isin(best_C, kept_C).double().mean()))
        lowest = min(lowest, float(final_C.min()))
        best += float(final_C[best_C].sum())
        reached += float(top_k(final_C[kept_C][None], 10)[0].sum())
    result = {"requests": float(len(users)), "top_10": sum(shares) / len(shares) if shares else math.nan}
    if lowest >= 0 and best > 0:
        result["value_of_top_10"] = reached / best
    return result


@torch.inference_mode()
def _rows(model: Ranker, dataset: Dataset, split: str) -> tuple[dict[str, dict[str, float]], Tensor, Tensor]:
    """Metrics of each binary task, and logits and labels of the first of them, unobserved rows left out."""
    binary = [(i, label.name) for i, label in enumerate(dataset.schema.labels) if label.kind == "binary"]
    metrics = {name: BinaryMetrics() for _, name in binary}
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in Loader(dataset, split, ROWS_AT_ONCE):
        logits_BT = model(batch).logits_BT
        for task, name in binary:
            metrics[name].update(logits_BT[:, task], batch.labels_BT[:, task], batch.weights_B, batch.user_B)
        if binary:
            label_B = batch.labels_BT[:, binary[0][0]]
            seen_B = ~label_B.isnan()
            logits.append(logits_BT[seen_B, binary[0][0]])
            labels.append(label_B[seen_B])
    empty = torch.zeros(0)
    return (
        {name: metric.compute() for name, metric in metrics.items()},
        torch.cat(logits) if logits else empty,
        torch.cat(labels) if labels else empty,
    )


def _oracle(dataset: Dataset, split: str) -> dict[str, dict[str, float]]:
    """Metrics of the true probabilities, where the dataset has them."""
    names = dataset.scan(split).collect_schema().names()
    weight = KEY_COLUMNS["weight"]
    result = {}
    for label in dataset.schema.labels:
        if f"__true_{label.name}" not in names:
            continue
        columns = [f"__true_{label.name}", label.name, *([weight] if weight in names else [])]
        frame = dataset.scan(split).select(columns).collect()
        metric = BinaryMetrics()
        p = torch.from_numpy(frame[columns[0]].to_numpy().copy()).double().clamp(1e-9, 1 - 1e-9)
        observed = torch.from_numpy(frame[label.name].fill_null(float("nan")).to_numpy().copy())
        weights = torch.from_numpy(frame[weight].to_numpy().copy()) if weight in names else None
        metric.update(torch.logit(p), observed, weights)
        result[label.name] = metric.compute()
    return result


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


def _recall(
    funnel: Funnel, dataset: Dataset, split: str, requests: int, seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    drawn = clicked_requests(dataset, split, requests, seed)
    if drawn is None:
        return {}, {}
    users, frame = drawn
    wanted_R = item_keys(frame[KEY_COLUMNS["item_id"]])
    retrievable_R = torch.isin(wanted_R, funnel.items.keys_I[funnel.items.active_I])
    popularity = Popularity(dataset.schema).fit(dataset)
    active_I = funnel.items.active_I
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
        hits = {
            "retrieval_at_100": retrieved_BC[:, :100] == wanted_B1,
            "popularity_at_100": popular_K[None] == wanted_B1,
            "retrieval": retrieved_BC[:, : sizes.retrieve] == wanted_B1,
            **{stage: keys_of(ranking.passed[stage]) == wanted_B1 for stage in funnel.early},
            "final_at_100": ranked_BK == wanted_B1,
            "final_at_10": ranked_BK[:, :10] == wanted_B1,
        }
        for name, hit in hits.items():
            found.setdefault(name, []).append(hit.any(1))
    result = {"requests": float(len(users)), "retrievable": float(retrievable_R.double().mean())}
    for name, parts in found.items():
        # An item that may not be retrieved cannot be found: that is the catalogue's matter, not the model's.
        result[name] = float(torch.cat(parts)[retrievable_R].double().mean())
    cost_R = torch.cat(costs)
    return result, {"mean": float(cost_R.double().mean()), "largest": float(cost_R.max())}
