"""A whole training run as a function: a recipe in, a trained model and its metrics out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from fullrank.batch import Batch
from fullrank.data import atomic
from fullrank.data.dataset import Dataset
from fullrank.data.encoders import Encoders
from fullrank.data.importing import import_dataset
from fullrank.data.loader import Loader
from fullrank.embeddings import EmbeddingOptimizer
from fullrank.models import Ranker, RankerSpec
from fullrank.registry import Registry
from fullrank.schema import Schema
from fullrank.training.baseline import RANKER_ADVICE, beaten_by_item_rate
from fullrank.training.callbacks import Callback
from fullrank.training.codes import give_codes, named_codes
from fullrank.training.config import TrainerConfig
from fullrank.training.engine import Engine
from fullrank.training.evaluation import evaluate
from fullrank.training.evicted import id_counts
from fullrank.training.growing import grown, same_settings
from fullrank.training.memory import return_freed_memory
from fullrank.training.recipe import DataSpec, Recipe, parse_recipe, read_recipe
from fullrank.training.result import TrainingResult, learning_curves
from fullrank.training.run_directory import PAGE, RECIPE, RunDirectory, run_directory
from fullrank.training.saving import load_model, save_model
from fullrank.training.trainer import Trainer

# Told what is going on, the step, the number of steps (0 if unknown) and the loss (NaN if there is none).
Progress = Callable[[str, int, int, float], None]

# A single ranker is the final stage of a funnel that has no other.
ONLY_STAGE = "final"


@dataclass
class Report:
    """What a run did.

    Attributes:
        content: what was trained: a `Ranker`, a `Funnel`, or a `Searcher`.
        dataset: what it was trained on.
        metrics: by split; of a ranker then by label, as `evaluate` gives them, of a funnel as `evaluate_funnel` does,
            of a retriever as `evaluate_all_ranking` does, for it and for popularity.
        details: what else is in `metrics.json`: sizes, speed, steps.
        seconds: wall time of the parts of the run, and of its stages.
        directory: where the run's files are; None if none were written.
        bundle: what can be served.
        notes: what somebody who started the run should know.
    """

    content: Any
    dataset: Dataset
    metrics: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    directory: Path | None = None
    bundle: Path | None = None
    notes: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """All of it but the trained thing, as `metrics.json` has it: numbers that are not finite are None."""
        places = {"bundle": self.bundle, "run": self.directory}
        shown = {name: None if place is None else str(place) for name, place in places.items()}
        summary: dict[str, Any] = defined({**self.details, "seconds": self.seconds, **shown})
        return summary


class Runner(Protocol):
    """What runs one kind of recipe. It writes into `directory`, if there is one, which exists."""

    def __call__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        directory: Path | None,
        *,
        source: str,
        resume: bool,
        start: Path | None,
        progress: Progress | None,
    ) -> Report: ...


# Section of a recipe -> what runs it; imported when a recipe has it.
RUNS: Registry[Runner] = Registry(
    "run",
    "fullrank.runs",
    {
        "model": f"{__name__}:run_model",
        "funnel": "fullrank.funnel.run:run_funnel",
        "retrieval": "fullrank.funnel.retrieval_run:run_retrieval",
        "transfer": "fullrank.transfer.run:refuse",
    },
)


def run(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    directory: Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    start: Path | None = None,
    progress: Progress | None = None,
    source: str | None = None,
    page: Callable[[Report], str] | None = None,
) -> Report:
    """Import the log if that is not done yet, train what the recipe says, test it, and write a bundle.

    Args:
        recipe: a recipe, its content, its file, or the name of one that comes with the package.
        directory: for checkpoints, the bundle, `recipe.json` and `metrics.json`; nothing is written without it.
        resume: continue from the newest checkpoint in `directory`.
        overwrite: replace an earlier run in `directory`, once this one is complete.
        start: a bundle of the same ranker to go on training from: a warm start. The dataset has to have its encoders
            (`import_dataset(..., like=bundle)`), as they are or extended (`extend=True`): then the ranker's tables
            grow, and new ids start as the out-of-vocabulary id.
        source: where the recipe comes from, for messages and the bundle; default its file.
        page: what makes `report.html` of the run, which is written beside the rest; `fullrank.funnel.report.run_page`.

    Raises:
        ValueError: if the recipe is wrong (one line per wrong field), the data lacks what it needs, `directory` holds
            an earlier run and neither `resume` nor `overwrite` is set, it has no checkpoint to resume from, or another
            process is at a run there.
    """
    begin = time.perf_counter()
    source = source or ("recipe" if isinstance(recipe, Recipe | Mapping) else str(recipe))
    if isinstance(recipe, Mapping):
        recipe = parse_recipe(dict(recipe), source)
    elif not isinstance(recipe, Recipe):
        recipe = read_recipe(Path(recipe))
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    if directory is None:
        return _run(recipe, None, source, start, begin, progress, page)
    with run_directory(directory, resume=resume, overwrite=overwrite) as place:
        report = _run(recipe, place, source, start, begin, progress, page)
        place.publish()
    if resume and not place.resume:
        report.notes.insert(0, f"there was no run in {directory} to resume: this one began at the beginning")
    return report


def _run(
    recipe: Recipe,
    place: RunDirectory | None,
    source: str,
    start: Path | None,
    begin: float,
    progress: Progress | None,
    page: Callable[[Report], str] | None,
) -> Report:
    dataset = open_dataset(recipe.data, progress)
    imported = time.perf_counter()
    work = None if place is None else place.work
    if work is not None:
        atomic.write_text(work / RECIPE, recipe.model_dump_json(indent=2) + "\n")
    resume = place is not None and place.resume
    runner = RUNS[recipe.section]
    report = runner(recipe, dataset, work, source=source, resume=resume, start=start, progress=progress)
    now = time.perf_counter()
    report.seconds = {"import": imported - begin, **report.seconds, "total": now - begin}
    if place is not None:
        report.directory = place.path
        report.bundle = None if report.bundle is None else place.path / report.bundle.name
        text = json.dumps(report.summary(), indent=2, allow_nan=False)
        atomic.write_text(place.work / "metrics.json", text + "\n")
        if page is not None:
            if progress is not None:
                progress("writing the report", 0, 0, math.nan)
            atomic.write_text(place.work / PAGE, page(report))
    return report


def run_model(
    recipe: Recipe,
    dataset: Dataset,
    directory: Path | None,
    *,
    source: str,
    resume: bool = False,
    start: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Train the ranker of a recipe's section `model`, test it, and save it as `<directory>/model`."""
    assert recipe.model is not None
    training = recipe.training

    def tell(step: int, steps: int, loss: float) -> None:
        if progress is not None:
            progress("training", step, steps, loss)

    if start is None:
        torch.manual_seed(training.seed)
        model = recipe.model.fitted(dataset.encoders).build(dataset.schema)
    else:
        model = started(recipe.model, dataset.encoders, start, str(dataset.path))
    result = fit_ranker(
        model,
        dataset,
        training,
        recipe.embedding,
        workers=recipe.data.workers,
        extra=recipe.data.extra,
        directory=directory,
        resume=resume,
        warm_start=start is not None,
        progress=tell,
    )
    metrics = {"valid": result.best_tasks} if _has(dataset, "valid") else {}
    begin = time.perf_counter()
    if _has(dataset, "test"):
        metrics["test"] = evaluate(model, Loader(dataset, "test", 2 * training.batch_size, extra=recipe.data.extra))
    seconds = {"fit": result.seconds, ONLY_STAGE: result.seconds, "evaluate": time.perf_counter() - begin}
    bundle = None
    if directory is not None:
        bundle = directory / "model"
        about = {"recipe": source, "metrics": defined(metrics)}
        save_model(model, bundle, dataset.encoders, about=about, overwrite=True)
    notes = [
        f'the label "{label}" has one class only in {split}: its NE and AUC are undefined'
        for split, tasks in metrics.items()
        for label, values in tasks.items()
        if math.isnan(values.get("auc", 0.0))
    ]
    if metrics:
        last = next(reversed(metrics))
        notes += [f"{said}: {RANKER_ADVICE}" for said in beaten_by_item_rate(dataset, last, metrics[last])]
    notes += [
        f'table "{name}": {count["live"]:,} ids have a row at the end, {count["evicted"]:,} lost theirs'
        for name, count in id_counts(model).items()
    ]
    parameters = model.num_parameters()
    first = dataset.schema.labels[0].name
    details = {
        "model": recipe.model.name,
        **{split: {"label": first, **values[first]} for split, values in metrics.items()},
        "tasks": metrics,
        "parameters": {"dense": parameters.dense, "embedding": parameters.embedding, "total": parameters.total},
        "samples_per_second": result.samples_per_second,
        "precision": result.precision,
        "epochs": result.epochs,
        "steps": result.steps,
        "best": result.best,
        **({"ids": ids} if (ids := id_counts(model)) else {}),
        **learning_curves({ONLY_STAGE: result}),
    }
    return Report(model, dataset, metrics, details, seconds, bundle=bundle, notes=notes)


