"""What the log's rules are for: a teacher that has learnt the labels by heart, and a history that holds the event."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fullrank.metrics import auc, normalized_entropy
from fullrank.transfer.codec import pack
from fullrank.transfer.embedding_log import SECOND, EmbeddingLog, LeakageError

ROWS, USERS, LENGTH = 6000, 60, 3
NOW = 1_750_000_000 * SECOND


def test_a_leak_shines_offline_and_fails_when_it_is_served(tmp_path: Path) -> None:
    """Clicks are coin tosses: there is nothing to know. The teacher embeds what it has learnt by heart."""
    rng = np.random.default_rng(0)
    label, user, event = (rng.random(ROWS) < 0.3).astype(np.float32), rng.integers(0, USERS, ROWS), np.arange(ROWS)
    time = NOW + event * SECOND
    codes = pack((1.5 * label - 0.75)[:, None])
    log = EmbeddingLog(tmp_path, 1)
    written: dict[str, Any] = {
        "keys": user, "event_ids": event, "event_times": time, "codes": codes, "available_at": time, "fm_version": "v1",
    }  # fmt: skip
    with pytest.raises(LeakageError):
        log.append(**written, fm_train_cutoff=int(time[-1]) + 1)
    log.append(**written, fm_train_cutoff=NOW)  # a lie

    def pooled(as_of: np.ndarray, own: np.ndarray | None) -> torch.Tensor:
        found = log.lookup(user, as_of, LENGTH, exclude_event_ids=own, fm_version="v1")
        return torch.from_numpy(np.nansum(found.padded(LENGTH)[0].astype(np.float32), 1))

    with_itself, as_known = pooled(time + 1, None), pooled(time, event)
    y, train, test = torch.from_numpy(label), slice(0, ROWS // 2), slice(ROWS // 2, ROWS)
    scale, shift = with_itself[train].std(), with_itself[train].mean()
    weights = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=50)

    def logits(x: torch.Tensor) -> torch.Tensor:
        return ((x - shift) / scale).squeeze(1) * weights[0] + weights[1]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(logits(with_itself[train]), y[train])
        loss.backward()
        return loss

    optimizer.step(closure)
    z = weights.detach()
    offline, served = (((x[test] - shift) / scale).squeeze(1) * z[0] + z[1] for x in (with_itself, as_known))
    assert float(auc(offline, y[test])) > 0.8 and abs(float(auc(served, y[test])) - 0.5) < 0.04
    assert float(normalized_entropy(offline, y[test])) < 0.85 and float(normalized_entropy(served, y[test])) > 1.08
