"""`fullrank plan-memory`: a kind and a size for every table, within a budget of bytes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fullrank.cli.options import ImportOption

if TYPE_CHECKING:
    from fullrank.embeddings.planning import MemoryPlan


def plan_memory(
    data: Annotated[Path, typer.Argument(metavar="DATASET", help="Whose training rows say how often ids are asked.")],
    budget: Annotated[str, typer.Option(help="Of all tables: 200MB, 1.5GiB, or 25% of plain tables.")],
    recipe: Annotated[
        Path | None, typer.Option(help="Whose model to plan; default: DLRM with tables of width 16.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the recipe with its model.tables here.")
    ] = None,
    kinds: Annotated[
        str | None, typer.Option(metavar="KIND,...", help="To choose among; default all that can be planned.")
    ] = None,
    imports: ImportOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Choose how each table is stored so that all of them fit into a budget.

    Optimiser state is not in it: Adam takes twice the bytes of the rows again, row-wise Adagrad four bytes a row.

    Example: fullrank plan-memory data/clicks --budget 25%
    """
    import yaml

    from fullrank.data import atomic
    from fullrank.data.dataset import Dataset
    from fullrank.registry import import_modules
    from fullrank.training.recipe import parse_recipe, read_values
    from fullrank.training.table_plan import plan_tables

    import_modules(imports or (), "--import")
    model: dict[str, Any] = {"name": "dlrm"}
    values: dict[str, Any] = {}
    if out is not None and recipe is None:
        raise ValueError("--out writes the recipe of --recipe with its tables: name one")
    if recipe is not None:
        values = read_values(recipe)
        if parse_recipe(dict(values), str(recipe)).model is None:
            raise ValueError(f"{recipe}: expected a recipe with a model; tables of a funnel are planned stage by stage")
        model = {"name": values["model"]} if isinstance(values["model"], str) else dict(values["model"])
    chosen = None if kinds is None else [kind.strip() for kind in kinds.split(",")]
    plan = plan_tables(model, Dataset.open(data), budget, kinds=chosen)
    if out is not None:
        from fullrank.embeddings.planning import OFFERS

        given = dict(model.get("tables") or {})
        kept = {
            table: settings
            for table, settings in given.items()
            if (settings if isinstance(settings, str) else settings.get("kind")) not in OFFERS
        }
        values["model"] = {**model, "tables": {**kept, **plan.tables()}}
        atomic.write_text(out, yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None))
        print(f"recipe: {out}", file=sys.stderr)
    if as_json:
        print(json.dumps(_summary(plan), allow_nan=False))
    else:
        _print(plan)


def _summary(plan: MemoryPlan) -> dict[str, Any]:
    return {
        "budget": plan.budget,
        "bytes": plan.bytes,
        "bytes_of_plain_tables": plan.fixed + sum(plan.before.values()),
        "fixed": plan.fixed,
        "tables": {
            table: {
                "rows": plan.rows[table],
                "settings": plan.tables().get(table, {"kind": "full"}),
                "bytes_before": plan.before[table],
                "bytes": choice.bytes,
                "expected_loss": round(choice.loss, 6),
            }
            for table, choice in plan.choices.items()
        },
    }


def _print(plan: MemoryPlan) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("table", "ids", "kind", "settings", "bytes before", "bytes after"):
        table.add_column(name, justify="left" if name in ("table", "kind", "settings") else "right")
    for name, choice in plan.choices.items():
        settings = {key: value for key, value in plan.tables().get(name, {}).items() if key != "kind"}
        text = ", ".join(f"{key} {value}" for key, value in settings.items())
        sizes = (f"{plan.before[name]:,}", f"{choice.bytes:,}")
        table.add_row(name, f"{plan.rows[name]:,}", choice.config.kind, text, *sizes)
    if plan.fixed:
        table.add_row("not planned", "", "", "", f"{plan.fixed:,}", f"{plan.fixed:,}")
    before = plan.fixed + sum(plan.before.values())
    table.add_section()
    table.add_row("all", "", "", "", f"{before:,}", f"{plan.bytes:,}")
    console = Console(markup=False, width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(f"budget {plan.budget:,} bytes, {plan.bytes / before:.1%} of plain tables used", highlight=False)
