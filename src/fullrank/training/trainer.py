"""The training loop. It knows batches and losses, and no architecture."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.embeddings import EmbeddingCollection, EmbeddingOptimizer
from fullrank.metrics import BinaryMetrics
from fullrank.models import Ranker
from fullrank.training import checkpoint


class TrainerConfig(BaseModel):
    """How to fit.

    Attributes:
        schedule: `constant`; `linear` falls from the learning rate to zero over all steps; `plateau` multiplies it by
            `plateau_factor` whenever the monitored metric did not improve on the validation set.
        patience: stop after so many validations without improvement; 0 never stops early.
        monitor: metric of the first label on the validation set; `auc` and `gauc` are to rise, the others to fall.
        gradient_clip: largest L2 norm of the gradient of all dense parameters (kind `dense` tables included).
            It matters with batch norm on small initial embeddings: the first gradients are hundreds of times larger
            than later ones and would fill Adam's second moment for the rest of the epoch.
        precision: `bfloat16` computes matrix products of the training steps in bfloat16 (weights, optimiser state,
            logits, loss and all evaluation stay float32).
        checkpoint_every: steps between checkpoints; 0 for one at the end of each epoch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=4096, ge=1)
    optimizer: Literal["adam", "adagrad", "sgd"] = "adam"
    learning_rate: float = Field(default=1e-3, gt=0)
    schedule: Literal["constant", "linear", "plateau"] = "constant"
    plateau_factor: float = Field(default=0.1, gt=0, lt=1)
    patience: int = Field(default=2, ge=0)
    monitor: Literal["auc", "gauc", "logloss", "ne"] = "auc"
    gradient_clip: float | None = Field(default=10.0, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    seed: int = 0
    checkpoint_every: int = Field(default=0, ge=0)
    keep_checkpoints: int = Field(default=2, ge=1)
    tensorboard: bool = False


class Batches(Protocol):
    """What `fit` trains on: a `Loader`, or anything sized that iterates over an epoch and can resume."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Any: ...
    def state(self) -> dict[str, int]: ...
    def restore(self, state: dict[str, int]) -> None: ...


class Callback:
    """Sees what the trainer does; the only extension point."""

    def after_step(self, step: int, loss: Tensor) -> None:
        """`loss` is detached; reading its value waits for nothing on CPU."""

    def after_validation(self, step: int, metrics: dict[str, float]) -> None: ...


@dataclass
class TrainingResult:
    """What happened.

    Attributes:
        history: metrics of each validation, in order.
        best: the best of them by the monitored metric, whose weights the model has now.
        samples_per_second: rows per second over the training steps, without validation, without the first ten.
        seconds: wall time of `fit`.
    """

    steps: int
    epochs: int
    seconds: float
    samples_per_second: float
    stopped_early: bool
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def evaluate(model: Ranker, batches: Iterable[Batch]) -> dict[str, dict[str, float]]:
    """Metrics of each binary label, in float32 and evaluation mode."""
    training = model.training
    model.eval()
    labels = model.schema.labels
    metrics = {label.name: BinaryMetrics() for label in labels if label.kind == "binary"}
    for batch in batches:
        logits_BT = model(batch).logits_BT
        for task, label in enumerate(labels):
            if label.name in metrics:
                metrics[label.name].update(logits_BT[:, task], batch.labels_BT[:, task], batch.weights_B, batch.user_B)
    model.train(training)
    return {name: metric.compute() for name, metric in metrics.items()}


class Trainer:
    """Fits a ranker to a loader.

    Args:
        embedding: how tables learn; kind `dense` hands them to the dense optimiser.
        callbacks: called in order.
    """

    def __init__(
        self,
        config: TrainerConfig,
        embedding: EmbeddingOptimizer | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = config
        self.embedding = embedding or EmbeddingOptimizer()
        self.callbacks = list(callbacks)

    def fit(
        self,
        model: Ranker,
        train: Batches,
        valid: Iterable[Batch] | None = None,
        *,
        run_directory: Path | None = None,
        resume: bool = False,
        progress: Callable[[int, int, float], None] | None = None,
    ) -> TrainingResult:
        """Train until the epochs are over or the validation metric stops improving.

        Args:
            run_directory: where checkpoints go; none are written without it.
            resume: continue from the newest whole checkpoint of `run_directory`, to weights that equal those of a run
                that was never interrupted, bit for bit.
            progress: called with step, number of steps and the latest loss, at most every second.

        Raises:
            ValueError: if the loss becomes NaN or infinite; names the step.
        """
        run = _Run(self, model, train, valid, run_directory, progress)
        if resume and run_directory is not None:
            run.resume()
        return run.go()


class _Run:
    def __init__(
        self,
        trainer: Trainer,
        model: Ranker,
        train: Batches,
        valid: Iterable[Batch] | None,
        run_directory: Path | None,
        progress: Callable[[int, int, float], None] | None,
    ) -> None:
        self.config = trainer.config
        self.model, self.train, self.valid = model, train, valid
        self.callbacks = [*trainer.callbacks]
        self.checkpoints = None if run_directory is None else run_directory / "checkpoints"
        if self.config.tensorboard and run_directory is not None:
            self.callbacks.append(_TensorBoard(run_directory / "tensorboard"))
        self.progress = progress
        self.collections = {
            name: module for name, module in model.named_modules() if isinstance(module, EmbeddingCollection)
        }
        for collection in self.collections.values():
            collection.set_optimizer(trainer.embedding)
        self.embedding_rate = trainer.embedding.learning_rate
        self.fused_tables = trainer.embedding.kind != "dense"
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = self._dense_optimizer()
        self.step = 0
        self.epoch = 0
        self.factor = 1.0
        self.bad_validations = 0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self.best_state: dict[str, Tensor] | None = None
        self.stopped = False
        self.total_steps = self.config.epochs * len(train)

    def _dense_optimizer(self) -> torch.optim.Optimizer:
        rate, on_cpu = self.config.learning_rate, all(p.device.type == "cpu" for p in self.parameters)
        if self.config.optimizer == "adam":
            return torch.optim.Adam(self.parameters, lr=rate, fused=on_cpu)
        if self.config.optimizer == "adagrad":
            return torch.optim.Adagrad(self.parameters, lr=rate, fused=on_cpu)
        return torch.optim.SGD(self.parameters, lr=rate)

    # The loop

    def go(self) -> TrainingResult:
        begin = time.perf_counter()
        self.model.train()
        forward: Any = torch.compile(self.model) if self.config.compile else self.model
        rows, stepping, steps_timed = 0, 0.0, 0
        last_report = begin
        while self.epoch < self.config.epochs and not self.stopped:
            mark = time.perf_counter()
            for batch in self.train:
                loss = self._train_step(forward, batch)
                now = time.perf_counter()
                steps_timed += 1
                if steps_timed > 10:
                    rows += len(batch)
                    stepping += now - mark
                mark = now
                if self.progress is not None and now - last_report > 1:
                    last_report = now
                    self.progress(self.step, self.total_steps, float(loss))
                if self.checkpoints is not None and self.config.checkpoint_every:
                    if self.step % self.config.checkpoint_every == 0:
                        self._save()
                    mark = time.perf_counter()
            self.epoch += 1
            self._validate()
            if self.checkpoints is not None:
                self._save()
        if self.best_state is not None:
            self.model.load_state_dict(self.best_state)
        self.model.eval()
        for callback in self.callbacks:
            if isinstance(callback, _TensorBoard):
                callback.close()
        return TrainingResult(
            steps=self.step,
            epochs=self.epoch,
            seconds=time.perf_counter() - begin,
            samples_per_second=rows / stepping if stepping else math.nan,
            stopped_early=self.stopped,
            history=self.history,
            best=self.best,
        )

    def _train_step(self, forward: Any, batch: Batch) -> Tensor:
        self._set_rates()
        half = self.config.precision == "bfloat16"
        with torch.autocast(batch.device.type, torch.bfloat16) if half else nullcontext():
            output = forward(batch)
        loss = self.model.loss(output, batch)
        detached = loss.detach()
        if not math.isfinite(float(detached)):
            raise ValueError(
                f"the loss is {float(detached)} at step {self.step + 1}: lower the learning rate, or look for extreme "
                "numbers in the data"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        for collection in self.collections.values():
            collection.before_step()
        if self.config.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for collection in self.collections.values():
            collection.after_step()
        self.step += 1
        for callback in self.callbacks:
            callback.after_step(self.step, detached)
        return detached

    def _set_rates(self) -> None:
        factor = self.factor
        if self.config.schedule == "linear":
            factor *= 1 - self.step / self.total_steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor
        if self.fused_tables:
            for collection in self.collections.values():
                collection.set_learning_rate(self.embedding_rate * factor)

    def _validate(self) -> None:
        if self.valid is None:
            return
        first = self.model.schema.labels[0].name
        metrics = evaluate(self.model, self.valid)
        values = {**metrics[first], "epoch": float(self.epoch), "step": float(self.step)}
        self.history.append(values)
        sign = 1 if self.config.monitor in ("auc", "gauc") else -1
        value = sign * values.get(self.config.monitor, math.nan)
        previous = sign * self.best[self.config.monitor] if self.best else -math.inf
        if value > previous + 1e-6 or not self.best:
            self.best, self.bad_validations = values, 0
            self.best_state = copy.deepcopy(self.model.state_dict())
        else:
            self.bad_validations += 1
            if self.config.schedule == "plateau":
                self.factor *= self.config.plateau_factor
            self.stopped = 0 < self.config.patience <= self.bad_validations
        for callback in self.callbacks:
            callback.after_validation(self.step, values)

    # Checkpoints

    def _save(self) -> None:
        assert self.checkpoints is not None
        tensors = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        if self.best_state is not None:
            tensors.update({f"best.{key}": value for key, value in self.best_state.items()})
        for index, parameter in enumerate(self.parameters):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
        for name, collection in self.collections.items():
            tensors.update({f"tables.{name}|{key}": v for key, v in collection.optimizer_state().items()})
        tensors["rng"] = torch.get_rng_state()
        about = {
            "loader": self.train.state(),
            "epoch": self.epoch,
            "factor": self.factor,
            "bad_validations": self.bad_validations,
            "history": self.history,
            "best": self.best,
            "stopped": self.stopped,
            "config": self.config.model_dump(mode="json"),
        }
        checkpoint.write(self.checkpoints, self.step, tensors, about, keep=self.config.keep_checkpoints)

    def resume(self) -> None:
        assert self.checkpoints is not None
        found = checkpoint.latest(self.checkpoints)
        if found is None:
            return
        tensors, about = found
        if about["config"] != self.config.model_dump(mode="json"):
            raise ValueError(
                f"{self.checkpoints} was written with another training configuration; resume with the same recipe, or "
                "start anew in another directory"
            )

        def part(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        best = part("best.")
        self.best_state = best or None
        for index, parameter in enumerate(self.parameters):
            state = part(f"optimizer.{index}.")
            if state:
                self.optimizer.state[parameter] = state
        for name, collection in self.collections.items():
            collection.load_optimizer_state(part(f"tables.{name}|"))
        torch.set_rng_state(tensors["rng"])
        self.step, self.epoch, self.factor = about["step"], about["epoch"], about["factor"]
        self.bad_validations, self.stopped = about["bad_validations"], about["stopped"]
        self.history, self.best = about["history"], about["best"]
        self.train.restore(about["loader"])


class _TensorBoard(Callback):
    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("training.tensorboard needs tensorboard: pip install fullrank[report]") from None
        self.writer: Any = SummaryWriter(str(directory))

    def after_step(self, step: int, loss: Tensor) -> None:
        if step % 20 == 0:
            self.writer.add_scalar("train/loss", float(loss), step)

    def after_validation(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(f"valid/{name}", value, step)

    def close(self) -> None:
        self.writer.close()
