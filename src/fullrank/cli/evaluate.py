"""`fullrank evaluate`: a bundle on a dataset."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fullrank.cli.off_policy import (
    ClipOption,
    DistributionOption,
    OffPolicyOption,
    PolicyOption,
    PropensityOption,
    RewardOption,
    SlateOption,
    SlotOption,
    WeighingOption,
    estimates,
    policy_of,
)
from fullrank.cli.options import ImportOption


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="The bundle directory.")],
    data: Annotated[Path, typer.Argument(help="Its own dataset, or one that was imported --like it.")],
    split: Annotated[str, typer.Option("--split", help="train, valid or test.")] = "test",
    requests: Annotated[int, typer.Option("--requests", min=1, help="Clicked rows to take recalls over.")] = 2000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the choice of requests, and of the resamples.")] = 0,
    slice_by: Annotated[
        list[str] | None, typer.Option("--slice", metavar="COLUMN", help="Cut the rows by this column too; repeatable.")
    ] = None,
    place: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="The page; default report-DATA-SPLIT.html by the bundle."),
    ] = None,
    off_policy: OffPolicyOption = False,
    reward: RewardOption = None,
    policy: PolicyOption = None,
    propensity: PropensityOption = "propensity",
    slate: SlateOption = "slate",
    slot: SlotOption = "slot",
    distribution: DistributionOption = None,
    weighing: WeighingOption = "prefix",
    clip: ClipOption = None,
    imports: ImportOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Metrics of every stage with 95 % intervals, by slices, beside baselines; on simulated data also the oracle's.

    A page with all of it is written too. With --off-policy also the value per request that a funnel would have earned
    on a log whose lists were drawn with logged propensities: IPS, self-normalised, doubly robust.

    Example: fullrank evaluate runs/demo/bundle runs/demo/data --slice device
    """
    from rich.console import Console

    from fullrank.data.dataset import Dataset
    from fullrank.funnel.bundle import load_bundle
    from fullrank.funnel.evaluation import evaluate_funnel
    from fullrank.funnel.funnel import Funnel
    from fullrank.funnel.off_policy import LogColumns, evaluate_off_policy
    from fullrank.funnel.report import facts_of, write_report
    from fullrank.funnel.true_value import true_value, world_of
    from fullrank.registry import import_modules
    from fullrank.training.run import defined

    import_modules(imports or (), "--import")
    asked = {"--reward": reward, "--policy": policy, "--distribution": distribution, "--clip": clip}
    for option, value in asked.items():
        if value is not None and not off_policy:
            raise ValueError(f"{option} belongs to --off-policy, which is not asked for")
    if weighing not in ("prefix", "slot"):
        raise ValueError(f'--weighing is "{weighing}", expected prefix or slot')
    slots = policy_of(policy)
    funnel, dataset = load_bundle(bundle), Dataset.open(data)
    name = dataset.path.resolve().name
    page = _writable(place or bundle.resolve().parent / f"report-{name}-{split}.html")
    console = Console(stderr=True, markup=False)
    with console.status(f"evaluating {split}"):
        # First, because it refuses more.
        estimated = (
            evaluate_off_policy(
                funnel,
                dataset,
                split,
                reward=reward,
                policy=slots,
                columns=LogColumns(propensity, slate, slot, distribution),
                weighing=weighing,
                clip=clip,
                seed=seed,
            )
            if off_policy
            else None
        )
        world = world_of(dataset) if isinstance(funnel, Funnel) else None
        report = evaluate_funnel(
            funnel, dataset, split, requests=requests, seed=seed, slice_by=slice_by or (), world=world
        )
        if isinstance(funnel, Funnel) and world is not None:
            report["true_value"] = true_value(funnel, dataset, world, split, seed=seed)
    if estimated is not None:
        report["off_policy"] = estimated
        for text in estimated["warnings"]:
            print(f"warning: {text}", file=sys.stderr)
    for warning in report["warnings"]:
        print(f"warning: {warning['stage']}, {warning['message']}; {warning['advice']}", file=sys.stderr)
    facts = {"bundle": str(bundle), **facts_of(funnel, dataset)}
    try:
        write_report(page, f"{bundle.resolve().name} on {name}, {split}", report, facts)
    except OSError as error:
        raise _unwritable(page, error.strerror) from None
    print(f"report: {page}", file=sys.stderr)
    if as_json:
        print(json.dumps(defined(report), allow_nan=False))
        return
    output = Console(markup=False, width=None if sys.stdout.isatty() else 120)
    output.print(f"{bundle} on {data}, {split}: {report['rows']:,} rows", highlight=False)
    for table in (_stages(report), _slices(report["slices"]), _lists(report), _cascade(report.get("cascade"))):
        if table is not None and table.rows:
            output.print(table)
    if estimated is not None:
        output.print(estimates(estimated))


