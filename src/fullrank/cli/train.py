"""`fullrank train`: one recipe, one model or one funnel."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

    from fullrank.data.dataset import Dataset
    from fullrank.training.recipe import Recipe


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file, or the name of a recipe of fullrank.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override: training.learning_rate=0.002")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/<name of the recipe>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train the model of a recipe and test it.

    Example: fullrank train recipes/movielens-1m-dcn_v2.yaml --set training.epochs=2
    """
    begin = time.perf_counter()
    import torch

    from fullrank.data import atomic
    from fullrank.training.recipe import read_recipe

    settings = read_recipe(recipe, set_)
    run = out or Path("runs") / recipe.stem
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    _prepare(run, resume=resume, overwrite=overwrite)
    with _progress() as bar:
        dataset = _dataset(settings, bar)
        imported = time.perf_counter()
        run.mkdir(parents=True, exist_ok=True)
        atomic.write_text(run / "recipe.json", settings.model_dump_json(indent=2) + "\n")
        if settings.funnel is not None:
            report = _train_funnel(settings, dataset, run, str(recipe), bar)
        else:
            report = _train_model(settings, dataset, run, str(recipe), bar, resume=resume)
    now = time.perf_counter()
    report["seconds"] = {"import": imported - begin, **report["seconds"], "total": now - begin}
    report["run"] = str(run)
    text = json.dumps(_defined(report), indent=2, allow_nan=False)
    atomic.write_text(run / "metrics.json", text + "\n")
    if as_json:
        print(text)
    else:
        _print(report)


def _prepare(run: Path, *, resume: bool, overwrite: bool) -> None:
    earlier = [run / name for name in ("checkpoints", "model", "bundle", "metrics.json") if (run / name).exists()]
    if not earlier or resume:
        return
    if not overwrite:
        raise ValueError(f"{run} holds an earlier run: pass --resume to continue it, --overwrite, or another --out")
    for path in earlier:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _dataset(settings: Recipe, bar: Progress) -> Dataset:
    from fullrank.data.dataset import Dataset
    from fullrank.data.importing import import_dataset
    from fullrank.schema import Schema
    from fullrank.training.memory import return_freed_memory

    place, source = settings.data.dataset, settings.data.source
    if source is not None and not place.exists():
        task = bar.add_task(f"importing {source.path}", total=None)

        def show(good: int, bad: int) -> None:
            bar.update(task, description=f"{good:,} rows read" + (f", {bad:,} bad" if bad else ""))

        place.parent.mkdir(parents=True, exist_ok=True)
        schema = None if source.schema_file is None else Schema.read(source.schema_file)
        import_dataset(
            source.format,
            source.path,
            place,
            schema=schema,
            split=source.split,
            max_bad=source.max_bad,
            progress=show,
        )
        bar.remove_task(task)
        return_freed_memory()
    return Dataset.open(place)


def _train_model(
    settings: Recipe, dataset: Dataset, run: Path, recipe: str, bar: Progress, *, resume: bool
) -> dict[str, Any]:
    import torch

    from fullrank.data.loader import Loader
    from fullrank.funnel.bundle import save_bundle
    from fullrank.funnel.scorer import Scorer
    from fullrank.models import MODELS
    from fullrank.training import Trainer, evaluate

    config = settings.training
    torch.manual_seed(config.seed)
    model = MODELS[settings.model_name].from_config(dataset.schema, settings.model_config_values)
    rows = dataset.rows("train")
    # Batch norm cannot learn from a batch of one row.
    lonely = rows > 1 and rows % config.batch_size == 1
    loader = Loader(
        dataset,
        "train",
        config.batch_size,
        shuffle=True,
        seed=config.seed,
        workers=settings.data.workers,
        drop_last=lonely,
    )
    others = {
        split: Loader(dataset, split, 2 * config.batch_size)
        for split in ("valid", "test")
        if split in dataset.splits and dataset.rows(split)
    }
    task = bar.add_task("training", total=None)

    def show(step: int, total: int, loss: float) -> None:
        bar.update(task, completed=step, total=total, description=f"training, loss {loss:.4f}")

    result = Trainer(config, settings.embedding).fit(
        model, loader, others.get("valid"), run_directory=run, resume=resume, progress=show
    )
    del loader  # and with it the training rows in memory
    metrics = {
        split: result.best_tasks if split == "valid" else evaluate(model, batches) for split, batches in others.items()
    }
    about = {"recipe": recipe, "metrics": _defined(metrics)}
    save_bundle(Scorer(dataset.encoders, model), run / "model", about=about, overwrite=True)
    parameters = model.num_parameters()
    first = dataset.schema.labels[0].name
    return {
        "model": settings.model_name,
        **{split: {"label": first, **values[first]} for split, values in metrics.items()},
        "tasks": metrics,
        "parameters": {"dense": parameters.dense, "embedding": parameters.embedding, "total": parameters.total},
        "samples_per_second": result.samples_per_second,
        "precision": result.precision,
        "epochs": result.epochs,
        "steps": result.steps,
        "best": result.best,
        "bundle": str(run / "model"),
        "seconds": {"fit": result.seconds},
    }


