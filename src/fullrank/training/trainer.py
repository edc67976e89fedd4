"""The training loop. It knows batches and losses, and no architecture."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.embeddings import EmbeddingCollection, EmbeddingOptimizer
from fullrank.models import Ranker
from fullrank.training import checkpoint
from fullrank.training.callbacks import Callback, TensorBoard
from fullrank.training.evaluation import evaluate
from fullrank.training.memory import keep_freed_memory, return_freed_memory
from fullrank.training.optimizers import DenseOptimizer
from fullrank.training.patience import Patience
from fullrank.training.precision import Precision, fastest_precision

# On an accelerator the loss is looked at this often, because looking waits for the device.
CHECK_EVERY = 50
# The first steps pay for decoding, allocation and compilation; throughput is measured after them.
WARM_UP_STEPS = 10


class TrainerConfig(BaseModel):
    """How to fit.

    Attributes:
        epochs: passes over the training rows.
        max_steps: end after so many steps even in the middle of an epoch.
        batch_size: of the loaders that `fullrank train` makes.
        optimizer: of everything but tables of a fused kind.
        learning_rate: at the start.
        schedule: `constant`; `linear` falls from the learning rate to zero over all steps; `plateau` multiplies it by
            `plateau_factor` whenever the monitored metric did not improve on the validation set.
        plateau_factor: see `schedule`.
        patience: stop after so many validations without improvement; 0 never stops early.
        monitor: metric of the first label on the validation set; `auc`, `gauc` and their sum are to rise, the others to
            fall.
        validate_every: steps between validations; 0 validates at the end of each epoch.
        gradient_clip: largest L2 norm of the gradient of all parameters of the dense optimiser (kind `dense` tables
            included). It matters with batch norm on small initial embeddings: the first gradients are hundreds of times
            larger than later ones and would fill Adam's second moment for the rest of the epoch.
        precision: `bfloat16` computes matrix products of the training steps in bfloat16 (weights, optimiser state,
            logits, loss and all evaluation stay float32); `auto` does where this machine is faster so.
        compile: run the model through `torch.compile`.
        seed: of dropout, and of the loaders and initial weights that `fullrank train` makes.
        checkpoint_every: steps between checkpoints, beside the one at each validation or end of an epoch; 0 for these
            alone.
        keep_checkpoints: how many of the newest to keep, beside the best one; 0 writes none.
        tensorboard: write events to `<run directory>/tensorboard`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=4096, ge=1)
    optimizer: Literal["adam", "adagrad", "sgd"] = "adam"
    learning_rate: float = Field(default=1e-3, gt=0)
    schedule: Literal["constant", "linear", "plateau"] = "constant"
    plateau_factor: float = Field(default=0.1, gt=0, lt=1)
    patience: int = Field(default=2, ge=0)
    monitor: Literal["auc", "gauc", "auc+gauc", "logloss", "ne", "mse"] = "auc"
    validate_every: int = Field(default=0, ge=0)
    gradient_clip: float | None = Field(default=10.0, gt=0)
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    compile: bool = False
    seed: int = 0
    checkpoint_every: int = Field(default=0, ge=0)
    keep_checkpoints: int = Field(default=2, ge=0)
    tensorboard: bool = False