def _number(value: float, interval: list[float] | None = None, digits: int = 4) -> str:
    """A number, and below it its interval."""
    text = "undefined" if math.isnan(value) else f"{value:.{digits}f}"
    if interval is None or math.isnan(interval[0]):
        return text
    return f"{text}\n{interval[0]:.{digits}f}–{interval[1]:.{digits}f}"


def _stages(report: dict[str, Any]) -> Any:
    from rich.table import Table

    kinds = [values for tasks in report["stages"].values() for values in tasks.values()]
    oracle, numbers = any("oracle_ne" in values for values in kinds), any("rmse" in values for values in kinds)
    columns = [("NE", "ne", 4)] if any("ne" in values for values in kinds) else []
    columns += [("oracle NE", "oracle_ne", 4), ("gap closed", "gap_closed", 3)] if oracle else []
    columns += [("AUC", "auc", 4), ("calibration", "calibration", 3)] if columns else []
    columns += [("RMSE", "rmse", 4), ("of the mean", "std", 4)] if numbers else []
    table = Table(caption=f"below a number: 95 % interval, {kinds[0]['resampled']} resampled", caption_justify="left")
    for name in ("stage", "task", *(heading for heading, *_ in columns)):
        table.add_column(name, justify="left" if name in ("stage", "task") else "right")
    rows = [(stage, task, values) for stage, tasks in report["stages"].items() for task, values in tasks.items()]
    rows += [("item's rate", task, baseline["item_rate"]) for task, baseline in report["baselines"].items()]
    for stage, task, values in rows:
        cells = [
            _number(values[key], values["intervals"].get(key), digits) if key in values else ""
            for _, key, digits in columns
        ]
        table.add_row(stage, task, *cells)
    return table


def _slices(slices: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title=f"final stage: {slices[0]['task']}" if slices else None, title_justify="left")
    for name in ("by", "slice", "rows", "rate", "NE", "AUC", "calibration", ""):
        table.add_column(name, justify="left" if name in ("by", "slice", "") else "right")
    for part in slices:
        digits = {"ne": 4, "auc": 4, "calibration": 3}
        cells = [_number(part[metric], part["intervals"][metric], count) for metric, count in digits.items()]
        note = part.get("note", "")
        table.add_row(part["by"], part["slice"], f"{part['rows']:,}", f"{part['rate']:.4f}", *cells, note)
    return table


def _lists(report: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="share of the items of positive rows that are found", title_justify="left", show_header=False)
    intervals = report.get("recall_intervals", {})
    for name, recall in report.get("recall", {}).items():
        text = f"{recall:,.0f}" if name == "requests" else _number(recall, None, 3)
        low, high = intervals.get(name, (math.nan, math.nan))
        table.add_row(name.replace("_", " "), text, "" if math.isnan(low) else f"{low:.3f}–{high:.3f}")
    early = report.get("early_recall", {})
    for name, recall in early.items():
        if name not in ("requests", "stages"):
            text = f"kept by the early stages of the final stage's {name.replace('_', ' ')}"
            table.add_row(text, _number(recall, None, 3), "")
    for stage, found in early.get("stages", {}).items():
        table.add_row(f"Kendall's tau of the {stage} and the final stage", _number(found["kendall"], None, 3), "")
    for name in ("random", "log", "funnel", "best"):
        if "true_value" in report:
            table.add_row(f"true value per request: {name}", f"{report['true_value'][name]:.3f}", "")
    return table


def _cascade(found: dict[str, Any] | None) -> Any:
    if found is None:
        return None
    from rich.table import Table

    from fullrank.funnel.charts import short

    table = Table(
        title=f"what is left of the final stage's best {found['k']} of all {found['catalogue']:,} items, and costs",
        title_justify="left",
        caption=f"{found['requests']:,} requests; values by the final stage",
        caption_justify="left",
    )
    true = "best" in found
    for name in (
        "stage",
        "scores",
        "FLOPs",
        "ms",
        "99 %",
        "recall",
        "value",
        "lost",
        *(["truly lost"] if true else []),
    ):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage, values in found["stages"].items():
        taken = values["milliseconds"]
        cells = [f"{values['candidates']:,}", short(values["flops"]), f"{taken['p50']:.2f}", f"{taken['p99']:.2f}"]
        cells += [_number(values["recall"], None, 3), _number(values["value"]), _number(values["lost"])]
        table.add_row(stage, *cells, *([_number(values["true_lost"])] if true else []))
    return table


def _writable(page: Path) -> Path:
    """Raises:
    ValueError: if no file can be written there, which is better known before the evaluation.
    """
    if page.is_dir() or not page.parent.is_dir() or not os.access(page.parent, os.W_OK):
        raise _unwritable(page, "is a directory" if page.is_dir() else "no directory that can be written to")
    return page


def _unwritable(page: Path, why: str | None) -> ValueError:
    return ValueError(f"{page}: the report cannot be written there ({why}): name another place with --report")
