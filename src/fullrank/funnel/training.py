"""From a dataset to a funnel: each stage trained in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

import polars as pl
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fullrank.data.dataset import Dataset
from fullrank.embeddings import EmbeddingOptimizer
from fullrank.funnel.catalogue import Catalogue, all_rows, last_time, usual_context, with_market
from fullrank.funnel.counters import at_end
from fullrank.funnel.distillation import CandidateLists, DistillConfig, Distilled, MixedBatches, candidate_lists
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.slate import SlateConfig
from fullrank.funnel.slate_making import check_slate
from fullrank.funnel.stages import FINAL, RETRIEVAL, StageSizes, check_names
from fullrank.funnel.totals import CounterState
from fullrank.funnel.value import ValueFormula, default_formula, formula_names
from fullrank.models import Ranker, RankerSpec
from fullrank.registry import Spec
from fullrank.retrieval import Retriever, RetrieverSpec, VectorRetriever
from fullrank.retrieval.vectors import VectorIndexSpec
from fullrank.retrieval.vectors.snapshot import SnapshotIndex
from fullrank.schema import Schema
from fullrank.training import TrainerConfig, TrainingResult
from fullrank.training.recipe import Recipe, explain
from fullrank.training.run import fit_ranker
from fullrank.training.run_directory import STAGES

# What a stage is that does not say it.
RETRIEVAL_KIND, EARLY_KIND = "two_tower", "early_stage"


def _named(name: str, value: Any) -> Any:
    """What is given without a name is of this kind; so is a Config alone."""
    if isinstance(value, BaseModel) and not isinstance(value, Spec):
        return {"name": name, "config": value}
    return {"name": name, **value} if isinstance(value, Mapping) and "name" not in value else value


def _usually(name: str) -> BeforeValidator:
    return BeforeValidator(partial(_named, name))


def _listed(value: Any) -> Any:
    """One early stage may stand alone."""
    return [value] if isinstance(value, Mapping | EarlyConfig) else value


Milliseconds = Annotated[float | None, Field(gt=0, allow_inf_nan=False)]


class EarlyConfig(BaseModel):
    """An early stage: its model, and how it learns.

    Attributes:
        name: of the stage, in reports, metrics and the bundle.
        model: a ranker; without a name it is the early-stage ranker.
        training: how it learns.
        embedding: how its tables learn.
        keep: items that the stage hands on; default what `sizes` says.
        deadline_ms: milliseconds that the stage may take for a request; default any time.
        distill: how it learns from the final stage beside the log; null for the log alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "early"
    model: Annotated[RankerSpec, _usually(EARLY_KIND)] = RankerSpec.of(EARLY_KIND)
    training: TrainerConfig = TrainerConfig(batch_size=4096, learning_rate=2e-3, monitor="ne")
    embedding: EmbeddingOptimizer = EmbeddingOptimizer()
    keep: int | None = Field(default=None, ge=1)
    deadline_ms: Milliseconds = None
    distill: DistillConfig | None = None


