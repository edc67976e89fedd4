"""From a dataset to a funnel: each stage trained in turn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fullrank.data.dataset import Dataset
from fullrank.data.loader import Loader
from fullrank.embeddings import EmbeddingOptimizer
from fullrank.funnel.catalogue import Catalogue, all_rows, usual_context, with_market
from fullrank.funnel.funnel import Funnel, StageSizes
from fullrank.funnel.value import ValueFormula, default_formula, formula_names
from fullrank.models import MODELS, Ranker
from fullrank.models.early_stage import EarlyStageRanker
from fullrank.retrieval import TwoTower
from fullrank.schema import Schema, describe_errors
from fullrank.training import Trainer, TrainerConfig, TrainingResult


class EarlyConfig(BaseModel):
    """The early stage: its model, and how it learns.

    Attributes:
        model: its size.
        training: how it learns.
        embedding: how its tables learn.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: EarlyStageRanker.Config = EarlyStageRanker.Config()
    training: TrainerConfig = TrainerConfig(batch_size=4096, learning_rate=2e-3, monitor="ne")
    embedding: EmbeddingOptimizer = EmbeddingOptimizer()


class FinalConfig(BaseModel):
    """The final stage.

    Attributes:
        model: `name` and the fields of that model's `Config`.
        training: how it learns.
        embedding: how its tables learn.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: dict[str, Any] = {"name": "din", "hidden": [128, 64], "batch_norm": True}
    training: TrainerConfig = TrainerConfig(batch_size=2048, learning_rate=2e-3, monitor="ne")
    embedding: EmbeddingOptimizer = EmbeddingOptimizer()

    @field_validator("model")
    @classmethod
    def _known(cls, model: dict[str, Any]) -> dict[str, Any]:
        if model.get("name") not in MODELS:
            raise ValueError(f"name must be one of {', '.join(MODELS)}, got {model.get('name')!r}")
        try:
            MODELS[model["name"]].Config.model_validate({k: v for k, v in model.items() if k != "name"})
        except ValidationError as error:
            raise ValueError(describe_errors(error, "").splitlines()[0]) from None
        return model

    def build(self, schema: Schema) -> Ranker:
        return MODELS[self.model["name"]].from_config(schema, {k: v for k, v in self.model.items() if k != "name"})


class FunnelConfig(BaseModel):
    """The section `funnel` of a recipe.

    Attributes:
        retrieval: the two towers.
        early: the early stage.
        final: the final stage.
        sizes: how many candidates pass each stage.
        value: value formula; default `bid * <first task>`, or the first task where the log has no bid.
        active_days: items not shown in the last so many days of the log are not retrieved; None retrieves all.
        seed: of initial weights and of the order of the rows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    retrieval: TwoTower.Config = TwoTower.Config()
    early: EarlyConfig = EarlyConfig()
    final: FinalConfig = FinalConfig()
    sizes: StageSizes = StageSizes()
    value: str | None = None
    active_days: float | None = Field(default=None, gt=0)
    seed: int = 0


# Told the stage, the step, the number of steps and the loss.
Progress = Callable[[str, int, int, float], None]


def train_funnel(
    dataset: Dataset,
    config: FunnelConfig | None = None,
    *,
    run_directory: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Funnel, dict[str, TrainingResult]]:
    """Train retrieval, early and final stage on the training part of a log.

    Args:
        run_directory: where checkpoints of the rankers go.

    Returns:
        The funnel, with the active items indexed, and what happened in training the two rankers.

    Raises:
        ValueError: if the schema lacks what a stage needs: an item_id, a binary label, features of users and items.
    """
    config = config or FunnelConfig()
    schema = dataset.schema
    ValueFormula(
        config.value or default_formula(schema), formula_names(schema)
    )  # a wrong formula fails before training
    items = Catalogue.of(with_market(all_rows(dataset, "item"), dataset, config.active_days), schema)
    known = all_rows(dataset, "user") if schema.keys.user_id is not None else pl.DataFrame()
    users = Catalogue.of(known, schema) if known.height else None

    def report(stage: str) -> Callable[[int, int, float], None] | None:
        if progress is None:
            return None
        told = progress
        return lambda step, steps, loss: told(stage, step, steps, loss)

    if progress is not None:
        progress("retrieval", 0, 0, float("nan"))
    retriever = TwoTower(schema, config.retrieval)
    retriever.fit(dataset, progress=report("retrieval"))
    results: dict[str, TrainingResult] = {}

    def fit(stage: str, model: Ranker, settings: EarlyConfig | FinalConfig) -> None:
        training = settings.training
        # A last batch of one row would have no variance for batch norm to learn from.
        lonely = dataset.rows("train") % training.batch_size == 1
        train = Loader(dataset, "train", training.batch_size, shuffle=True, seed=training.seed, drop_last=lonely)
        has_valid = "valid" in dataset.splits and dataset.rows("valid") > 0
        valid = Loader(dataset, "valid", 4 * training.batch_size) if has_valid else None
        run = None if run_directory is None else run_directory / stage
        results[stage] = Trainer(training, settings.embedding).fit(
            model, train, valid, run_directory=run, progress=report(stage)
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        early = EarlyStageRanker.from_config(schema, config.early.model)
        fit("early", early, config.early)
        torch.manual_seed(config.seed)
        final = config.final.build(schema)
        fit("final", final, config.final)
    funnel = Funnel(
        encoders=dataset.encoders,
        items=items,
        users=users,
        context=usual_context(dataset),
        retriever=retriever,
        early=early,
        final=final,
        value=config.value,
        sizes=config.sizes,
    )
    funnel.index_active()
    return funnel, results