class Batches(Protocol):
    """What `fit` trains on: a `Loader`, a list of batches, or anything sized that iterates over an epoch."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]: ...


@runtime_checkable
class Resumable(Protocol):
    """Batches that can begin in the middle of an epoch, as a `Loader` can."""

    def state(self) -> dict[str, int]: ...
    def restore(self, state: dict[str, int]) -> None: ...


@dataclass
class TrainingResult:
    """What happened.

    Attributes:
        steps: of the whole run, those before a resume included.
        epochs: finished ones.
        seconds: wall time of `fit`.
        precision: of the matrix products, `float32` or `bfloat16`.
        samples_per_second: rows per second over the training steps of this call, loading included, without
            validations, checkpoints and the first ten steps.
        history: metrics of each validation, in order.
        best: the best of them by the monitored metric, whose weights the model has now; empty without validation.
        best_tasks: that validation's metrics of every label, as `evaluate` gives them.
        train_loss: mean over the steps since the last validation but one (all steps when there was none).
    """

    steps: int
    epochs: int
    seconds: float
    samples_per_second: float
    precision: Precision
    stopped_early: bool
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    best_tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    train_loss: float = math.nan


class Trainer:
    """Fits a ranker.

    Args:
        embedding: how tables learn; kind `dense` hands them to the dense optimiser. Their learning rate is its
            `learning_rate`, in every kind, or else that of the rest of the model; schedules scale both alike.
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
        """Train until the epochs are over or the validation metric stops improving, then restore the best weights.

        The same model, data, configuration and number of threads give the same weights, bit for bit.

        Args:
            run_directory: where checkpoints go; none are written without it.
            resume: continue from the newest valid checkpoint of `run_directory`, to weights that equal those of a run
                that was never interrupted, bit for bit; from the start if there is none.
            progress: called with step, number of steps and the latest loss, at most every second.

        Raises:
            ValueError: if the loss becomes NaN or infinite (names the step), if the checkpoint to resume from belongs
                to another model, configuration or data, or if `run_directory` has checkpoints and `resume` is not
                asked.
        """
        return _Run(self, model, train, valid, run_directory, progress, resume).go()


