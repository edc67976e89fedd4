"""`fullrank serve`: a bundle over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from fullrank.cli.options import ImportOption
from fullrank.data.scratch import Scratch
from fullrank.extras import needs

# Of a request's head from its first byte, of an answer that is not read, and from a signal to stop to the end; after
# how many more a process of several that has not ended is killed.
HEADER_SECONDS, WRITE_SECONDS, GRACE_SECONDS, KILL_SECONDS = 10.0, 20.0, 20, 5


def serve(
    bundle: Annotated[
        Path,
        typer.Argument(
            help="The bundle directory, as `fullrank demo` or `fullrank train` writes, or that of `fullrank stream`, "
            "whose newest bundle is served."
        ),
    ],
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65_535, help="0 takes a free one.")] = 8000,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Requests scored at the same time.")] = 2,
    processes: Annotated[
        int,
        typer.Option(
            "--processes", min=1, help="Processes that answer, and share the memory of the bundle; Linux if above 1."
        ),
    ] = 1,
    rows: Annotated[
        int, typer.Option("--rows", min=1, help="Rows to be scored that may wait; more is answered with 429.")
    ] = 100_000,
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            metavar="DIR|URL",
            help="Directory to keep what users do, POST /v1/feedback; redis://HOST:PORT/DATABASE for several hosts.",
        ),
    ] = None,
    log_impressions: Annotated[
        bool,
        typer.Option("--log-impressions", help="Keep in the store what is shown too, for `fullrank data export`."),
    ] = False,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            "--embeddings",
            metavar="DIR",
            help="Store of a foundation model's embeddings, `fullrank transfer store`, for a student that reads them.",
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option("--token", envvar="FULLRANK_TOKEN", help="What requests for /v1 have to send as bearer token."),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            "--arm", metavar="NAME=BUNDLE:SHARE", help="Another bundle, for a share of the users. May be given again."
        ),
    ] = None,
    salt: Annotated[str, typer.Option("--salt", help="Another text splits the users in another way.")] = "",
    access_log: Annotated[
        str | None, typer.Option("--access-log", metavar="FILE", help="A JSON line for each request; - is stderr.")
    ] = None,
    only_check: Annotated[
        bool,
        typer.Option("--dry-run", help="Open and ask the bundle, print what would be served, and listen on no port."),
    ] = False,
    imports: ImportOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout once requests are answered.")
    ] = False,
) -> None:
    """Serve a funnel (POST /v1/recommend, /v1/score) or a single ranker (POST /v1/score); /docs describes both.

    Example: fullrank serve runs/demo/bundle --port 8000
    """
    if processes > 1 and sys.platform != "linux":
        raise ValueError("--processes needs Linux; elsewhere, start several servers behind a proxy")
    settings: dict[str, Any] = {
        "store": store,
        "token": token,
        "arms": dict(map(_arm, arm or ())),
        "salt": salt,
        "log_impressions": log_impressions,
        "embeddings": embeddings,
    }
    if only_check:
        _dry_run(bundle, imports or (), workers, settings, as_json=as_json)
        return
    # Before PyTorch is loaded and the bundle read, which may take long: a port in use is known at once.
    listening = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    place = f"http://{shown}:{listening.getsockname()[1]}"
    with ExitStack() as stack:
        stack.enter_context(listening)
        scratch = stack.enter_context(Scratch()) if processes > 1 else None
        if scratch is not None:
            # Read when the metrics are first imported.
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(scratch / "metrics")
        with needs("serve", "serving"):
            import uvicorn

            from fullrank.registry import import_modules
            from fullrank.serving import ServingConfig, create_app
            from fullrank.serving.connections import Listener, protocol
            from fullrank.serving.processes import Processes
            from fullrank.serving.shared import Shared
        import_modules(imports or (), "--import")
        note = stack.enter_context(_noted(access_log, several=processes > 1))
        shared = None if scratch is None else Shared(scratch, imports or ())

        def said() -> None:
            if as_json:
                print(json.dumps({"url": place, "bundle": str(bundle), "process": os.getpid()}), flush=True)
            else:
                print(f"serving {bundle} on {place} (Ctrl-C stops)", file=sys.stderr, flush=True)

        def answer(ready: Callable[[], None]) -> None:
            limits = ServingConfig(workers=workers, rows=rows)
            app = create_app(bundle, limits, note=note, shared=shared, **settings)

            class Server(uvicorn.Server):
                async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                    await super().startup(sockets)
                    if hasattr(signal, "SIGHUP"):
                        looks = [versions.look_soon for versions in app.state.versions.values()]
                        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: [look() for look in looks])
                    ready()

            listener = Listener(fileno=listening.detach(), in_turn=processes > 1)
            config = uvicorn.Config(
                app,
                http=protocol(listener, header_seconds=HEADER_SECONDS, write_seconds=WRITE_SECONDS),
                ws="none",
                log_level="error",
                access_log=False,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
            Server(config).run(sockets=[listener])

        def worked(ready: Callable[[], None]) -> int:
            from fullrank.cli.main import message_of

            try:
                answer(ready)
            except Exception as error:
                message = message_of(error)
                if message is None:
                    raise
                print(f"fullrank: {message}", file=sys.stderr)
                return 2
            return 0

        if shared is None:
            answer(said)
            return
        grace = GRACE_SECONDS + KILL_SECONDS
        code = Processes(processes, worked, listening, said, grace=grace, shared=shared).run()
    raise typer.Exit(code)


def _dry_run(bundle: Path, imports: Sequence[str], workers: int, settings: dict[str, Any], *, as_json: bool) -> None:
    with needs("serve", "serving"):
        from fullrank.data.forgotten import is_url
        from fullrank.registry import import_modules
        from fullrank.serving import ServingConfig, create_app
        from fullrank.serving.dry_run import dry_run, dry_run_text
    import_modules(imports, "--import")
    with Scratch() as scratch:
        if settings["store"] is not None and not is_url(settings["store"]):
            settings["store"] = scratch  # nothing is written where it was named
        said = dry_run(create_app(bundle, ServingConfig(workers=workers), **settings))
    print(json.dumps({"bundle": str(bundle), **said}, allow_nan=False) if as_json else dry_run_text(said))


@contextmanager
def _noted(place: str | None, *, several: bool) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """What writes the access log; of several processes it says which one answered.

    Raises:
        ValueError: if it cannot be written there.
    """
    if place is None:
        yield None
        return
    with ExitStack() as stack:
        try:
            file = sys.stderr if place == "-" else stack.enter_context(open(place, "a", encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"--access-log {place} cannot be written: {error.strerror}") from None
        yield partial(_write, file, several)


def _arm(text: str) -> tuple[str, tuple[Path, float]]:
    """Raises:
    ValueError: if it is not NAME=BUNDLE:SHARE.
    """
    name, _, rest = text.partition("=")
    bundle, _, share = rest.rpartition(":")
    try:
        number = float(share)
    except ValueError:
        number = 0.0
    if not (name and bundle and number):
        raise ValueError(f"--arm {text}: expected NAME=BUNDLE:SHARE, such as new=runs/new/bundle:0.1")
    return name, (Path(bundle), number)


def _write(file: TextIO, several: bool, said: dict[str, Any]) -> None:
    """A line of the access log. A log that cannot be written any more does not stop the answers."""
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **said}
    if several:
        line["process"] = os.getpid()
    with suppress(OSError):
        print(json.dumps(line), file=file, flush=True)


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address.

    Raises:
        ValueError: if that is not possible, such as for a port in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    return listening
