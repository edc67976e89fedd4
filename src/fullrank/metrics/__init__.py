"""How good predictions and rankings are; every definition with its source and its oracle in the tests."""

from fullrank.metrics.binary import (
    BinaryMetrics,
    GroupedAUC,
    auc,
    calibration,
    expected_calibration_error,
    gauc,
    log_loss,
    normalized_entropy,
    reliability,
)
from fullrank.metrics.ranking import ads_recall, ndcg_at_k, pair_consistency, recall_at_k, value_recall

__all__ = [
    "BinaryMetrics",
    "GroupedAUC",
    "ads_recall",
    "auc",
    "calibration",
    "expected_calibration_error",
    "gauc",
    "log_loss",
    "ndcg_at_k",
    "normalized_entropy",
    "pair_consistency",
    "recall_at_k",
    "reliability",
    "value_recall",
]
