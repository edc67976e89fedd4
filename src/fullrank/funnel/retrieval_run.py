"""A whole run of a recipe that trains a retriever alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fullrank.data.dataset import Dataset
from fullrank.funnel.bundle import save_searcher
from fullrank.funnel.searcher import Searcher
from fullrank.retrieval import Items, Popularity
from fullrank.retrieval.all_ranking import evaluate_all_ranking
from fullrank.training.recipe import Recipe
from fullrank.training.run import Progress, Report, defined

# Lengths of the lists that recall and NDCG are taken of.
LENGTHS = (20, 100)
# What is compared with in `metrics.json`.
RETRIEVER, POPULARITY = "retriever", "popularity"


def run_retrieval(
    recipe: Recipe,
    dataset: Dataset,
    directory: Path | None,
    *,
    source: str,
    resume: bool = False,
    start: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Train the retriever of a recipe's section `retrieval`, rank all items for each user of the validation and test
    parts, by it and by popularity, and save it as `<directory>/bundle`.

    Nothing is saved on the way: `resume` trains anew.
    """
    spec = recipe.retrieval
    assert spec is not None
    if start is not None:
        raise ValueError(
            f"{source} trains a retriever, and only a single ranker can go on from a bundle: leave out --from"
        )

    def tell(step: int, steps: int, loss: float) -> None:
        if progress is not None:
            progress(f"training {spec.name}", step, steps, loss)

    begin = time.perf_counter()
    searcher = Searcher.train(spec, dataset, tell)
    fitted = time.perf_counter() - begin
    popularity = Popularity(dataset.schema).fit(dataset)
    popularity.index(Items(searcher.items.keys_I, searcher.items.rows.batch))
    metrics: dict[str, Any] = {}
    for split in ("valid", "test"):
        if split in dataset.splits and dataset.rows(split):
            if progress is not None:
                progress(f"ranking all items for the users of {split}", 0, 0, float("nan"))
            metrics[split] = {
                name: evaluate_all_ranking(retriever, dataset, split, ks=LENGTHS)
                for name, retriever in ((RETRIEVER, searcher.retriever), (POPULARITY, popularity))
            }
    evaluated = time.perf_counter() - begin - fitted
    bundle = None
    if directory is not None:
        bundle = directory / "bundle"
        save_searcher(searcher, bundle, about={"recipe": source, "metrics": defined(metrics)}, overwrite=True)
    details = {"retriever": spec.name, "items": len(searcher.items), "cost": searcher.retriever.cost(), **metrics}
    notes = []
    for split, found in list(metrics.items())[-1:]:
        k = next((k for k in reversed(LENGTHS) if k < len(searcher.items)), LENGTHS[0])
        mine, simple = (found[name][f"recall_at_{k}"] for name in (RETRIEVER, POPULARITY))
        if mine <= simple:
            notes.append(
                f"{split}: recall@{k} is {mine:.3f}, and that of the most popular items {simple:.3f}: train "
                "for more epochs, or use `retrieval: {name: popularity}`"
            )
    return Report(
        searcher, dataset, metrics, details, {"fit": fitted, "evaluate": evaluated}, bundle=bundle, notes=notes
    )
