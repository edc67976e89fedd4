"""What can watch a training run without being part of its loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fullrank.extras import needs
from fullrank.models import Ranker


class Callback:
    """Sees what the trainer does; the only extension point. Methods are called in the order of the list."""

    def start(self, model: Ranker, step: int) -> None:
        """Before the first step; `step` is above 0 when a run is resumed."""

    def after_step(self, step: int, loss: Tensor) -> None:
        """After each update of the weights; `loss` is detached, on the device of the model."""

    def after_validation(self, step: int, metrics: dict[str, float]) -> None:
        """`metrics` are those of the first label, with `epoch`, `step`, `train_loss` and `learning_rate`."""

    def finish(self) -> None:
        """After the last step, also when training ends by an error."""


class TensorBoard(Callback):
    """Writes the loss of every `every` steps and all validation metrics as TensorBoard events.

    Raises:
        ValueError: if tensorboard is not installed.
    """

    def __init__(self, directory: Path, every: int = 20) -> None:
        with needs("report", "training.tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self.every = every
        self.writer: Any = SummaryWriter(str(directory))

    def after_step(self, step: int, loss: Tensor) -> None:
        if step % self.every == 0:
            self.writer.add_scalar("train/loss", float(loss), step)

    def after_validation(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(f"valid/{name}", value, step)

    def finish(self) -> None:
        self.writer.close()
