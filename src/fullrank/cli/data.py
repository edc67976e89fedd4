"""`fullrank data`: import, simulate and inspect logs."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fullrank.cli.export_log import export
from fullrank.cli.options import ImportOption
from fullrank.cli.rollout import rollout

if TYPE_CHECKING:
    from rich.progress import Progress

    from fullrank.data.dataset import Dataset
    from fullrank.data.formats.options import ReadOptions
    from fullrank.data.inference import ColumnProfile
    from fullrank.schema import TimeUnit

# Columns of text: where there is no terminal, and what examples of values need.
_PIPED_WIDTH, _ROOM_FOR_EXAMPLES = 140, 100

app = typer.Typer(
    help="Make datasets: import a log, simulate one, look at a file.",
    epilog="Example: fullrank data inspect log.csv",
    no_args_is_help=True,
)

app.command()(rollout)
app.command()(export)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
SeparatorOption = Annotated[
    str | None, typer.Option("--separator", help='Between fields of text, such as ";", "::", tab. Default: guessed.')
]
EncodingOption = Annotated[
    str | None, typer.Option("--encoding", help="Of text, such as latin-1. Default: UTF-8, or what the file says.")
]
QuoteOption = Annotated[
    str | None, typer.Option("--quote", help='Character around texts that hold separators, or none. Default: ".')
]
HeaderOption = Annotated[bool, typer.Option("--no-header", help="The first line holds values, not names.")]
ColumnsOption = Annotated[
    str | None, typer.Option("--columns", metavar="NAME,...", help="Names of all columns, in order.")
]
MissingOption = Annotated[
    list[str] | None,
    typer.Option("--missing", metavar="TEXT", help="Means no value, in place of NULL, NA, NaN, ...; may be repeated."),
]
TimeUnitOption = Annotated[
    str | None, typer.Option("--time-unit", help="Of timestamps that are numbers: s, ms, us or ns. Default: guessed.")
]
TimeFormatOption = Annotated[
    str | None, typer.Option("--time-format", help='Of timestamps, such as "%d/%m/%Y %H:%M". Default: guessed.')
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]


@app.command("import")
def import_(
    format: Annotated[
        str, typer.Argument(metavar="FORMAT", help="criteo, avazu, amazon, csv, parquet, ...; see docs.")
    ],
    path: Annotated[Path, typer.Argument(help="The log: a file, or a directory of the format's files.")],
    out: Annotated[Path, typer.Argument(help="The dataset directory to make.")],
    schema: Annotated[
        Path | None, typer.Option("--schema", help="What the columns mean; see `fullrank data inspect`.")
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option("--like", help="A bundle or a dataset: take its schema and encoders, for a later log."),
    ] = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="With --like: give new values ids of their own, behind the old ones.")
    ] = False,
    split: Annotated[
        str | None,
        typer.Option("--split", help="time, user, random, given or none. Default: time if there is a timestamp."),
    ] = None,
    valid: Annotated[float, typer.Option("--valid", help="Share of rows (users) for validation.")] = 0.1,
    test: Annotated[float, typer.Option("--test", help="Share of rows (users) for the test.")] = 0.1,
    seed: Annotated[int, typer.Option("--seed", help="Of a split by user or at random.")] = 0,
    split_column: Annotated[
        str | None, typer.Option("--split-column", help='Column with train, valid or test, for "given".')
    ] = None,
    separator: SeparatorOption = None,
    encoding: EncodingOption = None,
    quote: QuoteOption = None,
    no_header: HeaderOption = False,
    columns: ColumnsOption = None,
    missing: MissingOption = None,
    time_unit: TimeUnitOption = None,
    time_format: TimeFormatOption = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep", metavar="COLUMN", help="Have this column in the dataset too, beside the features: numbers."
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option("--protocol", help='"bars": test rows validate too, as in the leaderboard\'s runs.'),
    ] = None,
    max_bad: Annotated[
        float, typer.Option("--max-bad", help="Share of bad rows above which the import fails.")
    ] = 0.001,
    forgotten: Annotated[
        str | None,
        typer.Option(
            "--forgotten", metavar="STORE", help="Leave out users whom this store of `fullrank serve` is to forget."
        ),
    ] = None,
    imports: ImportOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read a log into a dataset directory: Parquet shards, schema and encoders fitted on the training part.

    Example: fullrank data import csv log.csv data/log --schema schema.json --split time
    """
    from pydantic import ValidationError

    from fullrank.data.forgotten import forgotten_users
    from fullrank.data.importing import import_dataset
    from fullrank.data.splits import SplitSpec
    from fullrank.registry import import_modules
    from fullrank.schema import Schema, describe_errors

    import_modules(imports or (), "--import")
    if extend and like is None:
        raise ValueError("--extend adds to the encoders of an earlier log: name it with --like BUNDLE or DATASET")
    options = _read_options(separator, encoding, quote, columns, header=not no_header)
    began = time.perf_counter()
    values: dict[str, Any] = {"kind": split, "valid": valid, "test": test, "seed": seed, "column": split_column}
    values["protocol"] = protocol
    try:
        spec = SplitSpec.model_validate(values)
    except ValidationError as error:
        raise ValueError(describe_errors(error, "split").splitlines()[0]) from None
    with _progress() as bar:
        task = bar.add_task("reading", total=None)

        def show(good: int, bad: int) -> None:
            bar.update(task, description=f"{good:,} rows read" + (f", {bad:,} bad" if bad else ""))

        dataset = import_dataset(
            format,
            path,
            out,
            schema=None if schema is None else Schema.read(schema),
            like=like,
            extend=extend,
            split=spec,
            options=options,
            missing=missing,
            time_unit=_unit(time_unit),
            time_format=time_format,
            keep=tuple(dict.fromkeys(keep or ())),
            max_bad=max_bad,
            overwrite=overwrite,
            forgotten=() if forgotten is None else forgotten_users(forgotten),
            progress=show,
        )
    _report(dataset, time.perf_counter() - began, as_json=as_json)


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(help="The dataset directory to make.")],
    impressions: Annotated[
        int | None, typer.Option("--impressions", min=1, help="Rows of the log. Default: 1,000,000, or the task's own.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same log.")] = 0,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="A planted task instead: order-1 to order-4, heterogeneous, segments, timed, cascade or cross-domain.",
        ),
    ] = None,
    true_probabilities: Annotated[
        bool, typer.Option("--true-probabilities", help="Keep the true probability of each label beside the log.")
    ] = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Simulate an ads log, or a planted task, whose true click probabilities are known.

    Example: fullrank data simulate data/world --impressions 1000000 --seed 7 --true-probabilities
    """
    from fullrank.data.dataset import Dataset
    from fullrank.data.planted import planted_dataset
    from fullrank.data.simulate import simulate_dataset

    began = time.perf_counter()
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already: choose another name or pass --overwrite")
    with _progress() as bar:
        bar.add_task(f"simulating {'an ads world' if task is None else task}", total=None)
        if task is None:
            rows = 1_000_000 if impressions is None else impressions
            simulate_dataset(out, rows, seed, true_probabilities=true_probabilities, overwrite=overwrite)
        else:
            planted_dataset(out, task, impressions, seed, true_probabilities=true_probabilities, overwrite=overwrite)
    _report(Dataset.open(out), time.perf_counter() - began, as_json=as_json)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A CSV, TSV, JSON lines or Parquet file, or a directory of them.")],
    format: Annotated[
        str | None, typer.Option("--format", help="Default: by the ending (.parquet, .jsonl, .inter), else csv.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the schema to this file.")] = None,
    separator: SeparatorOption = None,
    encoding: EncodingOption = None,
    quote: QuoteOption = None,
    no_header: HeaderOption = False,
    columns: ColumnsOption = None,
    missing: MissingOption = None,
    time_unit: TimeUnitOption = None,
    time_format: TimeFormatOption = None,
    imports: ImportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look at the first rows of a log and guess what its columns mean; the schema is yours to edit.

    Example: fullrank data inspect log.csv --out schema.json
    """
    from fullrank.data import atomic
    from fullrank.data.derived import suggested_history
    from fullrank.data.formats import open_format, usual_format
    from fullrank.data.formats.base import Noted
    from fullrank.data.inference import guessed_schema
    from fullrank.registry import import_modules

    import_modules(imports or (), "--import")
    options = _read_options(separator, encoding, quote, columns, header=not no_header)
    name = format or usual_format(file)
    source = open_format(name, options)
    if not file.exists():
        raise ValueError(f"{file} does not exist")
    schema, profiles, rows = guessed_schema(
        source, file, missing=missing, time_unit=_unit(time_unit), time_format=time_format
    )
    notes = source.notes(file) if isinstance(source, Noted) else []
    if not schema.labels:
        notes.append('no label found: add one to "labels" of the schema, such as {"name": "click"}')
    elif len(schema.labels) > 1:
        names = ", ".join(label.name for label in schema.labels)
        notes.append(f"{len(schema.labels)} labels: {names}; the first is the main one, drop those not to be learnt")
    if out is not None:
        atomic.write_text(out, schema.to_json())
    command = _next_command(name, file, out, told=options.model_dump(exclude_defaults=True))
    if as_json:
        listed = [vars(column) for column in profiles]
        found = {"rows_seen": rows, "notes": notes, "columns": listed, "schema": schema.model_dump(), "next": command}
        print(json.dumps(found))
        return
    if profiles:
        _print_columns(profiles, file, rows)
    for note in notes:
        print(note, file=sys.stderr)
    if out is None:
        print(schema.to_json(), end="")
    else:
        print(f"schema written to {out}", file=sys.stderr)
    suggested = suggested_history(schema)
    if suggested is not None:
        print(f'each row can have its user\'s earlier items: add {suggested} to "features"', file=sys.stderr)
    print(f"next: {command}", file=sys.stderr)


