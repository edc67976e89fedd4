"""`fullrank data export`: what a server showed, and what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fullrank.extras import needs


def export(
    store: Annotated[str, typer.Argument(help="What `fullrank serve --store` has: a directory, or redis://...")],
    like: Annotated[Path, typer.Option("--like", help="A bundle or a dataset, whose schema names the columns.")],
    out: Annotated[Path, typer.Option("--out", help="The Parquet file to make.")],
    after: Annotated[
        Path | None, typer.Option("--after", metavar="FILE", help="An earlier export: begin where it ended.")
    ] = None,
    window: Annotated[
        int, typer.Option("--window", min=0, help="Seconds after a list in which feedback counts for it.")
    ] = 86_400,
    wait: Annotated[
        int | None,
        typer.Option("--wait", min=0, help="Leave what is younger, in seconds, for the next export. Default: --window"),
    ] = None,
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME", help="Nothing before: seconds since 1970, or 2026-01-31.")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", help="Nothing from then on.")] = None,
    impressions_only: Annotated[
        bool, typer.Option("--impressions-only", help="No rows of feedback on lists that are not known.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Write what a server showed, with propensities and the labels that feedback gave it: a log to import.

    Example: fullrank data export runs/events --like runs/demo/bundle --out log/monday.parquet
    """
    from rich.console import Console

    with needs("data export", "serving"):
        from fullrank.serving.log_export import export_log

    with Console(stderr=True, markup=False).status("exporting"):
        found = export_log(
            store,
            like,
            out,
            after=after,
            window=window,
            wait=wait,
            since=_seconds(since, "--since"),
            until=_seconds(until, "--until"),
            impressions_only=impressions_only,
            overwrite=overwrite,
        )
    if as_json:
        print(json.dumps({"path": str(out), **found._asdict()}))
        return
    labels = ", ".join(f"{name} {count:,}" for name, count in found.labels.items())
    print(f"{out}: {found.rows:,} rows of {found.lists:,} lists and {found.feedback:,} events on none; {labels}")
    print(
        f"left out: {found.outside:,} events later than the window, {found.forgotten:,} lists and events of forgotten "
        f"users; {found.waiting:,} lists wait for the next export, --after {out}"
    )


def _seconds(text: str | None, option: str) -> int | None:
    """Seconds since 1970.

    Raises:
        ValueError: if it is no time.
    """
    import polars as pl

    from fullrank.data.times import seconds_of

    if text is None:
        return None
    found = seconds_of(pl.Series([text]))[0]
    if found is None:
        raise ValueError(f"{option} is {text!r}, expected seconds since 1970 or a time such as 2026-01-31T12:00:00Z")
    return int(found)
