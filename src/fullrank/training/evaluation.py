"""Metrics of a ranker on held-out batches."""

# Shapes: B rows, T tasks.

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fullrank.batch import Batch
from fullrank.metrics import BinaryMetrics
from fullrank.metrics.binary import cross_entropy
from fullrank.models import Ranker
from fullrank.schema import Label


class TaskMetrics:
    """Metrics of each label of a schema, gathered batch by batch; unobserved (NaN) labels are left out."""

    def __init__(self, labels: Sequence[Label]) -> None:
        self.labels = tuple(labels)
        self._binary = {label.name: BinaryMetrics() for label in labels if label.kind == "binary"}
        # Rows, sum of weights, weighted sums of label and of squared error.
        self._sums = {label.name: torch.zeros(4, dtype=torch.float64) for label in labels if label.kind == "regression"}

    def update(self, logits_BT: Tensor, batch: Batch) -> None:
        """Count the rows of a batch, whose predictions are on the CPU."""
        for task, label in enumerate(self.labels):
            logit_B, label_B = logits_BT[:, task], batch.labels_BT[:, task]
            if label.name in self._binary:
                self._binary[label.name].update(logit_B, label_B, batch.weights_B, batch.user_B)
                continue
            seen_B = ~label_B.isnan()
            value_B, error_B = label_B[seen_B].double(), (logit_B - label_B)[seen_B].double()
            weight_B = torch.ones_like(value_B) if batch.weights_B is None else batch.weights_B[seen_B].double()
            parts = (torch.ones_like(value_B), weight_B, weight_B * value_B, weight_B * error_B.square())
            self._sums[label.name] += torch.stack([part.sum() for part in parts])

    def of(self, label: Label) -> dict[str, float]:
        """What `evaluate` gives of one label.

        Raises:
            ValueError: if it has no row.
        """
        if label.name in self._binary:
            return self._binary[label.name].compute()
        rows, mass, total, squares = self._sums[label.name].tolist()
        if mass == 0:
            raise ValueError("a metric needs at least one row")
        return {"rows": rows, "rate": total / mass, "mse": squares / mass}


def evaluate(model: Ranker, batches: Iterable[Batch]) -> dict[str, dict[str, float]]:
    """Metrics of each label, in float32 and evaluation mode; unobserved (NaN) labels are left out.

    Returns:
        For a binary label what `BinaryMetrics.compute` gives (`gauc` where rows have users); for a regression label
        `rows`, `rate` (its mean) and `mse`.

    Raises:
        ValueError: if there are no batches, or the model gives NaN.
    """
    metrics = TaskMetrics(model.schema.labels)
    observe(model, batches, metrics)
    return {label.name: metrics.of(label) for label in metrics.labels}


class PairedLosses:
    """How much worse one model is than another on the same rows of a label, and how sure that is.

    The loss is cross-entropy, of a number the squared error. Rows count as independent, and equally.
    """

    def __init__(self, label: Label) -> None:
        self.label = label
        self._rows, self._sum, self._squares = 0, 0.0, 0.0

    def update(self, one_B: Tensor, other_B: Tensor, labels_B: Tensor) -> None:
        """Count rows by the logits of both models; those without a label are left out."""
        seen_B = ~labels_B.isnan()
        one, other, label = one_B[seen_B].double(), other_B[seen_B].double(), labels_B[seen_B].double()
        if self.label.kind == "binary":
            worse = cross_entropy(one, label) - cross_entropy(other, label)
        else:
            worse = (one - label).square() - (other - label).square()
        self._rows += len(worse)
        self._sum += float(worse.sum())
        self._squares += float(worse.square().sum())

    @property
    def standard_errors(self) -> float:
        """By how many standard errors the mean loss of the one is above that of the other; NaN of less than two rows
        or of models that do not differ."""
        if self._rows < 2:
            return math.nan
        mean = self._sum / self._rows
        variance = (self._squares / self._rows - mean**2) / (self._rows - 1)
        return mean / math.sqrt(variance) if variance > 0 else math.nan


@torch.inference_mode()
def observe(model: Ranker, batches: Iterable[Batch], metrics: TaskMetrics) -> Tensor:
    """Let metrics gather what a model says of some batches, in float32 and evaluation mode: its logits (n, T)."""
    training = model.training
    device = next(iter(model.parameters())).device
    said: list[Tensor] = []
    model.eval()
    try:
        for batch in batches:
            said.append(model(batch if batch.device == device else batch.to(device)).logits_BT.cpu())
            metrics.update(said[-1], batch)
    finally:
        model.train(training)
    return torch.cat(said) if said else torch.empty(0, len(metrics.labels))
