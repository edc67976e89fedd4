"""The HTTP application: a bundle behind `/v1/recommend` and `/v1/score`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

import fullrank
from fullrank.funnel.bundle import load_bundle
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.requests import Request
from fullrank.funnel.scorer import Scorer
from fullrank.serving.errors import add_handlers
from fullrank.serving.instruments import Instruments
from fullrank.serving.limits import Limits
from fullrank.serving.pool import Pool
from fullrank.serving.routes import PATHS, add_routes


class ServingConfig(BaseModel):
    """How a server runs.

    Attributes:
        workers: requests scored at the same time.
        waiting: requests that may wait for a worker; more are answered with 503 at once, because an answer that comes
            too late costs as much as one in time.
        torch_threads: threads of one request's matrix products; 1 gives the best latency for a few hundred candidates
            and leaves the other cores to other requests.
        max_body: bytes of a request's body.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: int = Field(default=2, ge=1)
    waiting: int = Field(default=256, ge=0)
    torch_threads: int = Field(default=1, ge=1)
    max_body: int = Field(default=1_000_000, ge=1)


def create_app(bundle: Path | Funnel | Scorer, config: ServingConfig | None = None) -> FastAPI:
    """The application that serves a bundle. A single ranker scores rows; a funnel recommends and scores items too.

    Raises:
        ValueError: if the bundle cannot be opened; see `load_bundle`.
    """
    config = config or ServingConfig()
    torch.set_num_threads(config.torch_threads)
    content = load_bundle(bundle) if isinstance(bundle, Path) else bundle
    instruments = Instruments()
    pool = Pool(config.workers, config.waiting, instruments.refused)

    def first() -> None:
        if isinstance(content, Funnel):
            content.scorer.score([{}])
            content.recommend([Request()], 1)
        else:
            content.score([{}])

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await pool.start(first)
        yield
        pool.stop()

    app = FastAPI(
        title="fullrank", version=fullrank.__version__, summary="A ranking funnel over HTTP.", lifespan=lifespan
    )
    add_routes(app, content, pool, instruments)
    add_handlers(app)
    app.add_middleware(Limits, max_body=config.max_body, instruments=instruments, routes=PATHS)
    return app
