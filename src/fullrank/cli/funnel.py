"""`fullrank funnel`: what a funnel's bundle is changed by without training."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fullrank.cli.options import ImportOption

# Lines of the table of sizes.
SHOWN = 12

app = typer.Typer(help="A funnel as a whole.", no_args_is_help=True)


@app.callback()
def _several() -> None:
    """A funnel as a whole."""


@app.command("tune")
def tune(
    bundle: Annotated[Path, typer.Argument(help="The bundle directory of a funnel.")],
    data: Annotated[Path, typer.Argument(help="Its own dataset, or one that was imported --like it.")],
    flops: Annotated[
        float | None, typer.Option("--flops", metavar="N", help="The budget: FLOPs of a request, such as 2e7.")
    ] = None,
    milliseconds: Annotated[
        float | None, typer.Option("--milliseconds", metavar="N", help="Or: its milliseconds on this machine.")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Set the chosen sizes in the bundle.")] = False,
    split: Annotated[str, typer.Option("--split", help="train, valid or test.")] = "valid",
    requests: Annotated[int, typer.Option("--requests", min=1, help="Rows of the log to judge by.")] = 200,
    k: Annotated[int, typer.Option("-k", min=1, help="Items of a list.")] = 10,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the choice of requests.")] = 0,
    place: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The result; default tune-DATA-SPLIT.json by the bundle."),
    ] = None,
    imports: ImportOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Choose how many candidates each stage hands on, for a budget of FLOPs or milliseconds a request.

    The result goes into a JSON file, and a plot of value against cost beside it, with the ending .svg.

    Example: fullrank funnel tune runs/demo/bundle runs/demo/data --flops 2e7 --write
    """
    from rich.console import Console

    from fullrank.data import atomic
    from fullrank.data.dataset import Dataset
    from fullrank.funnel.bundle import load_bundle, write_sizes
    from fullrank.funnel.funnel import Funnel
    from fullrank.funnel.outcomes import as_sizes
    from fullrank.funnel.true_value import world_of
    from fullrank.funnel.tuning import tune
    from fullrank.registry import import_modules
    from fullrank.training.run import defined

    for name, budget in (("--flops", flops), ("--milliseconds", milliseconds)):
        if budget is not None and not (budget > 0 and math.isfinite(budget)):
            raise ValueError(f"{name} is {budget}, expected a number above 0")
    if (flops is None) == (milliseconds is None):
        raise ValueError(f"expected either --flops or --milliseconds, got {'neither' if flops is None else 'both'}")
    import_modules(imports or (), "--import")
    funnel, dataset = load_bundle(bundle), Dataset.open(data)
    if not isinstance(funnel, Funnel):
        raise ValueError(f"{bundle} is the bundle of a single ranker: it has no candidates to choose the number of")
    file = place or bundle.resolve().parent / f"tune-{dataset.path.resolve().name}-{split}.json"
    with Console(stderr=True, markup=False).status(f"scoring the whole catalogue for requests of {split}"):
        result = tune(
            funnel,
            dataset,
            split,
            flops=flops,
            milliseconds=milliseconds,
            requests=requests,
            k=k,
            seed=seed,
            world=world_of(dataset),
        )
    text = json.dumps(defined(result), allow_nan=False)
    atomic.write_text(file, text + "\n")
    atomic.write_text(file.with_suffix(".svg"), _plot(result))
    sizes = result["chosen"]["sizes"]
    if write:
        write_sizes(bundle, as_sizes(tuple(sizes)))
    print(f"written: {file}, {file.with_suffix('.svg')}", file=sys.stderr)
    if as_json:
        print(text)
        return
    output = Console(markup=False, width=None if sys.stdout.isatty() else 120)
    output.print(
        f"{bundle} on {data}, {split}: {result['requests']:,} requests, {result['catalogue']:,} items", highlight=False
    )
    output.print(_table(result))
    low, high = result["gain"]["interval"]
    sure = "" if math.isnan(low) else f", 95 % interval {low:+.4f} to {high:+.4f}"
    output.print(f"value of a list against the current sizes: {result['gain']['value']:+.4f}{sure}", highlight=False)
    told = ", ".join(f"{stage} {size:,}" for stage, size in zip(result["stages"], sizes, strict=True))
    print(f"{bundle} now hands on: {told}" if write else f"--write sets them: {told}", file=sys.stderr)


