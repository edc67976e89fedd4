"""`fullrank serve`: a bundle over HTTP."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from fullrank.cli.options import ImportOption
from fullrank.extras import needs


def serve(
    bundle: Annotated[
        Path, typer.Argument(help="The bundle directory, as `fullrank demo` or `fullrank train` writes.")
    ],
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65_535, help="0 takes a free one.")] = 8000,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Requests scored at the same time.")] = 2,
    waiting: Annotated[
        int, typer.Option("--waiting", min=0, help="Requests that may wait; more are answered with 503.")
    ] = 256,
    imports: ImportOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout once requests are answered.")
    ] = False,
) -> None:
    """Serve a funnel (POST /v1/recommend, /v1/score) or a single ranker (POST /v1/score); /docs describes both.

    Example: fullrank serve runs/demo/bundle --port 8000
    """
    # Before PyTorch is loaded and the bundle read, which may take long: a port in use is known at once.
    listening = _listen(host, port)
    with needs("serve", "serving"):
        import uvicorn

        from fullrank.registry import import_modules
        from fullrank.serving import ServingConfig, create_app
    import_modules(imports or (), "--import")
    shown = f"[{host}]" if ":" in host else host
    place = f"http://{shown}:{listening.getsockname()[1]}"

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if as_json:
                print(json.dumps({"url": place, "bundle": str(bundle), "process": os.getpid()}), flush=True)
            else:
                print(f"serving {bundle} on {place} (Ctrl-C stops)", file=sys.stderr, flush=True)

    with listening:
        app = create_app(bundle, ServingConfig(workers=workers, waiting=waiting))
        config = uvicorn.Config(app, log_level="warning", access_log=False)
        Server(config).run(sockets=[listening])


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