def _next_command(format: str, file: Path, out: Path | None, told: dict[str, Any]) -> str:
    """What to type after `inspect`; units, formats and markers are in the schema."""
    if out is None:
        words = ["fullrank", "data", "inspect", str(file), "--format", format, "--out", f"{_stem(file)}.schema.json"]
    else:
        words = ["fullrank", "data", "import", format, str(file), f"data/{_stem(file)}", "--schema", str(out)]
    for name, value in told.items():
        if name == "header":
            words.append("--no-header")
        else:
            words += [f"--{name}", value if isinstance(value, str) else ",".join(value)]
    return shlex.join(words)


def _stem(file: Path) -> str:
    return file.name.partition(".")[0] or "log"


def _unit(name: str | None) -> TimeUnit | None:
    from typing import get_args

    from fullrank.schema import TimeUnit

    if name is not None and name not in get_args(TimeUnit):
        raise ValueError(f'--time-unit: expected {", ".join(get_args(TimeUnit))}, got "{name}"')
    return name  # type: ignore[return-value]


def _read_options(
    separator: str | None, encoding: str | None, quote: str | None, columns: str | None, *, header: bool
) -> ReadOptions:
    from fullrank.data.formats.options import ReadOptions

    given: dict[str, Any] = {"separator": separator, "encoding": encoding, "quote": quote}
    given = {name: value for name, value in given.items() if value is not None}
    if columns is not None:
        given["columns"] = tuple(columns.split(","))
    return ReadOptions.of(**given, **({} if header else {"header": False}))


