"""What a stream keeps fresh: something that learns from rows, is judged by one ranker, and goes into bundles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fullrank.batch import Batch
from fullrank.data.encoders import Encoders
from fullrank.data.loader import batch_from_frame
from fullrank.embeddings import EmbeddingOptimizer
from fullrank.models import Ranker, RankerSpec
from fullrank.schema import OUT_OF_VOCABULARY_ID, Schema
from fullrank.training.codes import give_codes
from fullrank.training.config import TrainerConfig
from fullrank.training.deltas import state_of
from fullrank.training.engine import LocalEngine
from fullrank.training.growing import grown, grown_optimizers
from fullrank.training.recipe import Recipe
from fullrank.training.run import started
from fullrank.training.saving import load_model, save_model
from fullrank.training.trainer import Trainer


class Learner(Protocol):
    """What learns from a stream: a ranker, or a funnel.

    Attributes:
        judged: the ranker whose metrics decide on a rollback.
        is_whole: whether it can be saved at this moment; it always can when a window is over.
    """

    judged: Ranker
    is_whole: bool

    @classmethod
    def begin(cls, recipe: Recipe, encoders: Encoders, start: Path | None, source: str, place: Path) -> Self:
        """What the recipe says, untrained, or as the bundle `start` has it.

        Args:
            source: where the recipe comes from.
            place: a directory of its own, to be made if it needs one.
        """

    def grow(self, encoders: Encoders) -> bool:
        """Take over encoders with more ids; whether there are more."""

    def learn(self, rows: pl.DataFrame, seed: int) -> int:
        """Learn from encoded rows in order of time, once; how many were left aside."""

    def end_window(self, begin: int) -> None:
        """Do what is done once a window, which began at this second, before it is published."""

    def weights(self) -> dict[str, Tensor]:
        """What deltas bring up to date: the state of all that is trained, see `deltas.state_of`."""

    def state(self) -> dict[str, Tensor]:
        """What else than its bundle it takes to go on."""

    def load(self, bundle: Path, state: dict[str, Tensor]) -> None:
        """Go on from a bundle and the state of when it was saved."""

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Write a bundle."""

    def opened(self, bundle: Path) -> Ranker:
        """The judged ranker of a bundle."""


class Fitted:
    """A ranker that goes on learning, its optimisers' state kept from one piece of the log to the next."""

    def __init__(
        self,
        model: Ranker,
        training: TrainerConfig,
        embedding: EmbeddingOptimizer,
        *,
        extra: tuple[str, ...] = (),
        is_new: bool = True,
    ) -> None:
        self.training, self.embedding, self.extra, self.is_new = training, embedding, extra, is_new
        self._start(model)

    def _start(self, model: Ranker) -> None:
        self.model, self.engine = model, LocalEngine()
        self.engine.prepare(model, self.training, self.embedding)

    def grow(self, schema: Schema) -> None:
        """Take over a schema with more ids."""
        before, state = self.model, self.engine.state()
        self._start(grown(before, schema))
        if not self.is_new:
            self.engine.load(grown_optimizers(state, before, self.model, self.engine.state()))

    def learn(self, rows: pl.DataFrame, seed: int, below: Callable[[Batch, int], Batch] | None = None) -> int:
        """One pass over rows; how many were left aside: a single row has no variance for batch norm.

        Args:
            below: makes of a batch and its number one with more rows.
        """
        if not rows.height:
            return 0
        training = self.training.model_copy(update={"seed": seed, "keep_checkpoints": 0, "tensorboard": False})
        if training.shuffle:
            rows = rows[np.random.default_rng(seed).permutation(rows.height)]
        batches = list(batches_of(rows, self.model.schema, training.batch_size, self.extra))
        if len(batches) > 1 and len(batches[-1]) == 1:
            batches[-2:] = [Batch.cat(batches[-2:])]
        if len(batches[0]) == 1 and any(isinstance(module, _BatchNorm) for module in self.model.modules()):
            return 1
        if below is not None:
            batches = [below(batch, number) for number, batch in enumerate(batches)]
        Trainer(training, self.embedding, engine=self.engine).fit(self.model, batches, warm_start=not self.is_new)
        self.is_new = False
        return 0

    def state(self) -> dict[str, Tensor]:
        return self.engine.state()

    def load(self, model: Ranker, state: dict[str, Tensor]) -> None:
        """Go on with a model from the optimisers' state of when it was saved."""
        self._start(model)
        self.engine.load(state)
        self.is_new = False


