"""A small simulated log and a funnel trained on it."""

from __future__ import annotations

import pytest

from fullrank.data.dataset import Dataset
from fullrank.data.simulate import simulate_dataset
from fullrank.funnel import Funnel, FunnelConfig, StageSizes, train_funnel
from fullrank.funnel.training import EarlyConfig, FinalConfig
from fullrank.retrieval import TwoTower
from fullrank.training import TrainerConfig

TRAINING = TrainerConfig(batch_size=128, epochs=2, learning_rate=5e-3, monitor="ne")
CONFIG = FunnelConfig(
    retrieval=TwoTower.Config(batch_size=64, epochs=2),
    early=EarlyConfig(training=TRAINING),
    final=FinalConfig(model={"name": "din", "hidden": [16], "embedding_dim": 8}, training=TRAINING),
    sizes=StageSizes(retrieve=60, keep=20),
    value="bid * click - 0.1 * hide",
)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return simulate_dataset(tmp_path_factory.mktemp("log") / "data", 6000, 3, items=100, users=80)


@pytest.fixture(scope="session")
def funnel(dataset: Dataset) -> Funnel:
    return train_funnel(dataset, CONFIG)[0]