class _Run:
    """The state of one `fit`."""

    def __init__(
        self,
        trainer: Trainer,
        model: Ranker,
        train: Batches,
        valid: Iterable[Batch] | None,
        run_directory: Path | None,
        progress: Callable[[int, int, float], None] | None,
        resume: bool,
    ) -> None:
        self.config, self.embedding = trainer.config, trainer.embedding
        self.model, self.train, self.valid, self.progress = model, train, valid, progress
        config = self.config
        if not len(train):
            raise ValueError("there are no batches to train on")
        self.device = next(iter(model.parameters())).device
        self.callbacks = [*trainer.callbacks]
        if config.tensorboard and run_directory is not None:
            self.callbacks.append(TensorBoard(run_directory / "tensorboard"))
        self.collections = {
            name: module for name, module in model.named_modules() if isinstance(module, EmbeddingCollection)
        }
        for collection in self.collections.values():
            collection.set_optimizer(self.embedding)
        self.table_rate = self.embedding.learning_rate or config.learning_rate
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = self._dense_optimizer()
        self.rate_scale = math.nan  # so that the first step sets the rates
        self.patience = Patience(
            config.monitor, config.plateau_factor if config.schedule == "plateau" else 1.0, config.patience
        )
        self.total_steps = min(config.epochs * len(train), config.max_steps or config.epochs * len(train))
        self.precision = fastest_precision(self.device) if config.precision == "auto" else config.precision
        self.step = self.epoch = self.batch = 0
        self.history: list[dict[str, float]] = []
        self.best_tasks: dict[str, dict[str, float]] = {}
        self.best_state: dict[str, Tensor] | None = None
        self.loss_sum, self.loss_count, self.train_loss = 0.0, 0, math.nan
        self.unchecked: list[Tensor] = []
        torch.manual_seed(config.seed)
        self.checkpoints: Path | None = None
        if run_directory is not None and config.keep_checkpoints:
            self.checkpoints = run_directory / "checkpoints"
            if not isinstance(train, Resumable):
                raise ValueError("checkpoints need a loader with state() and restore() to train on")
            if resume:
                self._resume(self.checkpoints, train)
            elif checkpoint.list_steps(self.checkpoints):
                raise ValueError(f"{self.checkpoints} has checkpoints already: resume, or choose another directory")

    def _dense_optimizer(self) -> DenseOptimizer:
        tables = {id(parameter) for collection in self.collections.values() for parameter in collection.parameters()}
        rates = {
            name: self.table_rate if id(parameter) in tables else self.config.learning_rate
            for name, parameter in self.parameters.items()
        }
        return DenseOptimizer(self.config.optimizer, self.parameters, rates)

    # The loop

    @property
    def _over(self) -> bool:
        return self.patience.stopped or self.epoch == self.config.epochs or self.step >= self.total_steps

    def go(self) -> TrainingResult:
        begin = time.perf_counter()
        keep_freed_memory()
        for callback in self.callbacks:
            callback.start(self.model, self.step)
        try:
            rows, stepping = self._loop()
        finally:
            for callback in self.callbacks:
                callback.finish()
            return_freed_memory()
        if self.patience.best and self.patience.best_step != self.step:
            self.model.load_state_dict(self._best_weights())
        self.model.eval()
        return TrainingResult(
            steps=self.step,
            epochs=self.epoch,
            seconds=time.perf_counter() - begin,
            samples_per_second=rows / stepping if stepping else math.nan,
            precision=self.precision,
            stopped_early=self.patience.stopped,
            history=self.history,
            best=self.patience.best,
            best_tasks=self.best_tasks,
            train_loss=self.train_loss,
        )

    def _loop(self) -> tuple[int, float]:
        """Train to the end; rows and seconds of the timed steps."""
        self.model.train()
        forward: Any = torch.compile(self.model) if self.config.compile else self.model
        timed: list[tuple[int, float]] = []
        mark = reported = time.perf_counter()
        while not self._over:
            for batch in self._rest_of_epoch():
                loss = self._train_step(forward, batch if batch.device == self.device else batch.to(self.device))
                now = time.perf_counter()
                timed.append((len(batch), now - mark))
                mark = now
                if self.progress is not None and now - reported > 1:
                    reported = now
                    self.progress(self.step, self.total_steps, float(loss))
                if self.batch < len(self.train) and self._pause():
                    mark = time.perf_counter()
                if self._over:
                    break
            if self.batch >= len(self.train):
                self.epoch, self.batch = self.epoch + 1, 0
                self._pause(epoch_ended=True)
                mark = time.perf_counter()
        steady = timed[WARM_UP_STEPS:] or timed
        return sum(rows for rows, _ in steady), sum(seconds for _, seconds in steady)

    def _rest_of_epoch(self) -> Iterator[Batch]:
        if isinstance(self.train, Resumable):
            return iter(self.train)
        return itertools.islice(iter(self.train), self.batch, None)

    def _train_step(self, forward: Any, batch: Batch) -> Tensor:
        self._set_rates()
        self.model.set_progress(self.step / self.total_steps)
        if self.step == 0:
            self.model.start_at_base_rate(batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            output = forward(batch)
        loss = self.model.loss(output, batch)
        detached = loss.detach()
        self.unchecked.append(detached)
        # Before the update, so that on a CPU a spoilt batch does not spoil the weights.
        if self.device.type == "cpu" or len(self.unchecked) == CHECK_EVERY:
            self._check_losses(self.step + 1)
        loss.backward()  # type: ignore[no-untyped-call]
        for collection in self.collections.values():
            collection.before_step()
        if self.config.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.config.gradient_clip)
        self.optimizer.step(self.rate_scale)
        self.optimizer.zero_grad()
        for collection in self.collections.values():
            collection.after_step()
        self.step += 1
        self.batch += 1
        for callback in self.callbacks:
            callback.after_step(self.step, detached)
        return detached

    def _check_losses(self, last_step: int) -> None:
        values = [float(loss) for loss in self.unchecked]
        self.unchecked = []
        for step, value in enumerate(values, last_step - len(values) + 1):
            if not math.isfinite(value):
                raise ValueError(
                    f"the loss is {value} at step {step}: lower the learning rate, or look for extreme numbers in the "
                    "data"
                )
            self.loss_sum += value
            self.loss_count += 1

    def _set_rates(self) -> None:
        scale = self.patience.scale
        if self.config.schedule == "linear":
            scale *= 1 - self.step / self.total_steps
        if scale == self.rate_scale:
            return
        self.rate_scale = scale
        if self.embedding.kind != "dense":
            for collection in self.collections.values():
                collection.set_learning_rate(self.table_rate * scale)

    # Between steps

    def _pause(self, *, epoch_ended: bool = False) -> bool:
        """Validate and save what is due; True if anything was."""
        every, ended = self.config.validate_every, epoch_ended or self._over
        if (self.step % every == 0 or self._over) if every else ended:
            self._validate()
        elif not ended and not (self.config.checkpoint_every and self.step % self.config.checkpoint_every == 0):
            return False
        if self.checkpoints is not None:
            self._save(self.checkpoints)
        return True

    def _validate(self) -> None:
        self._check_losses(self.step)
        self.train_loss = self.loss_sum / self.loss_count if self.loss_count else math.nan
        if self.valid is None:
            return
        first = self.model.schema.labels[0].name
        tasks = evaluate(self.model, self.valid)
        metrics = {
            **tasks[first],
            "epoch": self.epoch + self.batch / len(self.train),
            "step": float(self.step),
            "train_loss": self.train_loss,
            "learning_rate": self.config.learning_rate * self.rate_scale,
        }
        self.loss_sum, self.loss_count = 0.0, 0
        self.history.append(metrics)
        improved = self.patience.observe(self.step, metrics)
        if improved:
            self.best_tasks = tasks
        # The best weights are in a checkpoint if there are any; else in memory, but for those that are the last.
        if improved and self.checkpoints is None and not self._over:
            self.best_state = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        for callback in self.callbacks:
            callback.after_validation(self.step, metrics)

    def _best_weights(self) -> dict[str, Tensor]:
        if self.checkpoints is not None:
            return checkpoint.of_step(self.checkpoints, self.patience.best_step).tensors("model|")
        assert self.best_state is not None
        return self.best_state

    # Checkpoints

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that resumes it must have in common."""
        return {
            "model": {"name": self.model.name, **self.model.config.model_dump(mode="json")},
            "training": self.config.model_dump(mode="json", exclude={"keep_checkpoints", "tensorboard"}),
            "embedding": self.embedding.model_dump(mode="json"),
            "schema": self.model.schema.model_dump(mode="json"),
        }

    def _save(self, directory: Path) -> None:
        self._check_losses(self.step)
        tensors = {f"model|{name}": value for name, value in self.model.state_dict().items()}
        for name, values in self.optimizer.state.items():
            tensors.update({f"optimizer|{name}|{key}": value for key, value in values.items()})
        for name, collection in self.collections.items():
            tensors.update({f"tables|{name}|{key}": value for key, value in collection.optimizer_state().items()})
        tensors["random"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        assert isinstance(self.train, Resumable)
        # The loader learns that its epoch is over when it is asked for more, which is after this.
        loader = {**self.train.state(), "epoch": self.epoch, "batch": self.batch}
        state = {
            "identity": self._identity(),
            "precision": self.precision,
            "loader": loader,
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "history": self.history,
            "best_tasks": self.best_tasks,
            "patience": self.patience.state(),
            "loss": [self.loss_sum, self.loss_count, self.train_loss],
        }
        protect = {self.patience.best_step} if self.patience.best else set()
        checkpoint.write(directory, self.step, tensors, state, keep=self.config.keep_checkpoints, protect=protect)

    def _resume(self, directory: Path, train: Resumable) -> None:
        found = checkpoint.latest(directory)
        if found is None:
            return
        state = found.state
        # Through JSON and back, so that tuples and lists compare equal.
        for part, own in json.loads(json.dumps(self._identity())).items():
            before = state["identity"][part]
            if own != before:
                keys = sorted(key for key in {*own, *before} if own.get(key) != before.get(key))
                raise ValueError(
                    f"{found.path} is of a run with another {part} ({', '.join(keys)}): resume with the same recipe, "
                    "or start anew in another directory"
                )
        self.model.load_state_dict(found.tensors("model|"))
        for name, parameter in self.parameters.items():
            if values := found.tensors(f"optimizer|{name}|"):
                # In memory of its own, on its parameter's device, rather than in the file's.
                self.optimizer.state[name] = {key: v.to(parameter.device, copy=True) for key, v in values.items()}
        for name, collection in self.collections.items():
            collection.load_optimizer_state(found.tensors(f"tables|{name}|"))
        torch.set_rng_state(found.tensors("random")[""])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(found.tensors("random.cuda")[""], self.device)
        self.precision = state["precision"]
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        self.history, self.best_tasks = state["history"], state["best_tasks"]
        self.patience = Patience(**state["patience"])
        self.loss_sum, self.loss_count, self.train_loss = state["loss"]
        train.restore(state["loader"])