def _train_funnel(settings: Recipe, dataset: Dataset, run: Path, recipe: str, bar: Progress) -> dict[str, Any]:
    from pydantic import ValidationError

    from fullrank.funnel.bundle import save_bundle
    from fullrank.funnel.evaluation import evaluate_funnel
    from fullrank.funnel.training import FunnelConfig, train_funnel
    from fullrank.training.recipe import explain

    try:
        config = FunnelConfig.model_validate(settings.funnel)
    except ValidationError as error:
        raise ValueError(explain(error, f"{recipe}: funnel", FunnelConfig, separator=".")) from None
    task = bar.add_task("training", total=None)

    def show(stage: str, step: int, total: int, loss: float) -> None:
        detail = "" if math.isnan(loss) else f", loss {loss:.4f}"
        bar.update(task, completed=step, total=total or None, description=f"training {stage}{detail}")

    begin = time.perf_counter()
    funnel, results = train_funnel(dataset, config, run_directory=run, progress=show)
    fitted = time.perf_counter() - begin
    metrics: dict[str, Any] = {
        split: evaluate_funnel(funnel, dataset, split)
        for split in ("valid", "test")
        if split in dataset.splits and dataset.rows(split)
    }
    save_bundle(funnel, run / "bundle", about={"recipe": recipe, "metrics": _defined(metrics)}, overwrite=True)
    return {
        **metrics,
        "samples_per_second": {stage: result.samples_per_second for stage, result in results.items()},
        "bundle": str(run / "bundle"),
        "seconds": {"fit": fitted},
    }


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, markup=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _defined(value: Any) -> Any:
    """The same with null for numbers that JSON lacks, such as the AUC of one class."""
    if isinstance(value, dict):
        return {key: _defined(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_defined(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    rows: list[tuple[str, str, dict[str, float]]] = []
    if "model" in report:
        epochs = f"{report['epochs']} epoch{'' if report['epochs'] == 1 else 's'}"
        title = f"{report['model']}: {report['parameters']['total']:,} parameters, {epochs}"
        for split, values in report["tasks"].items():
            rows += [(split, label, metrics) for label, metrics in values.items()]
    else:
        title = "funnel"
        for split in ("valid", "test"):
            for stage, tasks in report.get(split, {}).get("stages", {}).items():
                rows += [(split, f"{stage}: {label}", metrics) for label, metrics in tasks.items()]
    columns = {"auc": "AUC", "gauc": "GAUC", "ne": "NE", "logloss": "logloss", "calibration": "calibration"}
    columns["mse"] = "MSE"
    shown = [name for name in columns if any(name in metrics for *_, metrics in rows)]
    console = Console(markup=False)
    console.print(title, highlight=False)
    table = Table()
    for heading in ("split", "label", *(columns[name] for name in shown)):
        table.add_column(heading, justify="left" if heading in ("split", "label") else "right")
    for split, label, metrics in rows:
        table.add_row(split, label, *(f"{metrics[name]:.5f}" if name in metrics else "" for name in shown))
    if rows:
        console.print(table)
    else:
        print("the dataset has no validation and no test rows: nothing could be measured", file=sys.stderr)
    if "model" in report:
        print(f"{report['samples_per_second']:,.0f} samples/s in training, {report['precision']}", file=sys.stderr)
    for split in ("valid", "test"):
        recall = report.get(split, {}).get("recall", {})
        if recall:
            text = ", ".join(f"{name} {recall[key]:.3f}" for key, name in _RECALLS.items())
            print(f"{split}: share of {recall['requests']:,.0f} positive rows' items found: {text}", file=sys.stderr)
    print(f"run written to {report['run']}; serve it: fullrank serve {report['bundle']}", file=sys.stderr)


_RECALLS = {
    "popularity_at_100": "100 most popular",
    "retrieval_at_100": "first 100 of retrieval",
    "retrieval": "all of retrieval",
    "early": "after the early stage",
}
