"""`fullrank serve`: a bundle over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
) -> None:
    """Serve recommendations: POST /v1/recommend, /v1/score; GET /healthz, /readyz, /metrics, /docs.

    Example: fullrank serve runs/demo/bundle --port 8000
    """
    try:
        import uvicorn

        from fullrank.serving import ServingConfig, create_app
    except ImportError as error:
        raise ValueError(f"serving needs {error.name}: pip install 'fullrank[serve]'") from None
    app = create_app(bundle, ServingConfig(workers=workers, waiting=waiting))
    uvicorn.run(app, host=host, port=port, log_level="info", access_log=False)
