"""A small funnel that all tests of the server share."""

from __future__ import annotations

import pytest

from fullrank.data.simulate import simulate_dataset
from fullrank.funnel import Funnel, FunnelConfig, StageSizes, train_funnel
from fullrank.funnel.training import EarlyConfig, FinalConfig
from fullrank.training import TrainerConfig


@pytest.fixture(scope="session")
def funnel(tmp_path_factory: pytest.TempPathFactory) -> Funnel:
    dataset = simulate_dataset(tmp_path_factory.mktemp("log") / "data", 3000, 3, items=80, users=60)
    training = TrainerConfig(batch_size=256)
    final = FinalConfig(model={"name": "din", "hidden": [16], "embedding_dim": 8}, training=training)
    sizes = StageSizes(retrieve=50, keep=20)
    return train_funnel(dataset, FunnelConfig(early=EarlyConfig(training=training), final=final, sizes=sizes))[0]
