"""The `fullrank` command."""

from __future__ import annotations

import os
import re
import sys
import warnings
from typing import Annotated

import typer

from fullrank import __version__
from fullrank.cli import (
    codes,
    compare,
    data,
    demo,
    doctor,
    evaluate,
    export,
    funnel,
    index,
    inspect,
    models,
    plan_memory,
    prune,
    quantize,
    retrieve,
    serve,
    stream,
    train,
    transfer,
)

# Rounds that an idle OpenMP thread spins before it sleeps. The default of 300,000 gains 2 % on an idle machine; on a
# busy one, training beside two other processes on two cores, it takes three times as long.
SPIN_COUNT = "30000"

app = typer.Typer(
    name="fullrank",
    help="The whole ads and recommendation ranking funnel: from an impression log to a ranked list over HTTP.",
    no_args_is_help=True,
    epilog="Example: fullrank demo --out runs/demo && fullrank serve runs/demo/bundle",
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data.app, name="data")
app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("stream")(stream.stream)
app.add_typer(transfer.app, name="transfer")
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("quantize")(quantize.quantize)
app.command("export")(export.export)
app.command("prune")(prune.prune)
app.command("retrieve")(retrieve.retrieve)
app.command("serve")(serve.serve)
app.command("plan-memory")(plan_memory.plan_memory)
app.command("inspect")(inspect.inspect)
app.add_typer(codes.app, name="codes")
app.add_typer(index.app, name="index")
app.add_typer(funnel.app, name="funnel")
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
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when PyTorch is loaded, which is later
    warnings.formatwarning = lambda message, *_: f"fullrank: warning: {message}\n"
    try:
        code = app(prog_name="fullrank", standalone_mode=False)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        message = message_of(error)
        if message is None:
            raise
        if message:
            print(f"fullrank: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(code if isinstance(code, int) else 0)


def message_of(error: Exception) -> str | None:
    """What to tell the user; None for an error that is ours."""
    if hasattr(error, "format_message"):  # a wrong option or argument, by Typer
        message = str(error.format_message()).rstrip(".")
        context = getattr(error, "ctx", None)
        # Without arguments the help was printed, and there is nothing to add.
        return f"{message}; see {context.command_path} --help" if message and context is not None else message
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {os.strerror(error.errno) if error.errno else error.strerror}"
    # Polars and safetensors report a full disk, and the like, as errors of their own with the system's number.
    system = re.search(r"\(os error (\d+)\)", str(error))
    if system is not None:
        return ": ".join([*getattr(error, "__notes__", []), os.strerror(int(system[1]))])
    if isinstance(error, (ValueError, IndexError, OSError)):
        return str(error) or type(error).__name__
    return None
