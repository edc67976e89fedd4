"""`fullrank train`: one recipe, one model."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override: training.learning_rate=0.002")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/<name of the recipe>.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the newest checkpoint in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train the model of a recipe and test it.

    Example: fullrank train recipes/movielens-1m-dcn_v2.yaml --set training.epochs=2
    """
    begin = time.perf_counter()
    importing = _start_import(recipe, set_)
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from fullrank.data import atomic
    from fullrank.data.dataset import Dataset
    from fullrank.data.loader import Loader
    from fullrank.models import MODELS
    from fullrank.training import Trainer, evaluate, save_model
    from fullrank.training.recipe import read_recipe

    settings = read_recipe(recipe, set_)
    run = out or Path("runs") / recipe.stem
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if importing is not None:
        importing.result()
    imported = time.perf_counter()
    dataset = Dataset.open(settings.data.dataset)
    config = settings.training
    torch.manual_seed(config.seed)
    model = MODELS[settings.model_name].from_config(dataset.schema, settings.model_config_values)
    loader = Loader(dataset, "train", config.batch_size, shuffle=True, seed=config.seed)
    others = {
        split: Loader(dataset, split, 4 * config.batch_size)
        for split in ("valid", "test")
        if split in dataset.splits and dataset.rows(split)
    }
    run.mkdir(parents=True, exist_ok=True)
    atomic.write_text(run / "recipe.json", settings.model_dump_json(indent=2) + "\n")
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=None)

        def show(step: int, total: int, loss: float) -> None:
            bar.update(task, completed=step, total=total, description=f"training, loss {loss:.4f}")

        result = Trainer(config, settings.embedding).fit(
            model, loader, others.get("valid"), run_directory=run, resume=resume, progress=show
        )
    metrics = {split: evaluate(model, batches) for split, batches in others.items()}
    save_model(model, run / "model")
    if (run / "encoders").exists():
        shutil.rmtree(run / "encoders")
    dataset.encoders.save(run / "encoders")
    parameters = model.num_parameters()
    first = dataset.schema.labels[0].name
    report: dict[str, Any] = {
        "model": settings.model_name,
        **{split: {"label": first, **values[first]} for split, values in metrics.items()},
        "tasks": metrics,
        "parameters": {"dense": parameters.dense, "embedding": parameters.embedding, "total": parameters.total},
        "flops_per_example": model.flops_per_example(),
        "samples_per_second": result.samples_per_second,
        "epochs": result.epochs,
        "seconds": {
            "import": imported - begin,
            "fit": result.seconds,
            "total": time.perf_counter() - begin,
        },
        "run": str(run),
    }
    atomic.write_text(run / "metrics.json", json.dumps(report, indent=2) + "\n")
    if as_json:
        print(json.dumps(report))
        return
    table = Table(title=f"{settings.model_name}: {parameters.total:,} parameters, {result.epochs} epochs")
    for name in ("split", "label", "AUC", "NE", "logloss", "calibration"):
        table.add_column(name, justify="left" if name in ("split", "label") else "right")
    for split, values in metrics.items():
        for label, m in values.items():
            row = (m["auc"], m["ne"], m["logloss"], m["calibration"])
            table.add_row(split, label, *(f"{value:.5f}" for value in row))
    Console().print(table)
    Console().print(f"{result.samples_per_second:,.0f} samples/s; run written to {run}")


def _start_import(recipe: Path, overrides: list[str] | None) -> Future[None] | None:
    """Import the recipe's log, if its dataset is not there yet, in a process of its own.

    It runs while this one loads PyTorch, and its memory is gone before training begins.
    """
    from pydantic import ValidationError

    from fullrank.data.source import DataSpec, import_source, read_values

    try:
        data = DataSpec.model_validate(read_values(recipe, overrides).get("data"))
    except ValidationError:
        return None  # reading the whole recipe reports it
    if data.source is None or data.dataset.exists():
        return None
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    future = pool.submit(import_source, data)
    pool.shutdown(wait=False)
    return future
