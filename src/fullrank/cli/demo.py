"""`fullrank demo`: from a simulated log to a funnel that can be served, with a report to look at."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

MARKER = "demo.json"


def demo(
    impressions: Annotated[int, typer.Option("--impressions", min=1_000, help="Rows of the log.")] = 1_000_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the simulated world and of training.")] = 0,
    out: Annotated[
        Path, typer.Option("--out", help="Directory for data, bundle and report; an earlier demo in it is replaced.")
    ] = Path("fullrank-demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Simulate a log, train a funnel on it, evaluate, write a bundle and report.html.

    Example: fullrank demo --impressions 200000 --out demo && fullrank serve demo/bundle
    """
    began = time.perf_counter()
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from fullrank.data import atomic
    from fullrank.data.simulate import World, simulate_dataset
    from fullrank.funnel.bundle import save_bundle
    from fullrank.funnel.demonstration import demo_config
    from fullrank.funnel.evaluation import evaluate_funnel
    from fullrank.funnel.report import write_report
    from fullrank.funnel.training import train_funnel
    from fullrank.funnel.true_value import true_value
    from fullrank.retrieval import TwoTower
    from fullrank.training.result import learning_curves
    from fullrank.training.run import defined

    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).is_file())):
        raise ValueError(f"{out} exists and is not the directory of an earlier demo: choose another one with --out")
    out.mkdir(parents=True, exist_ok=True)
    atomic.write_text(out / MARKER, json.dumps({"impressions": impressions, "seed": seed}) + "\n")
    console = Console(stderr=True, markup=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    seconds: dict[str, float] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def phase(name: str, text: str) -> Any:
            seconds[name] = time.perf_counter()
            return bar.add_task(text, total=None)

        def done(name: str, task: Any) -> None:
            seconds[name] = time.perf_counter() - seconds[name]
            bar.update(task, total=1, completed=1)

        task = phase("simulate", f"simulating {impressions:,} impressions")
        dataset = simulate_dataset(out / "data", impressions, seed, overwrite=True)
        world = World.load(dataset.path / "world.npz")
        done("simulate", task)

        task = phase("train", "training")

        def show(stage: str, step: int, steps: int, loss: float) -> None:
            bar.update(task, description=f"training {stage}", completed=step, total=steps or None)

        config = demo_config(dataset.rows("train"), seed)
        funnel, results = train_funnel(dataset, config, progress=show)
        done("train", task)

        task = phase("evaluate", "evaluating")
        report = evaluate_funnel(funnel, dataset, seed=seed, world=world)
        report["true_value"] = true_value(funnel, dataset, world, seed=seed)
        done("evaluate", task)

        task = phase("write", "writing")
        final = next(iter(report["stages"]["final"].values()))
        measured = {name: report[name] for name in ("stages", "calibration_curve") if name in report}
        about = {
            "simulated": {"impressions": impressions, "seed": seed},
            "metrics": {report["split"]: defined(measured)},
        }
        save_bundle(funnel, out / "bundle", about=about, overwrite=True)
        total = time.perf_counter() - began
        early = {
            f"{stage} stage": f"{model.num_parameters().total:,} parameters, {_epochs(results[stage].epochs)}"
            for stage, model in funnel.early.items()
        }
        towers = config.retrieval.config
        assert isinstance(towers, TwoTower.Config)
        facts = {
            "log": f"simulated, {impressions:,} impressions, seed {seed}",
            "users, items": f"{world.config.num_users:,}, {world.config.num_items:,} "
            f"({funnel.retriever.cost():,} still shown)",
            "retrieval": f"two towers, {_epochs(towers.epochs)} over the clicks",
            **early,
            "final stage": f"{funnel.final.name}, {funnel.final.num_parameters().total:,} parameters, "
            f"{_epochs(results['final'].epochs)}, {results['final'].samples_per_second:,.0f} rows/s",
            "value": funnel.value.text,
            "seconds": f"{total:.0f}: "
            + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if name != "write"),
        }
        title = f"fullrank demo: {impressions:,} simulated impressions"
        write_report(out / "report.html", title, report, facts, learning_curves(results))
        atomic.write_text(out / "metrics.json", json.dumps(defined(report), indent=1, allow_nan=False) + "\n")
        done("write", task)
    total = time.perf_counter() - began
    recall = report["recall"]
    summary = {
        "seconds": round(total, 2),
        "final": {"ne": final["ne"], "oracle_ne": final["oracle_ne"], "auc": final["auc"]},
        "retrieval": {"recall_at_100": recall["retrieval_at_100"]},
        "bundle": str(out / "bundle"),
    }
    if as_json:
        print(json.dumps(summary))
        return
    value = report["true_value"]
    output = Console(markup=False)
    output.print(f"{impressions:,} impressions in {total:.0f} s", highlight=False)
    table = Table(show_header=False)
    table.add_row("final stage NE", f"{final['ne']:.4f} (mean 1, oracle {final['oracle_ne']:.4f})")
    table.add_row("gap to the oracle closed", f"{final['gap_closed']:.1%}")
    table.add_row("final stage AUC", f"{final['auc']:.4f} (oracle {final['oracle_auc']:.4f})")
    table.add_row(
        "recall@100 of retrieval", f"{recall['retrieval_at_100']:.3f} ({recall['popularity_at_100']:.3f} by popularity)"
    )
    table.add_row(
        "true value per request",
        f"{value['funnel']:.2f} (log's policy {value['log']:.2f}, best possible {value['best']:.2f})",
    )
    table.add_row("report", str(out / "report.html"))
    table.add_row("bundle", str(out / "bundle"))
    output.print(table)
    output.print(f"Serve it: fullrank serve {out / 'bundle'}", highlight=False, soft_wrap=True)


def _epochs(count: int) -> str:
    return f"{count} epoch{'' if count == 1 else 's'}"
