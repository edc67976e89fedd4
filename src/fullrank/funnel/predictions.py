"""What a ranker says of every row of a split, and how good and how sure that is."""

# Shapes: n rows, B rows of a batch, T tasks.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fullrank.data.dataset import Dataset
from fullrank.data.loader import Loader
from fullrank.metrics import BinaryMetrics, BinaryRows, Bootstrap, NumberRows
from fullrank.models.base import Ranker
from fullrank.schema import Label

ROWS_AT_ONCE = 16_384

# Metrics that get an interval, by kind of label.
WITH_INTERVAL = {"binary": ("ne", "auc", "calibration"), "regression": ("rmse", "mae")}


@dataclass(frozen=True)
class Predictions:
    """Logits of a ranker beside labels, weights and users, in the dataset's order.

    Attributes:
        labels: the tasks.
        logits_nT: float32; of a regression label the number itself.
        labels_nT: float32; NaN where a label was not observed.
        weights_n: None for equal weights.
        user_n: int64 keys; None where the log names no users.
    """

    labels: tuple[Label, ...]
    logits_nT: Tensor
    labels_nT: Tensor
    weights_n: Tensor | None
    user_n: Tensor | None

    @property
    def resampled(self) -> str:
        """What intervals resample."""
        return "rows" if self.user_n is None else "users"

    def observed(self, task: int) -> Tensor:
        """Whether each row has the label, shape (n,)."""
        return ~self.labels_nT[:, task].isnan()

    def rows(
        self, task: int, chosen_n: Tensor | None = None, *, logits_n: Tensor | None = None
    ) -> BinaryRows | NumberRows:
        """The observed rows of a task, those of a user together, to be resampled.

        Args:
            chosen_n: bool, to leave other rows out.
            logits_n: other predictions than the ranker's.

        Raises:
            ValueError: if no row is left.
        """
        seen_n = self.observed(task) if chosen_n is None else self.observed(task) & chosen_n
        logits_n = self.logits_nT[:, task] if logits_n is None else logits_n
        weights, users = (None if column is None else column[seen_n] for column in (self.weights_n, self.user_n))
        kind = BinaryRows if self.labels[task].kind == "binary" else NumberRows
        return kind(logits_n[seen_n], self.labels_nT[seen_n, task], weights, users)

    def metrics(self, task: int) -> dict[str, float]:
        """What `BinaryMetrics` gives, or of a number `rows`, what `NumberRows` gives, and `std`: the standard deviation
        of the labels, which is the `rmse` of predicting their mean."""
        if self.labels[task].kind == "binary":
            binary = BinaryMetrics()
            binary.update(self.logits_nT[:, task], self.labels_nT[:, task], self.weights_n, self.user_n)
            return binary.compute()
        rows = self.rows(task)
        found = rows.estimate()
        mean_n = torch.full((len(self.logits_nT),), found["mean"], dtype=torch.float64)
        return {"rows": float(rows.rows), **found, "std": self.rows(task, logits_n=mean_n).estimate()["rmse"]}


@torch.inference_mode()
def predictions(model: Ranker, dataset: Dataset, split: str, labels: Sequence[Label]) -> Predictions:
    """Run a ranker over a split.

    Args:
        labels: of the dataset and of the ranker, those to have predictions of.
    """

    def columns(known: Sequence[Label]) -> list[int]:
        return [[label.name for label in known].index(label.name) for label in labels]

    of_model, of_dataset = columns(model.schema.labels), columns(dataset.schema.labels)
    logits, observed, weights, users = [], [], [], []
    for batch in Loader(dataset, split, ROWS_AT_ONCE, extra=tuple(dataset.extra)):
        logits.append(model(batch).logits_BT[:, of_model])
        observed.append(batch.labels_BT[:, of_dataset])
        weights.append(batch.weights_B)
        users.append(batch.user_B)
    return Predictions(tuple(labels), torch.cat(logits), torch.cat(observed), _joined(weights), _joined(users))


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def intervals(drawn: Bootstrap) -> dict[str, list[float]]:
    """The 95 % interval of each metric that gets one."""
    wanted = [metric for metrics in WITH_INTERVAL.values() for metric in metrics if metric in drawn.estimate]
    return {metric: list(drawn.interval(metric)) for metric in wanted}