class RankerLearner:
    """A single ranker: the section `model` of a recipe."""

    is_whole = True

    def __init__(self, fitted: Fitted, encoders: Encoders, source: str) -> None:
        self.fitted, self.encoders, self.source = fitted, encoders, source

    @property
    def judged(self) -> Ranker:
        return self.fitted.model

    @classmethod
    def begin(cls, recipe: Recipe, encoders: Encoders, start: Path | None, source: str, place: Path) -> Self:
        assert recipe.model is not None
        training = recipe.training
        check_training(training, "training")
        if start is None:
            model = fresh_ranker(recipe.model, encoders, training.seed)
        else:
            model = started(recipe.model, encoders, start, "the log")
        fitted = Fitted(model, training, recipe.embedding, extra=recipe.data.extra, is_new=start is None)
        return cls(fitted, encoders, source)

    def grow(self, encoders: Encoders) -> bool:
        if not have_grown(self.encoders, encoders):
            return False
        self.encoders = encoders
        self.fitted.grow(encoders.schema)
        return True

    def learn(self, rows: pl.DataFrame, seed: int) -> int:
        return self.fitted.learn(rows, seed)

    def end_window(self, begin: int) -> None: ...

    def weights(self) -> dict[str, Tensor]:
        return state_of(self.fitted.model)

    def state(self) -> dict[str, Tensor]:
        return self.fitted.state()

    def load(self, bundle: Path, state: dict[str, Tensor]) -> None:
        self.encoders = Encoders.load(bundle / "encoders")
        self.fitted.load(load_model(bundle), state)

    def save(self, path: Path, about: dict[str, Any]) -> None:
        save_model(self.fitted.model, path, self.encoders, about=about, overwrite=True)

    def opened(self, bundle: Path) -> Ranker:
        return load_model(bundle)


def have_grown(known: Encoders, encoders: Encoders) -> bool:
    """Whether encoders have ids beside those that are known.

    Raises:
        ValueError: if they mean other things by these.
    """
    if encoders.agrees_with(known):
        return False
    if not encoders.extends(known):
        raise ValueError("the log has other encoders than before, which mean other things by the same ids")
    return True


def fresh_ranker(spec: RankerSpec, encoders: Encoders, seed: int) -> Ranker:
    """A ranker that has learnt nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = spec.fitted(encoders).build(encoders.schema)
    give_codes(model, encoders)
    return model


def check_training(training: TrainerConfig, place: str) -> None:
    """Raises:
    ValueError: if a setting makes no sense without an end, or would differ from one machine, or start, to another.
    """
    expected = {"epochs": 1, "max_steps": None, "max_seconds": None, "schedule": "constant"}
    for name, value in expected.items():
        if getattr(training, name) != value:
            found, wanted = (f"{word}".lower().replace("none", "null") for word in (getattr(training, name), value))
            raise ValueError(f"{place}.{name} is {found}, and a stream, which has no end, needs {wanted}")
    if training.precision == "auto":
        raise ValueError(f'{place}.precision is "auto", and a stream that goes on elsewhere needs one by name')


def batches_of(rows: pl.DataFrame, schema: Schema, size: int, extra: tuple[str, ...] = ()) -> Iterator[Batch]:
    """Encoded rows in their order; ids that came after the schema are out of vocabulary."""
    frame = with_known_ids(rows, schema)
    for begin in range(0, frame.height, size):
        yield batch_from_frame(frame[begin : begin + size], schema, extra=extra)


def with_known_ids(rows: pl.DataFrame, schema: Schema) -> pl.DataFrame:
    """Encoded rows in which ids that came after the schema are out of vocabulary."""
    tables = schema.embedded()
    later = []
    for name, feature in tables.items():
        if feature.encoding != "vocabulary" or name not in rows.columns:
            continue
        assert feature.num_embeddings is not None
        is_list = name in schema.jagged_keys
        ids = pl.element() if is_list else pl.col(name)
        known = pl.when(ids < feature.num_embeddings).then(ids).otherwise(pl.lit(OUT_OF_VOCABULARY_ID, pl.Int32))
        later.append(pl.col(name).list.eval(known) if is_list else known.alias(name))
    return rows.with_columns(later)