@app.command("replace")
def replace(
    bundle: Annotated[Path, typer.Argument(help="The bundle directory of a funnel; it stays as it is.")],
    stage: Annotated[str, typer.Argument(help="One of its rankers, such as final.")],
    ranker: Annotated[Path, typer.Argument(help="The bundle of a single ranker, of the same dataset.")],
    out: Annotated[Path, typer.Argument(help="The new bundle.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier bundle in OUT.")] = False,
    imports: ImportOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Put a ranker that was trained alone in the place of a stage of a funnel.

    Example: fullrank funnel replace runs/shop/bundle final runs/transfer/served/loopfm runs/shop/with-student
    """
    from fullrank.funnel.bundle import load_bundle, save_bundle
    from fullrank.funnel.funnel import Funnel
    from fullrank.funnel.scorer import Scorer
    from fullrank.registry import import_modules
    from fullrank.training.manifest import read_manifest

    import_modules(imports or (), "--import")
    funnel, other = load_bundle(bundle), load_bundle(ranker)
    if not isinstance(funnel, Funnel):
        raise ValueError(f"{bundle} is the bundle of a single ranker: it has no stages")
    if not isinstance(other, Scorer):
        raise ValueError(f"{ranker} is the bundle of a funnel, expected that of a single ranker")
    if stage not in funnel.rankers:
        raise ValueError(f'{bundle} has no ranker "{stage}"; it has {", ".join(funnel.rankers)}')
    if not funnel.encoders.agrees_with(other.encoders):
        raise ValueError(f"{ranker} reads other columns or ids than {bundle}: train both on the same dataset")
    about = {**read_manifest(bundle).about, "replaced": {"stage": stage, "by": str(ranker)}}
    save_bundle(funnel.with_rankers({**funnel.rankers, stage: other.model}), out, about=about, overwrite=overwrite)
    if as_json:
        print(json.dumps({"bundle": str(out), "stage": stage, "model": other.model.name}))
    else:
        print(f"{out}: {stage} is a {other.model.name} now", file=sys.stderr)


def _plot(result: dict[str, Any]) -> str:
    from fullrank.funnel import charts
    from fullrank.funnel.report_cascade import tuned
    from fullrank.funnel.report_style import ALONE

    return charts.alone(tuned(result), ALONE)


def _table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    from fullrank.funnel.charts import short

    table = Table(
        caption="value, recall: of what the final stage would find in the whole catalogue", caption_justify="left"
    )
    true = "best_true_value" in result
    for name in ("", *result["stages"], "FLOPs", "ms", "value", "recall", *(["true value"] if true else [])):
        table.add_column(name, justify="right" if name else "left")
    for name, point in _shown(result):
        cells = [f"{size:,}" for size in point["sizes"]]
        cells += [short(point["flops"]), f"{point['milliseconds']:.2f}"]
        cells += ["undefined" if math.isnan(point["share"]) else f"{point['share']:.1%}", f"{point['recall']:.3f}"]
        table.add_row(name, *cells, *([f"{point['true_value']:.3f}"] if true else []))
    return table


def _shown(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The chosen point, the current one, and some of the front, about evenly apart; the file has all."""
    front, chosen, current = result["front"], result["chosen"], result["current"]
    kept = {round(place * (len(front) - 1) / (SHOWN - 1)) for place in range(SHOWN)} if len(front) > SHOWN else None
    points = [point for place, point in enumerate(front) if kept is None or place in kept or point in (chosen, current)]
    names = ["chosen" if point == chosen else "current" if point == current else "" for point in points]
    others = [] if current in points else [("current", current)]
    return [*zip(names, points, strict=True), *others]
