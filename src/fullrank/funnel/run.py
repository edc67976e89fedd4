"""A whole run of a recipe that trains a funnel."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fullrank.data.dataset import Dataset
from fullrank.funnel.bundle import save_bundle
from fullrank.funnel.evaluation import evaluate_funnel
from fullrank.funnel.stages import RETRIEVAL
from fullrank.funnel.training import config_of, train_funnel
from fullrank.funnel.true_value import world_of
from fullrank.training.recipe import Recipe
from fullrank.training.result import learning_curves
from fullrank.training.run import Progress, Report, defined


def run_funnel(
    recipe: Recipe,
    dataset: Dataset,
    directory: Path | None,
    *,
    source: str,
    resume: bool = False,
    start: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Train the stages of a recipe's section `funnel`, evaluate them, and save them as `<directory>/bundle`."""
    if start is not None:
        raise ValueError(
            f"{source} trains a funnel, and only a single ranker can go on from a bundle: leave out --from, and train "
            "the funnel anew on the later log"
        )
    config = config_of(recipe, source)

    def tell(stage: str, step: int, steps: int, loss: float) -> None:
        if progress is not None:
            progress(f"training {stage}", step, steps, loss)

    begin = time.perf_counter()
    funnel, results = train_funnel(
        dataset,
        config,
        workers=recipe.data.workers,
        extra=recipe.data.extra,
        run_directory=directory,
        resume=resume,
        progress=tell,
    )
    fitted = time.perf_counter() - begin
    splits = [split for split in ("valid", "test") if split in dataset.splits and dataset.rows(split)]
    world = world_of(dataset)
    metrics: dict[str, Any] = {split: evaluate_funnel(funnel, dataset, split, world=world) for split in splits}
    evaluated = time.perf_counter() - begin - fitted
    bundle = None
    if directory is not None:
        bundle = directory / "bundle"
        save_bundle(funnel, bundle, about={"recipe": source, "metrics": defined(metrics)}, overwrite=True)
    speeds = {stage: result.samples_per_second for stage, result in results.items()}
    details = {**metrics, "samples_per_second": speeds, **learning_curves(results)}
    stages = {stage: result.seconds for stage, result in results.items()}
    # What is not a ranker's is retrieval's: the catalogue, the retriever and its index.
    seconds = {"fit": fitted, RETRIEVAL: fitted - sum(stages.values()), **stages, "evaluate": evaluated}
    notes = [
        f"{split}, {warning['stage']}: {warning['message']}; {warning['advice']}"
        for split in splits[-1:]
        for warning in metrics[split]["warnings"]
    ]
    return Report(funnel, dataset, metrics, details, seconds, bundle=bundle, notes=notes)
