"""Metrics of a ranker on held-out batches."""

# Shapes: B rows, T tasks.

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fullrank.batch import Batch
from fullrank.metrics import BinaryMetrics
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


@torch.inference_mode()
def observe(model: Ranker, batches: Iterable[Batch], metrics: TaskMetrics) -> None:
    """Let metrics gather what a model says of some batches, in float32 and evaluation mode."""
    training = model.training
    device = next(iter(model.parameters())).device
    model.eval()
    try:
        for batch in batches:
            metrics.update(model(batch if batch.device == device else batch.to(device)).logits_BT.cpu(), batch)
    finally:
        model.train(training)
