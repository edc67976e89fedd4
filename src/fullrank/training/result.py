"""What a fit leaves beside the weights: sizes, speed, and what was seen on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fullrank.training.precision import Precision

# What a point of `TrainingResult.history` has beside the metrics of its validation.
ABOUT_POINT = ("epoch", "step", "train_loss", "learning_rate")


@dataclass
class TrainingResult:
    """What happened.

    Attributes:
        steps: of the whole run, those before a resume included.
        epochs: finished ones.
        seconds: wall time of `fit`.
        precision: of the matrix products, `float32`, `bfloat16` or `bfloat16_emulated`.
        samples_per_second: rows per second over the training steps of this call, loading included, without
            validations, checkpoints and the first ten steps.
        history: a point for each validation, in order: its metrics of the first label, and `epoch`, `step`,
            `learning_rate` and `train_loss`, the mean over the steps since the point before. Without a validation part
            the points are where one would have been, and have no metrics.
        monitor: the metric that chose the best validation.
        best: the best point by the monitored metric, whose weights the model has now; empty without validation.
        best_tasks: that validation's metrics of every label, as `evaluate` gives them.
    """

    steps: int
    epochs: int
    seconds: float
    samples_per_second: float
    precision: Precision
    stopped_early: bool
    history: list[dict[str, float]] = field(default_factory=list)
    monitor: str = ""
    best: dict[str, float] = field(default_factory=dict)
    best_tasks: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def train_loss(self) -> float:
        """Of the last point; NaN where there is none."""
        return self.history[-1]["train_loss"] if self.history else math.nan

    @property
    def curve(self) -> list[dict[str, Any]]:
        """`history` as reports have it: `step`, `epoch`, `loss`, and the metrics under `valid`."""
        return [
            {
                "step": int(point["step"]),
                "epoch": point["epoch"],
                "loss": point["train_loss"],
                "valid": {name: value for name, value in point.items() if name not in ABOUT_POINT},
            }
            for point in self.history
        ]


def learning_curves(results: Mapping[str, TrainingResult]) -> dict[str, Any]:
    """How each stage learnt, as `metrics.json` has it.

    Returns:
        `curves`, `monitor` and `best_step` by stage; `best_step` of those that were validated.
    """
    return {
        "curves": {stage: result.curve for stage, result in results.items()},
        "monitor": {stage: result.monitor for stage, result in results.items()},
        "best_step": {stage: int(result.best["step"]) for stage, result in results.items() if result.best},
    }
