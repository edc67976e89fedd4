"""When to lower the learning rate and when to stop, from the validations so far."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

HIGHER_IS_BETTER = ("auc", "gauc")
# A change below this is none: the published leaderboards' tolerance.
MIN_DELTA = 1e-6


@dataclass
class Patience:
    """Watches one metric.

    The protocol of the public CTR leaderboards: each validation that does not beat the best so far multiplies the
    learning rate by `factor`; `limit` of them in a row end the training.

    Args:
        monitor: name of the metric, or several joined by "+" whose sum counts; all are to rise, or all to fall.
        factor: 1 leaves the learning rate alone.
        limit: 0 never stops.

    Attributes:
        best: the best metrics so far; empty before the first validation.
        best_step: step of that validation.
        scale: product of all factors so far.
        waited: validations since the best.
    """

    monitor: str
    factor: float = 1.0
    limit: int = 0
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = -1
    scale: float = 1.0
    waited: int = 0

    @property
    def stopped(self) -> bool:
        return 0 < self.limit <= self.waited

    def observe(self, step: int, metrics: dict[str, float]) -> bool:
        """Take note of a validation; True if it is the best so far.

        Raises:
            ValueError: if `metrics` lacks the monitored one.
        """
        for name in self.monitor.split("+"):
            if name not in metrics:
                raise ValueError(
                    f'training.monitor is "{self.monitor}", but this validation does not have {name}; it has '
                    f"{', '.join(metrics)}"
                )
        if self._beats(self._value(metrics)):
            self.best, self.best_step, self.waited = dict(metrics), step, 0
            return True
        self.waited += 1
        self.scale *= self.factor
        return False

    def _value(self, metrics: dict[str, float]) -> float:
        return sum(metrics[name] for name in self.monitor.split("+"))

    def _beats(self, value: float) -> bool:
        if not self.best:
            return True
        sign = 1 if self.monitor.split("+")[0] in HIGHER_IS_BETTER else -1
        best = self._value(self.best)
        return not math.isnan(value) and (math.isnan(best) or sign * value > sign * best + MIN_DELTA)

    def state(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)