class FinalConfig(BaseModel):
    """The final stage: its model, and how it learns.

    Attributes:
        model: a ranker.
        training: how it learns.
        embedding: how its tables learn.
        deadline_ms: milliseconds that the stage may take for a request; default any time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: RankerSpec = RankerSpec.of({"name": "din", "hidden": [128, 64], "batch_norm": True})
    training: TrainerConfig = TrainerConfig(batch_size=2048, learning_rate=2e-3, monitor="ne")
    embedding: EmbeddingOptimizer = EmbeddingOptimizer()
    deadline_ms: Milliseconds = None


class FunnelConfig(BaseModel):
    """The section `funnel` of a recipe.

    Attributes:
        retrieval: a retriever; without a name it is the two towers.
        early: the early stages in order, or one of them alone; none where the list is empty.
        final: the final stage.
        sizes: how many candidates pass; what an early stage says of itself goes before it.
        retrieval_deadline_ms: milliseconds that retrieval may take for a request; default any time.
        value: value formula; default `bid * <first task>`, or the first task where the log has no bid.
        slate: how a list is made of the values: exploration, diversity, frequency caps, an auction.
        active_days: items not shown in the last so many days of the log are not retrieved; None retrieves all.
        seed: of initial weights and of the order of the rows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    retrieval: Annotated[RetrieverSpec, BeforeValidator(partial(_named, RETRIEVAL_KIND))] = RetrieverSpec.of(
        RETRIEVAL_KIND
    )
    early: Annotated[tuple[EarlyConfig, ...], BeforeValidator(_listed)] = (EarlyConfig(),)
    final: FinalConfig = FinalConfig()
    sizes: StageSizes = StageSizes()
    retrieval_deadline_ms: Milliseconds = None
    value: str | None = None
    slate: SlateConfig = SlateConfig()
    active_days: float | None = Field(default=None, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        check_names(stage.name for stage in self.early)
        self.stage_sizes.keeps(len(self.early))
        return self

    @property
    def deadlines(self) -> dict[str, float]:
        """Milliseconds of each stage that has a deadline."""
        said = {RETRIEVAL: self.retrieval_deadline_ms, **{stage.name: stage.deadline_ms for stage in self.early}}
        said[FINAL] = self.final.deadline_ms
        return {stage: milliseconds for stage, milliseconds in said.items() if milliseconds is not None}

    def retriever(self, schema: Schema) -> Retriever:
        """What retrieves, not fitted; an index that searches approximately is tuned to what it will be asked for."""
        config = self.retrieval.config
        if isinstance(config, VectorRetriever.Config) and isinstance(config.index.config, SnapshotIndex.Config):
            index = config.index.config
            if "results" not in index.model_fields_set:
                index = index.model_copy(update={"results": self.sizes.retrieve})
            spec = VectorIndexSpec(name=config.index.name, config=index)
            config = config.model_copy(update={"index": spec})
        return RetrieverSpec(name=self.retrieval.name, config=config).build(schema)

    @property
    def stage_sizes(self) -> StageSizes:
        """`sizes`, with what the early stages say of themselves.

        Raises:
            ValueError: if it is not known how many items each early stage hands on.
        """
        if all(stage.keep is None for stage in self.early):
            return self.sizes
        several = len(self.early) > 1
        if several and not isinstance(self.sizes.keep, tuple):
            keeps = [stage.keep for stage in self.early]
        else:
            keeps = [own.keep or size for own, size in zip(self.early, self.sizes.keeps(len(self.early)), strict=True)]
        known = tuple(keep for keep in keeps if keep is not None)
        if len(known) < len(keeps):
            raise ValueError("each of several early stages needs a keep: how many items it hands on")
        return StageSizes(retrieve=self.sizes.retrieve, keep=known if several else known[0])


def config_of(recipe: Recipe, source: str) -> FunnelConfig:
    """The section `funnel` of a recipe.

    Args:
        source: where the recipe comes from, for messages.

    Raises:
        ValueError: if it is wrong, one line per wrong field.
    """
    section = written_out(recipe.funnel)
    try:
        return FunnelConfig.model_validate(section)
    except ValidationError as error:
        raise ValueError(explain(error, f"{source}: funnel", FunnelConfig, section, separator=".")) from None


def written_out(section: Any) -> Any:
    """The section of a recipe with all that `FunnelConfig` takes as said."""
    if not isinstance(section, Mapping):
        return section
    written = dict(section)
    if "retrieval" in written:
        written["retrieval"] = _named(RETRIEVAL_KIND, written["retrieval"])
    if isinstance(stages := _listed(written.get("early")), list | tuple):
        with_model = [isinstance(stage, Mapping) and "model" in stage for stage in stages]
        written["early"] = [
            {**stage, "model": _named(EARLY_KIND, stage["model"])} if named else stage
            for stage, named in zip(stages, with_model, strict=True)
        ]
    return written


# Told the stage, the step, the number of steps and the loss.
Progress = Callable[[str, int, int, float], None]


def train_funnel(
    dataset: Dataset,
    config: FunnelConfig | None = None,
    *,
    workers: int = 1,
    extra: Sequence[str] = (),
    run_directory: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> tuple[Funnel, dict[str, TrainingResult]]:
    """Train retrieval, the final stage and then the early stages on the training part of a log.

    Args:
        workers: threads that put training batches together.
        extra: further columns of the dataset that rankers are trained with.
        run_directory: where checkpoints of the rankers go, into `stages/<stage>`.
        resume: continue each ranker from its newest checkpoint there; one that was finished is so at once. Retrieval
            has none and is trained again.

    Returns:
        The funnel, with the active items indexed, and what happened in training the rankers, by stage.

    Raises:
        ValueError: if the schema lacks what a stage needs: an item_id, a binary label, features of users and items.
    """
    config = config or FunnelConfig()
    schema = dataset.schema
    # A wrong formula, or a slate that does not fit it, fails before training.
    value = ValueFormula(config.value or default_formula(schema), formula_names(schema))
    check_slate(config.slate, schema, value)
    for counter in schema.pair_counters:
        raise ValueError(
            f'{dataset.path}: the feature "{counter.name}" counts a user and an item together '
            f"({', '.join(counter.of)}), and a funnel keeps numbers of users and of items, not of pairs: leave it out "
            "of the schema and import again"
        )
    until = last_time(dataset)
    counters = None
    if dataset.tallies is not None and until is not None:
        counters = CounterState.read(dataset.tallies, schema, until)
    shown = with_market(all_rows(dataset, "item"), dataset, config.active_days)
    known = all_rows(dataset, "user") if schema.keys.user_id is not None else pl.DataFrame()
    if counters is not None:
        shown = at_end(shown, "item", counters, dataset.encoders)
        known = at_end(known, "user", counters, dataset.encoders) if known.height else known
    items = Catalogue.of(shown, schema)
    users = Catalogue.of(known, schema) if known.height else None

    def report(stage: str) -> Callable[[int, int, float], None] | None:
        if progress is None:
            return None
        told = progress
        return lambda step, steps, loss: told(stage, step, steps, loss)

    if progress is not None:
        progress(RETRIEVAL, 0, 0, float("nan"))
    retriever = config.retriever(schema)
    retriever.fit(dataset, progress=report(RETRIEVAL))
    results: dict[str, TrainingResult] = {}

    def fitted(stage: str, settings: EarlyConfig | FinalConfig, lists: CandidateLists | None = None) -> Ranker:
        torch.manual_seed(config.seed)
        spec = settings.model.fitted(dataset.encoders)
        model = learner = spec.build(schema)
        batches = None
        if lists is not None and isinstance(settings, EarlyConfig) and settings.distill is not None:
            torch.manual_seed(config.seed)
            learner = Distilled(schema, Distilled.Config(student=spec, distill=settings.distill, value=config.value))
            model = learner.student
            batches = partial(MixedBatches, lists=lists, lists_per_batch=settings.distill.lists_per_batch)
        place = None if run_directory is None else run_directory / STAGES / stage
        results[stage] = fit_ranker(
            learner,
            dataset,
            settings.training,
            settings.embedding,
            workers=workers,
            extra=extra,
            directory=place,
            resume=resume,
            batches=batches,
            # The validation part has impressions only: what ranks all candidates best is not best by them.
            validate=batches is None,
            progress=report(stage),
        )
        return model

    with torch.random.fork_rng(devices=[]):
        final = fitted(FINAL, config.final)
        stages = partial(
            Funnel,
            encoders=dataset.encoders,
            items=items,
            users=users,
            context=usual_context(dataset),
            retriever=retriever,
            final=final,
            value=config.value,
            slate=config.slate,
            until=until,
            counters=counters,
        )
        teacher = stages(early={}, sizes=StageSizes(retrieve=config.sizes.retrieve))
        teacher.index_active()
        early: dict[str, Ranker] = {}
        for stage in reversed(config.early):
            lists = None
            if stage.distill is not None:
                lists = candidate_lists(teacher, dataset, stage.distill, seed=config.seed)
            early[stage.name] = fitted(stage.name, stage, lists)
    names = [stage.name for stage in config.early]
    funnel = stages(early={name: early[name] for name in names}, sizes=config.stage_sizes, deadlines=config.deadlines)
    return funnel, {name: results[name] for name in [*names, FINAL]}
