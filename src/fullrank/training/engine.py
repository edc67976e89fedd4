"""Where training steps run: the part of training that another place, such as a cluster, does in its own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.embeddings import EmbeddingCollection, EmbeddingOptimizer
from fullrank.models import Ranker
from fullrank.training.config import TrainerConfig
from fullrank.training.mixed_precision import products_in, warn_without_units
from fullrank.training.optimizers import DenseOptimizer
from fullrank.training.precision import Precision, fastest_precision


class Engine(Protocol):
    """What a trainer asks of the place where steps run.

    The trainer owns epochs, validation, early stopping, checkpoints and callbacks, and knows no optimiser; an engine
    owns forward and backward passes, optimisers and their state, and knows no epoch.

    Attributes:
        precision: of the matrix products of a step. The trainer sets it when it resumes a run.
        device: where the batches of a step are computed on.
    """

    precision: Precision
    device: torch.device

    def prepare(
        self, model: Ranker, config: TrainerConfig, embedding: EmbeddingOptimizer, *, keep_state: bool = False
    ) -> None:
        """Make ready for the steps of one `fit`.

        Args:
            keep_state: go on with the optimisers' state of the model's last `fit` in this engine, if there was one.
        """

    def step(self, batch: Batch, rate_scale: float, before_update: Callable[[Tensor], None]) -> Tensor:
        """Learn from one batch at `rate_scale` times the learning rates; the detached loss.

        Args:
            before_update: told the detached loss when nothing has been changed yet; what it raises ends the step.
        """

    def mean(self, value: float) -> float:
        """The average over all workers of a number that each has."""

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint needs beside the model's own state: optimisers and random numbers."""

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from `state()` of an engine that was prepared alike.

        Raises:
            ValueError: if an entry is missing or has another shape.
        """


class LocalEngine:
    """Steps in this process, on the device that the model is on."""

    precision: Precision
    device: torch.device

    def __init__(self) -> None:
        self.model: Ranker | None = None
        self.optimizer: DenseOptimizer | None = None

    def prepare(
        self, model: Ranker, config: TrainerConfig, embedding: EmbeddingOptimizer, *, keep_state: bool = False
    ) -> None:
        kept = self.optimizer if keep_state and model is self.model else None
        self.model, self.config, self.embedding = model, config, embedding
        self.device = next(iter(model.parameters())).device
        self.precision = fastest_precision(self.device) if config.precision == "auto" else config.precision
        if config.precision == "bfloat16":
            warn_without_units(self.device)
        self.collections = {
            name: module for name, module in model.named_modules() if isinstance(module, EmbeddingCollection)
        }
        for collection in self.collections.values():
            if collection.packed_tables():
                raise ValueError(
                    f'table "{collection.packed_tables()[0]}" is quantised, which is for serving: train the model with '
                    "its tables in float32, and quantise what comes out"
                )
            if kept is None or collection.optimizer != embedding:
                collection.set_optimizer(embedding)
        self.table_rate = embedding.learning_rate or config.learning_rate
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        tables = {id(weight) for collection in self.collections.values() for weight in collection.weights()}
        for name, parameter in self.parameters.items():
            stored = id(parameter) in tables and embedding.storage != "float32"
            if parameter.dtype.itemsize < 4 and not stored:
                raise ValueError(
                    f"{name} is {str(parameter.dtype).removeprefix('torch.')}, in which small steps are lost: train "
                    "float32 weights, with precision bfloat16 for products in it"
                )
        rates = {
            name: self.table_rate if id(parameter) in tables else config.learning_rate
            for name, parameter in self.parameters.items()
        }
        self.optimizer = DenseOptimizer(config.optimizer, self.parameters, rates)
        if kept is not None and kept.kind == config.optimizer:
            self.optimizer.state = {name: state for name, state in kept.state.items() if name in self.parameters}
        self.forward: Any = torch.compile(model) if config.compile else model
        self._rate_scale: float | None = None

    def step(self, batch: Batch, rate_scale: float, before_update: Callable[[Tensor], None]) -> Tensor:
        assert self.model is not None and self.optimizer is not None
        self._set_rates(rate_scale)
        if batch.device != self.device:
            batch = batch.to(self.device)
        with products_in(self.precision, self.device, self.config.rounding):
            output = self.forward(batch)
        loss = self.model.loss(output, batch)
        detached = loss.detach()
        before_update(detached)
        loss.backward()  # type: ignore[no-untyped-call]
        for collection in self.collections.values():
            collection.forget_fresh(self.optimizer.state_of)
            collection.before_step()
        if self.config.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.config.gradient_clip)
        self.optimizer.step(rate_scale)
        self.optimizer.zero_grad()
        for collection in self.collections.values():
            collection.after_step()
        return detached

    def _set_rates(self, scale: float) -> None:
        if scale != self._rate_scale:
            self._rate_scale = scale
            if self.embedding.kind != "dense":
                for collection in self.collections.values():
                    collection.set_learning_rate(self.table_rate * scale)

    def mean(self, value: float) -> float:
        return value

    def state(self) -> dict[str, Tensor]:
        assert self.optimizer is not None
        tensors = {}
        for name, values in self.optimizer.state.items():
            tensors.update({f"optimizer|{name}|{key}": value for key, value in values.items()})
        for name, collection in self.collections.items():
            tensors.update({f"tables|{name}|{key}": value for key, value in collection.optimizer_state().items()})
        tensors["random"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors

    def load(self, state: dict[str, Tensor]) -> None:
        assert self.optimizer is not None

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

        for name, parameter in self.parameters.items():
            if values := part(f"optimizer|{name}|"):
                # In memory of its own, on its parameter's device, rather than in a file's.
                self.optimizer.state[name] = {key: v.to(parameter.device, copy=True) for key, v in values.items()}
        for name, collection in self.collections.items():
            collection.load_optimizer_state(part(f"tables|{name}|"))
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random.cuda"], self.device)
