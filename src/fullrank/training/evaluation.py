"""Metrics of a ranker on held-out batches."""

# Shapes: B rows, T tasks.

from __future__ import annotations

from collections.abc import Iterable

import torch

from fullrank.batch import Batch
from fullrank.metrics import BinaryMetrics
from fullrank.models import Ranker


@torch.inference_mode()
def evaluate(model: Ranker, batches: Iterable[Batch]) -> dict[str, dict[str, float]]:
    """Metrics of each label, in float32 and evaluation mode; unobserved (NaN) labels are left out.

    Returns:
        For a binary label what `BinaryMetrics.compute` gives (`gauc` where rows have users); for a regression label
        `rows`, `rate` (its mean) and `mse`.

    Raises:
        ValueError: if there are no batches, or the model gives NaN.
    """
    training = model.training
    device = next(iter(model.parameters())).device
    labels = model.schema.labels
    binary = {label.name: BinaryMetrics() for label in labels if label.kind == "binary"}
    # Rows, sum of weights, weighted sums of label and of squared error.
    sums = {label.name: torch.zeros(4, dtype=torch.float64) for label in labels if label.kind == "regression"}
    model.eval()
    try:
        for batch in batches:
            logits_BT = model(batch if batch.device == device else batch.to(device)).logits_BT.cpu()
            for task, label in enumerate(labels):
                logit_B, label_B = logits_BT[:, task], batch.labels_BT[:, task]
                if label.name in binary:
                    binary[label.name].update(logit_B, label_B, batch.weights_B, batch.user_B)
                    continue
                seen_B = ~label_B.isnan()
                value_B, error_B = label_B[seen_B].double(), (logit_B - label_B)[seen_B].double()
                weight_B = torch.ones_like(value_B) if batch.weights_B is None else batch.weights_B[seen_B].double()
                parts = (torch.ones_like(value_B), weight_B, weight_B * value_B, weight_B * error_B.square())
                sums[label.name] += torch.stack([part.sum() for part in parts])
    finally:
        model.train(training)
    results: dict[str, dict[str, float]] = {}
    for label in labels:
        if label.name in binary:
            results[label.name] = binary[label.name].compute()
        else:
            rows, mass, total, squares = sums[label.name].tolist()
            if mass == 0:
                raise ValueError("a metric needs at least one row")
            results[label.name] = {"rows": rows, "rate": total / mass, "mse": squares / mass}
    return results
