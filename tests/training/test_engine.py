"""The seam between the training loop and the place where steps run; warm starts; batches without an end."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from tables import SCHEMA, frame
from torch import Tensor

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset
from fullrank.data.loader import Loader, batch_from_frame
from fullrank.embeddings import EmbeddingOptimizer
from fullrank.models import Ranker, RankerSpec
from fullrank.training import LocalEngine, Trainer, TrainerConfig

SPEC = RankerSpec.of({"name": "dcn_v2", "hidden": [16], "embedding_dim": 4, "embedding_init": 0.01})
FUSED = EmbeddingOptimizer(kind="adagrad", learning_rate=0.05)
DECAYED = EmbeddingOptimizer(kind="adam", learning_rate=0.01, l2=0.1, l2_mode="lazy")


def a_model() -> Ranker:
    torch.manual_seed(0)
    return SPEC.build(SCHEMA)


def weights(model: Ranker) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("embedding", [EmbeddingOptimizer(), FUSED, DECAYED], ids=["dense", "adagrad", "adam, decay"])
def test_two_fits_of_one_epoch_are_one_of_two(dataset: Dataset, embedding: EmbeddingOptimizer) -> None:
    whole, parts, cold = a_model(), a_model(), a_model()
    Trainer(TrainerConfig(epochs=2), embedding).fit(whole, Loader(dataset, "train", 64, shuffle=True))
    loader, trainer = Loader(dataset, "train", 64, shuffle=True), Trainer(TrainerConfig(epochs=1), embedding)
    trainer.fit(parts, loader)
    trainer.fit(parts, loader, warm_start=True)
    if embedding == DECAYED:  # the end of a fit applies the decay that is due, in two factors instead of one
        assert all(torch.allclose(weights(parts)[name], value, atol=1e-6) for name, value in weights(whole).items())
    else:
        assert same(weights(whole), weights(parts))
    loader, trainer = Loader(dataset, "train", 64, shuffle=True), Trainer(TrainerConfig(epochs=1), embedding)
    trainer.fit(cold, loader)
    trainer.fit(cold, loader)
    assert not same(weights(whole), weights(cold))


def test_a_model_from_elsewhere_starts_warm_with_its_weights_and_biases(dataset: Dataset) -> None:
    def bias_after_a_step(*, warm_start: bool) -> float:
        model = a_model()
        config = TrainerConfig(max_steps=1, learning_rate=1e-9)
        Trainer(config).fit(model, Loader(dataset, "train", 64), warm_start=warm_start)
        return abs(float(model.output_biases()[0].detach()))

    assert bias_after_a_step(warm_start=False) > 1e-2  # it starts at the base rate
    assert bias_after_a_step(warm_start=True) < 1e-6


class Watched(LocalEngine):
    """Steps on this machine that are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.scales: list[float] = []

    def step(self, batch: Batch, rate_scale: float, before_update: Callable[[Tensor], None]) -> Tensor:
        self.scales.append(rate_scale)
        return super().step(batch, rate_scale, before_update)

    def mean(self, value: float) -> float:
        return -value


def test_another_engine_takes_every_step_and_every_mean(dataset: Dataset) -> None:
    engine, ours, theirs = Watched(), a_model(), a_model()
    config = TrainerConfig(schedule="linear")
    result = Trainer(config, engine=engine).fit(ours, Loader(dataset, "train", 64))
    expected = Trainer(config).fit(theirs, Loader(dataset, "train", 64))
    assert engine.scales == pytest.approx([1 - step / 10 for step in range(10)])
    assert result.train_loss == -expected.train_loss and same(weights(ours), weights(theirs))


def endless() -> Iterator[Batch]:
    return (batch_from_frame(frame(32, seed), SCHEMA) for seed in itertools.count())


def test_batches_without_a_length_train_to_the_given_step() -> None:
    ours, theirs = a_model(), a_model()
    result = Trainer(TrainerConfig(max_steps=5)).fit(ours, endless())
    Trainer(TrainerConfig()).fit(theirs, list(itertools.islice(endless(), 5)))
    assert result.steps == 5 and result.epochs == 0 and same(weights(ours), weights(theirs))
    some = Trainer(TrainerConfig(max_steps=50)).fit(a_model(), itertools.islice(endless(), 3))
    assert some.steps == 3 and some.epochs == 1


def test_a_time_window_ends_training_and_the_schedule_with_it() -> None:
    engine = Watched()
    result = Trainer(TrainerConfig(max_seconds=0.3, schedule="linear"), engine=engine).fit(a_model(), endless())
    assert result.steps >= 1 and engine.scales == sorted(engine.scales, reverse=True)
    assert 0 <= engine.scales[-1] <= 1


@pytest.mark.parametrize(
    ("config", "batches", "message"),
    [
        (TrainerConfig(), endless(), "without a length need training.max_steps or training.max_seconds"),
        (TrainerConfig(max_steps=3), iter(()), "there are no batches to train on"),
        (TrainerConfig(max_steps=9, epochs=2), itertools.islice(endless(), 3), "in epoch 2: they can be iterated once"),
    ],
)
def test_what_cannot_end_or_begin_is_refused(config: TrainerConfig, batches: Iterator[Batch], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(config).fit(a_model(), batches)
