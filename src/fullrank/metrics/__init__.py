"""How good predictions and rankings are; every definition with its source and its oracle in the tests."""

from fullrank.metrics.agreement import ads_recall, kendall_tau, pair_consistency, value_recall
from fullrank.metrics.area import GroupedAUC, auc, gauc
from fullrank.metrics.binary import (
    Reliability,
    calibration,
    expected_calibration_error,
    log_loss,
    normalized_entropy,
    normalized_entropy_gain,
    relative_information_gain,
    reliability,
)
from fullrank.metrics.binned import BinnedMetrics
from fullrank.metrics.off_policy import LoggedSlates, OffPolicy, check_distributions, off_policy
from fullrank.metrics.ranking import ndcg_at_k, ranked_ndcg_at_k, recall_at_k
from fullrank.metrics.resampling import BinaryRows, Bootstrap, MeanRows, NumberRows, bootstrap
from fullrank.metrics.streaming import BinaryMetrics

__all__ = [
    "BinaryMetrics",
    "BinaryRows",
    "BinnedMetrics",
    "Bootstrap",
    "GroupedAUC",
    "LoggedSlates",
    "MeanRows",
    "NumberRows",
    "OffPolicy",
    "Reliability",
    "ads_recall",
    "auc",
    "bootstrap",
    "calibration",
    "check_distributions",
    "expected_calibration_error",
    "gauc",
    "kendall_tau",
    "log_loss",
    "ndcg_at_k",
    "normalized_entropy",
    "normalized_entropy_gain",
    "off_policy",
    "pair_consistency",
    "ranked_ndcg_at_k",
    "recall_at_k",
    "relative_information_gain",
    "reliability",
    "value_recall",
]
