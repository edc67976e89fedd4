"""The `fullrank` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fullrank import __version__
from fullrank.cli import data, demo, doctor, evaluate, models, serve, train

app = typer.Typer(
    name="fullrank",
    help="The whole ads and recommendation ranking funnel: from an impression log to a ranked list over HTTP.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data.app, name="data")
app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("serve")(serve.serve)
app.command("models")(models.models)
app.command("doctor")(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fullrank {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None: ...


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    try:
        app()
    except (ValueError, IndexError, OSError) as error:
        message = (
            str(error)
            if not isinstance(error, OSError) or error.filename is None
            else (f"{error.filename}: {error.strerror}")
        )
        print(f"fullrank: {message or type(error).__name__}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
