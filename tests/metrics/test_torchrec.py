"""The same values as TorchRec's metrics, where its definitions are the same."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from fullrank import metrics

try:  # A broken FBGEMM raises OSError on import.
    from torchrec.metrics.auc import compute_auc
    from torchrec.metrics.calibration import compute_calibration, get_calibration_states
    from torchrec.metrics.gauc import compute_window_auc, get_auc_states
    from torchrec.metrics.metrics_config import SessionMetricDef
    from torchrec.metrics.ndcg import NDCGComputation
    from torchrec.metrics.ne import compute_logloss, compute_ne, get_ne_states
    from torchrec.metrics.recall_session import RecallSessionMetricComputation
except (ImportError, OSError) as reason:
    pytest.skip(f"torchrec is not installed: {reason}", allow_module_level=True)

ETA = 1e-12


def _data(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, generator=generator, dtype=torch.float64) * 2 - 1
    labels = (torch.rand(n, generator=generator) < torch.sigmoid(logits)).double()
    return logits, labels, torch.rand(n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_ne_log_loss_and_calibration_equal_torchrec(seed: int) -> None:
    logits, labels, weights = _data(1000, seed)
    p = torch.sigmoid(logits)
    states = get_ne_states(labels, p, weights, ETA)
    parts = [states[name] for name in ("pos_labels", "neg_labels")]
    ne = compute_ne(states["cross_entropy_sum"], states["weighted_num_samples"], *parts, ETA)
    assert metrics.normalized_entropy(logits, labels, weights) == pytest.approx(float(ne), rel=1e-9)
    # Theirs is in bits.
    bits = float(compute_logloss(states["cross_entropy_sum"], *parts, ETA))
    assert metrics.log_loss(logits, labels, weights) / torch.log(torch.tensor(2.0)).item() == pytest.approx(bits)
    sums = get_calibration_states(labels, p, weights)
    expected = compute_calibration(sums["calibration_num"], sums["calibration_denom"])
    assert metrics.calibration(logits, labels, weights) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_auc_equals_torchrec_where_nothing_ties(seed: int) -> None:
    logits, labels, weights = _data(1000, seed)
    expected = compute_auc(1, [logits[None]], [labels[None]], [weights[None]])
    assert metrics.auc(logits, labels, weights) == pytest.approx(float(expected), abs=1e-6)


def test_torchrec_lets_the_order_of_the_rows_decide_ties_and_ours_does_not() -> None:
    logits, labels = torch.zeros(6), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    theirs = [float(compute_auc(1, [logits[None]], [y[None]], [torch.ones(1, 6)])) for y in (labels, labels.flip(0))]
    assert theirs == [1.0, 0.0]
    assert metrics.auc(logits, labels) == metrics.auc(logits, labels.flip(0)) == roc_auc_score(labels, logits) == 0.5


@pytest.mark.parametrize("weighted", [False, True])
def test_uniform_gauc_equals_torchrec_where_nothing_ties(weighted: bool) -> None:
    logits, labels, weights = _data(1000, 4)
    lengths = torch.tensor([1, 2, 397, 3, 97, 500])
    groups = torch.arange(6).repeat_interleave(lengths)
    labels[groups == 3] = 1.0
    w = weights if weighted else torch.ones_like(weights)
    # It takes zero for padding, and float32 only: positive scores, in the same order.
    states = get_auc_states(labels[None].float(), torch.sigmoid(logits)[None].float(), w[None].float(), lengths)
    expected = compute_window_auc(states["auc_sum"], states["num_samples"])
    found = metrics.gauc(logits, labels, groups, weights if weighted else None, weighting="uniform")
    assert found.value == pytest.approx(float(expected["gauc"]), abs=1e-6)
    assert found.groups_used == int(expected["num_samples"]) and found.groups == 6


@pytest.mark.parametrize("exponential", [False, True])
def test_ndcg_equals_torchrec(exponential: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    scores = torch.rand(12, 9, generator=generator, dtype=torch.float64)
    relevance = torch.randint(0, 4, (12, 9), generator=generator).double()
    relevance[3] = torch.eye(9, dtype=torch.float64)[2]
    gains = 2**relevance - 1 if exponential else relevance
    sessions = torch.arange(12).repeat_interleave(9)[None]
    for k in (1, 4, 9):
        theirs = NDCGComputation(
            0, 108, 1, 108, exponential_gain=exponential, k=k, report_ndcg_as_decreasing_curve=False
        )
        theirs.update(
            predictions=scores.reshape(1, -1),
            labels=relevance.reshape(1, -1),
            weights=torch.ones(1, 108),
            required_inputs={"session_id": sessions},
        )
        expected = float(theirs.compute()[0].value)
        assert metrics.ndcg_at_k(scores, gains, k) == pytest.approx(expected, abs=1e-6)


def test_recall_equals_torchrecs_session_recall() -> None:
    generator = torch.Generator().manual_seed(6)
    scores = torch.rand(1, 40, generator=generator, dtype=torch.float64)
    labels = (torch.rand(1, 40, generator=generator) < 0.3).double()
    relevant = labels[0].nonzero().T
    for k in (1, 7, 39):
        definition = SessionMetricDef(session_var_name="session", top_threshold=k)
        theirs = RecallSessionMetricComputation(0, 40, 1, 40, session_metric_def=definition)
        theirs.update(
            predictions=scores,
            labels=labels,
            weights=torch.ones(1, 40),
            required_inputs={"session": torch.zeros(1, 40)},
        )
        expected = float(theirs.compute()[0].value)
        assert metrics.recall_at_k(scores.argsort(1, descending=True), relevant, k) == pytest.approx(expected, abs=1e-6)