def _print_columns(columns: list[ColumnProfile], file: Path, rows: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, markup=False)
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    console.print(f"{file.name}: first {rows:,} rows", highlight=False)
    shown = {
        "column": [column.name for column in columns],
        "type": [column.dtype for column in columns],
        "distinct": [f"{column.distinct:,}" for column in columns],
        "readable": [f"{column.readable:.1%}" for column in columns],
        "most frequent": [column.example[:20] for column in columns],
        "role": [column.role for column in columns],
        "use": [column.use for column in columns],
    }
    if console.width < _ROOM_FOR_EXAMPLES:
        del shown["most frequent"]
    table = Table(box=SIMPLE_HEAD)
    for heading in shown:
        right = heading in ("distinct", "readable")
        table.add_column(heading, justify="right" if right else "left", no_wrap=heading != "use", overflow="fold")
    for row in zip(*shown.values(), strict=True):
        table.add_row(*row)
    console.print(table)


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, markup=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _report(dataset: Dataset, seconds: float, *, as_json: bool) -> None:
    rows = {split: dataset.rows(split) for split in dataset.splits}
    if as_json:
        summary = {
            "dataset": str(dataset.path),
            "rows": rows,
            "rejected": dataset.rejected,
            "tables": dataset.schema.tables(),
            "published": dataset.published,
            "derived": dataset.derived,
            "new_ids": dataset.new_ids,
            "forgotten": dataset.forgotten,
            "seconds": round(seconds, 3),
        }
        print(json.dumps(summary))
        return
    from rich.console import Console
    from rich.table import Table

    from fullrank.data.formats.published import Fingerprint
    from fullrank.schema import RAW_IDS

    console = Console(markup=False)
    console.print(str(dataset.path), highlight=False, soft_wrap=True)
    table = Table(show_header=False)
    for split, count in rows.items():
        table.add_row(f"{split} rows", f"{count:,}")
    table.add_row("labels", ", ".join(label.name for label in dataset.schema.labels))
    keys = {key: column for key, column in dataset.schema.keys.model_dump().items() if column is not None}
    if keys:
        table.add_row(
            "keys", ", ".join(column if key == column else f"{column} ({key})" for key, column in keys.items())
        )
    for reason, count in dataset.rejected.items():
        table.add_row(f"rejected: {reason}", f"{count:,}")
    if dataset.forgotten is not None:
        table.add_row("rows of forgotten users, left out", f"{dataset.forgotten:,}")
    if dataset.out_of_order:
        table.add_row("rows older than the row before", f"{dataset.out_of_order:,}")
    if dataset.validation is not None:
        table.add_row("validation rows", dataset.validation)
    for name, found in dataset.derived.items():
        table.add_row(f"{name}: rows with earlier events", f"{found['rows_with_events']:,}")
        table.add_row(f"{name}: earlier events", f"{found['events']:,}")
        if found["rows_in_ties"]:
            table.add_row("rows of one user and second, blind to each other", f"{found['rows_in_ties']:,}")
    sizes = dataset.schema.tables()
    raw = sum(rows >= RAW_IDS for rows in sizes.values())
    rows_in_all = sum(rows for rows in sizes.values() if rows < RAW_IDS)
    table.add_row("embedding tables", f"{len(sizes)}, {rows_in_all:,} rows" + (f", {raw} of raw ids" if raw else ""))
    if dataset.new_ids:
        table.add_row("new ids", ", ".join(f"{name} {count:,}" for name, count in dataset.new_ids.items()))
    table.add_row("seconds", f"{seconds:.1f}")
    console.print(table)
    for name, found in dataset.published.items():
        print(Fingerprint(**found).describe(name))
    if dataset.rejected:
        print(f"rejected rows are listed in {dataset.path / 'rejected.tsv'}")