def started(spec: RankerSpec, encoders: Encoders, bundle: Path, log: str) -> Ranker:
    """The ranker of a bundle, if it is the recipe's and a log means to it what its own did, with new ids if the log has
    some.

    Args:
        encoders: of the log.
        log: what messages call it.

    Raises:
        ValueError: if it is another ranker or quantised, or the encoders are neither the bundle's nor these extended.
    """
    model = load_model(bundle)
    if model.packed_tables():
        raise ValueError(f"{bundle} is quantised, and cannot be trained: start from the bundle that it was made from")
    if not same_settings(model, spec):
        raise ValueError(f"{bundle} holds a {model.name} with other settings than the recipe's model: they must agree")
    before = Encoders.load(bundle / "encoders")
    if not encoders.extends(before):
        raise ValueError(
            f"{log} has other encoders than {bundle}: import the log with `fullrank data import ... --like "
            f"{bundle}`, and with --extend if its new ids are to be learnt"
        )
    if not encoders.agrees_with(before):
        try:
            model = grown(model, encoders.schema)
        except ValueError as error:
            raise ValueError(f"{bundle}: {error}") from None
    give_codes(model, encoders, named_codes(spec.config.model_dump(mode="json")))
    return model


def train_ranker(
    spec: RankerSpec | Mapping[str, Any] | str,
    dataset: Dataset,
    training: TrainerConfig | None = None,
    embedding: EmbeddingOptimizer | None = None,
    *,
    workers: int = 1,
    extra: Sequence[str] = (),
    directory: Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    engine: Engine | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[Ranker, TrainingResult]:
    """Build a ranker from `training.seed` and fit it to a dataset: `fit_ranker` with a name for the model."""
    training = training or TrainerConfig()
    torch.manual_seed(training.seed)
    model = RankerSpec.of(spec).fitted(dataset.encoders).build(dataset.schema)
    result = fit_ranker(
        model,
        dataset,
        training,
        embedding,
        workers=workers,
        extra=extra,
        directory=directory,
        resume=resume,
        callbacks=callbacks,
        engine=engine,
        progress=progress,
    )
    return model, result


def fit_ranker(
    model: Ranker,
    dataset: Dataset,
    training: TrainerConfig,
    embedding: EmbeddingOptimizer | None = None,
    *,
    workers: int = 1,
    extra: Sequence[str] = (),
    directory: Path | None = None,
    resume: bool = False,
    warm_start: bool = False,
    callbacks: Sequence[Callback] = (),
    engine: Engine | None = None,
    batches: Callable[[Loader], Iterable[Batch]] | None = None,
    validate: bool = True,
    progress: Callable[[int, int, float], None] | None = None,
) -> TrainingResult:
    """Fit a ranker to the training part of a dataset, and validate it on the validation part if there is one.

    Args:
        workers: threads that put training batches together.
        extra: further columns of the dataset, for `Batch.extra`.
        directory: where checkpoints go.
        warm_start: go on from what the model has learnt; see `Trainer.fit`.
        batches: makes what is trained on of the loader of the training part; default that itself.
        validate: stop, and choose the weights, by the validation part; else the last weights of all epochs stay.

    Raises:
        ValueError: as `Trainer.fit`.
    """
    if not warm_start:
        give_codes(model, dataset.encoders)
    # A last batch of one row would have no variance for batch norm to learn from.
    rows = dataset.rows("train")
    lonely = rows > 1 and rows % training.batch_size == 1
    train = Loader(
        dataset,
        "train",
        training.batch_size,
        shuffle=training.shuffle,
        seed=training.seed,
        workers=workers,
        drop_last=lonely,
        extra=extra,
    )
    valid = None
    if validate and _has(dataset, "valid"):
        valid = Loader(dataset, "valid", 2 * training.batch_size, extra=extra)
    trainer = Trainer(training, embedding, callbacks, engine)
    return trainer.fit(
        model,
        train if batches is None else batches(train),
        valid,
        run_directory=directory,
        resume=resume,
        warm_start=warm_start,
        progress=progress,
    )


def open_dataset(data: DataSpec, progress: Progress | None = None) -> Dataset:
    """The dataset of a recipe, imported first if it is not there yet, with its further columns.

    Raises:
        ValueError: if the log cannot be imported, or the dataset is damaged or lacks a further column.
    """
    place, source = data.dataset, data.source
    if source is not None and not place.exists():

        def show(good: int, bad: int) -> None:
            if progress is not None:
                rejected = f", {bad:,} bad" if bad else ""
                progress(f"importing {source.path}: {good:,} rows read{rejected}", 0, 0, math.nan)

        place.parent.mkdir(parents=True, exist_ok=True)
        schema = None if source.schema_file is None else Schema.read(source.schema_file)
        import_dataset(
            source.format,
            source.path,
            place,
            schema=schema,
            split=source.split,
            keep=_kept(data.extra, schema),
            max_bad=source.max_bad,
            forgotten=source.forgotten_users(),
            progress=show,
        )
        return_freed_memory()
    dataset = Dataset.open(place)
    columns = dataset.scan(dataset.splits[0]).collect_schema().names() if data.extra else []
    for name in data.extra:
        if name not in columns:
            kept = ", ".join(dataset.extra) or "none"
            raise ValueError(f'data.extra: {place} has no column "{name}"; further columns that were kept: {kept}')
    return dataset


def _kept(extra: Sequence[str], schema: Schema | None) -> list[str]:
    """Those of the further columns that a dataset has only if its import is told to keep them."""
    own: set[object] = set()
    if schema is not None:
        own |= {feature.name for feature in (*schema.features, *schema.labels)} | set(schema.keys.model_dump().values())
    return [name for name in extra if name not in own and not name.startswith("__")]


def defined(value: Any) -> Any:
    """The same with None for numbers that JSON lacks, such as the AUC of one class."""
    if isinstance(value, dict):
        return {key: defined(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [defined(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _has(dataset: Dataset, split: str) -> bool:
    return split in dataset.splits and dataset.rows(split) > 0
