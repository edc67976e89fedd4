"""The training loop. It knows batches and losses, and no architecture."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fullrank.batch import Batch
from fullrank.embeddings import EmbeddingOptimizer
from fullrank.models import Ranker
from fullrank.training import checkpoint
from fullrank.training.callbacks import Callback, TensorBoard
from fullrank.training.config import TrainerConfig
from fullrank.training.engine import Engine, LocalEngine
from fullrank.training.evaluation import evaluate
from fullrank.training.evicted import EvictedIds
from fullrank.training.memory import keep_freed_memory, return_freed_memory
from fullrank.training.patience import Patience
from fullrank.training.result import TrainingResult

# On an accelerator the loss is looked at this often, because looking waits for the device.
CHECK_EVERY = 50
# The first steps pay for decoding, allocation and compilation; throughput is measured after them.
WARM_UP_STEPS = 10


@runtime_checkable
class Resumable(Protocol):
    """Batches that can begin in the middle of an epoch, as a `Loader` can."""

    def state(self) -> dict[str, int]: ...
    def restore(self, state: dict[str, int]) -> None: ...


class Trainer:
    """Fits a ranker.

    Args:
        embedding: how tables learn; kind `dense` hands them to the dense optimiser. Their learning rate is its
            `learning_rate`, in every kind, or else that of the rest of the model; schedules scale both alike.
        callbacks: called in order.
        engine: where steps run; by default in this process. It keeps the optimisers' state from one `fit` to the next.
    """

    def __init__(
        self,
        config: TrainerConfig,
        embedding: EmbeddingOptimizer | None = None,
        callbacks: Sequence[Callback] = (),
        engine: Engine | None = None,
    ) -> None:
        self.config = config
        self.embedding = embedding or EmbeddingOptimizer()
        self.callbacks = list(callbacks)
        self.engine = engine or LocalEngine()

    def fit(
        self,
        model: Ranker,
        train: Iterable[Batch],
        valid: Iterable[Batch] | None = None,
        *,
        run_directory: Path | None = None,
        resume: bool = False,
        warm_start: bool = False,
        progress: Callable[[int, int, float], None] | None = None,
    ) -> TrainingResult:
        """Train until the epochs are over or the validation metric stops improving, then restore the best weights.

        The same model, data, configuration and number of threads give the same weights, bit for bit.

        Args:
            train: batches of an epoch, iterated anew for each: a `Loader`, a list, or anything else that iterates.
                Without a length it needs `max_steps` or `max_seconds`.
            run_directory: where checkpoints go; none are written without it.
            resume: continue from the newest valid checkpoint of `run_directory`, to weights that equal those of a run
                that was never interrupted, bit for bit; from the start if there is none.
            warm_start: go on from what the model has learnt: with the optimisers' state of its last `fit` by this
                trainer, or with a fresh one for a model that comes from elsewhere. Two fits of one epoch, the second
                a warm start, then equal one of two. Without it optimisers start anew, and so do output biases of 0.
            progress: called with step, number of steps (0 if unknown) and the latest loss, at most every second.

        Raises:
            ValueError: if the loss becomes NaN or infinite (names the step), if a weight that the dense optimiser moves
                is narrower than float32, if the checkpoint to resume from belongs to another model, configuration or
                data, if `run_directory` has checkpoints and `resume` is not asked, or if nothing says when a `train`
                without a length ends.
        """
        return _Run(self, model, train, valid, run_directory, progress, resume, warm_start).go()


class _Run:
    """The state of one `fit`."""

    def __init__(
        self,
        trainer: Trainer,
        model: Ranker,
        train: Iterable[Batch],
        valid: Iterable[Batch] | None,
        run_directory: Path | None,
        progress: Callable[[int, int, float], None] | None,
        resume: bool,
        warm_start: bool,
    ) -> None:
        self.config, self.embedding, self.engine = trainer.config, trainer.embedding, trainer.engine
        self.model, self.train, self.valid, self.progress = model, train, valid, progress
        self.warm_start = warm_start
        config = self.config
        self.epoch_steps, self.total_steps = _length(train, config)
        self.callbacks = [*trainer.callbacks]
        if config.tensorboard and run_directory is not None:
            self.callbacks.append(TensorBoard(run_directory / "tensorboard"))
        self.engine.prepare(model, config, self.embedding, keep_state=warm_start)
        usual = "auc" if model.schema.labels[0].kind == "binary" else "mse"
        self.patience = Patience(
            config.monitor or usual, config.plateau_factor if config.schedule == "plateau" else 1.0, config.patience
        )
        self.began = time.perf_counter()
        self.rate_scale = 1.0
        self.step = self.epoch = self.batch = 0
        self.history: list[dict[str, float]] = []
        self.best_tasks: dict[str, dict[str, float]] = {}
        self.best_state: dict[str, Tensor] | None = None
        self.loss_sum, self.loss_count = 0.0, 0
        self.unchecked: list[Tensor] = []
        torch.manual_seed(config.seed)
        self.evicted = EvictedIds(model, run_directory)
        self.checkpoints: Path | None = None
        if run_directory is not None and config.keep_checkpoints:
            self.checkpoints = run_directory / "checkpoints"
            if not isinstance(train, Resumable):
                raise ValueError("checkpoints need a loader with state() and restore() to train on")
            self.fingerprint = getattr(train, "fingerprint", None)
            if resume:
                self._resume(self.checkpoints, train)
                self.evicted.resume(self.step)
            elif checkpoint.list_steps(self.checkpoints):
                raise ValueError(f"{self.checkpoints} has checkpoints already: resume, or choose another directory")

    # The loop

    @property
    def _share(self) -> float:
        """How much of the run is over, from 0 to 1."""
        by_steps = self.step / self.total_steps if self.total_steps else 0.0
        seconds = self.config.max_seconds
        return max(by_steps, min(1.0, (time.perf_counter() - self.began) / seconds)) if seconds else by_steps

    @property
    def _over(self) -> bool:
        return self.patience.stopped or self.epoch == self.config.epochs or self._share >= 1

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
            precision=self.engine.precision,
            stopped_early=self.patience.stopped,
            history=self.history,
            monitor=self.patience.monitor,
            best=self.patience.best,
            best_tasks=self.best_tasks,
        )

    def _loop(self) -> tuple[int, float]:
        """Train to the end; rows and seconds of the timed steps."""
        self.model.train()
        timed: list[tuple[int, float]] = []
        mark = reported = time.perf_counter()
        while not self._over:
            begin, batches = self.batch, self._rest_of_epoch()
            for batch in batches:
                loss = self._train_step(batch)
                now = time.perf_counter()
                timed.append((len(batch), now - mark))
                mark = now
                if self.progress is not None and now - reported > 1:
                    reported = now
                    self.progress(self.step, self.total_steps or 0, float(loss))
                if self.batch != self.epoch_steps and self._pause():
                    mark = time.perf_counter()
                if self._over:
                    break
            else:
                if self.batch == begin and self.epoch_steps is None:
                    again = f" in epoch {self.epoch + 1}: they can be iterated once only" if self.epoch else ""
                    raise ValueError(f"there are no batches to train on{again}")
                if self.epoch_steps is None:
                    self._end_epoch()
            if self.batch == self.epoch_steps:
                next(batches, None)  # so that a loader knows that its epoch is over
                self._end_epoch()
            mark = time.perf_counter()
        steady = timed[WARM_UP_STEPS:] or timed
        return sum(rows for rows, _ in steady), sum(seconds for _, seconds in steady)

    def _end_epoch(self) -> None:
        self.epoch, self.batch = self.epoch + 1, 0
        self._pause(epoch_ended=True)

    def _rest_of_epoch(self) -> Iterator[Batch]:
        if isinstance(self.train, Resumable):
            return iter(self.train)
        return itertools.islice(iter(self.train), self.batch, None)

    def _train_step(self, batch: Batch) -> Tensor:
        share = self._share
        self.rate_scale = self.patience.scale * (1 - share if self.config.schedule == "linear" else 1.0)
        self.model.set_progress(share)
        if self.step == 0 and not self.warm_start:
            self.model.start_at_base_rate(batch if batch.device == self.engine.device else batch.to(self.engine.device))
        loss = self.engine.step(batch, self.rate_scale, self._saw_loss)
        self.step += 1
        self.batch += 1
        for callback in self.callbacks:
            callback.after_step(self.step, loss)
        return loss

    def _saw_loss(self, loss: Tensor) -> None:
        self.unchecked.append(loss)
        # Before the update, so that on a CPU a spoilt batch does not spoil the weights.
        if loss.device.type == "cpu" or len(self.unchecked) == CHECK_EVERY:
            self._check_losses(self.step + 1)

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

    # Between steps

    def _pause(self, *, epoch_ended: bool = False) -> bool:
        """Validate and save what is due; True if anything was."""
        every, ended = self.config.validate_every, epoch_ended or self._over
        if (self.step % every == 0 or self._over) if every else ended:
            self._validate()
        elif not ended and not (self.config.checkpoint_every and self.step % self.config.checkpoint_every == 0):
            return False
        self.evicted.write(self.step)
        if self.checkpoints is not None:
            self._save(self.checkpoints)
        return True

    def _validate(self) -> None:
        self._check_losses(self.step)
        point = {
            "epoch": self.epoch + (self.batch / self.epoch_steps if self.epoch_steps else 0.0),
            "step": float(self.step),
            "train_loss": self.engine.mean(self.loss_sum / self.loss_count) if self.loss_count else math.nan,
            "learning_rate": self.config.learning_rate * self.rate_scale,
        }
        self.loss_sum, self.loss_count = 0.0, 0
        if self.valid is None:
            self.history.append(point)
            return
        tasks = evaluate(self.model, self.valid)
        metrics = {**tasks[self.model.schema.labels[0].name], **point}
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
            "data": self.fingerprint,
        }

    def _save(self, directory: Path) -> None:
        self._check_losses(self.step)
        tensors = {f"model|{name}": value for name, value in self.model.state_dict().items()}
        tensors.update(self.engine.state())
        assert isinstance(self.train, Resumable)
        # The loader learns that its epoch is over when it is asked for more, which is after this.
        loader = {**self.train.state(), "epoch": self.epoch, "batch": self.batch}
        state = {
            "identity": self._identity(),
            "precision": self.engine.precision,
            "loader": loader,
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "history": self.history,
            "best_tasks": self.best_tasks,
            "patience": self.patience.state(),
            "loss": [self.loss_sum, self.loss_count],
        }
        protect = {self.patience.best_step} if self.patience.best else set()
        checkpoint.write(directory, self.step, tensors, state, keep=self.config.keep_checkpoints, protect=protect)

    def _resume(self, directory: Path, train: Resumable) -> None:
        found = checkpoint.latest(directory)
        if found is None and checkpoint.list_steps(directory):
            raise ValueError(f"{directory}: every checkpoint is damaged; start anew, in another directory or over it")
        if found is None:
            return
        state = found.state
        # Through JSON and back, so that tuples and lists compare equal.
        for part, own in json.loads(json.dumps(self._identity())).items():
            before = state["identity"].get(part)
            if part == "data" and own != before:
                raise ValueError(
                    f"{found.path} is of a run on other data: the dataset has changed since; start anew, or bring the "
                    "old one back"
                )
            if own != before:
                keys = sorted(key for key in {*own, *before} if own.get(key) != before.get(key))
                raise ValueError(
                    f"{found.path} is of a run with another {part} ({', '.join(keys)}): resume with the same recipe, "
                    "or start anew in another directory"
                )
        self.model.load_state_dict(found.tensors("model|"))
        self.engine.load(found.tensors(without="model|"))
        self.engine.precision = state["precision"]
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        self.history, self.best_tasks = state["history"], state["best_tasks"]
        self.patience = Patience(**state["patience"])
        self.loss_sum, self.loss_count = state["loss"][:2]  # older ones have a third number
        train.restore(state["loader"])


def _length(train: Iterable[Batch], config: TrainerConfig) -> tuple[int | None, int | None]:
    """Steps of an epoch and of the whole run, None where nothing says so.

    Raises:
        ValueError: if there are no batches, or nothing says when training ends.
    """
    length = len(train) if isinstance(train, Sized) else None
    if length == 0:
        raise ValueError("there are no batches to train on")
    if length is None and config.max_steps is None and config.max_seconds is None:
        raise ValueError("batches without a length need training.max_steps or training.max_seconds")
    planned = None if length is None else config.epochs * length
    known = [steps for steps in (planned, config.max_steps) if steps is not None]
    return length, min(known) if known else None
