"""Settings of `fullrank demo`, chosen on the validation split of simulated logs."""

from __future__ import annotations

from fullrank.funnel.training import EarlyConfig, FinalConfig, FunnelConfig
from fullrank.retrieval import RetrieverSpec
from fullrank.training import TrainerConfig


def demo_config(rows: int, seed: int = 0) -> FunnelConfig:
    """A configuration for a simulated log with `rows` training rows.

    Smaller logs get smaller batches, so that there are some hundred steps, and more epochs; the best one by
    validation NE is kept.
    """
    batch_size = max(256, min(2048, 1 << max(0, (rows // 400).bit_length() - 1)))
    epochs = 1 if rows >= 500_000 else 3
    training = TrainerConfig(
        batch_size=batch_size, epochs=epochs, patience=1, learning_rate=2e-3, monitor="ne", seed=seed
    )
    return FunnelConfig(
        retrieval=RetrieverSpec.of({"name": "two_tower", "batch_size": min(1024, batch_size), "seed": seed}),
        early=(EarlyConfig(training=training),),
        final=FinalConfig(training=training),
        # The log has ten days; an ad that was not shown in the last two is taken to be retired.
        active_days=2.0,
        seed=seed,
    )
