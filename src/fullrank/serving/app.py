"""The HTTP application: a bundle behind `/v1/recommend` and `/v1/score`."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

import fullrank
from fullrank.funnel.bundle import load_bundle
from fullrank.funnel.canary import check_answers
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.scorer import Scorer
from fullrank.serving.errors import add_handlers
from fullrank.serving.feedback import add_feedback
from fullrank.serving.instruments import Instruments
from fullrank.serving.limits import Limits
from fullrank.serving.pool import Pool
from fullrank.serving.routes import PATHS, add_routes
from fullrank.serving.store import EventStore
from fullrank.training.manifest import MANIFEST, Manifest


class ServingConfig(BaseModel):
    """How a server runs.

    Attributes:
        workers: pieces of work done at the same time.
        rows: rows to be scored that may be admitted and not yet done; more is answered with 429, because an answer that
            comes too late costs as much as one in time. A request for a list counts as many rows as its final stage
            scores.
        share: of these rows that one client, by its address, may hold.
        seconds: the longest that a request may take before it is dropped.
        torch_threads: threads of one request's matrix products; 1 gives the best latency for a few hundred candidates
            and leaves the other cores to other requests.
        max_body: bytes of a request's body.
        body_seconds: in which a request's body has to be there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: int = Field(default=2, ge=1)
    rows: int = Field(default=100_000, ge=1)
    share: float = Field(default=0.5, gt=0, le=1)
    seconds: float = Field(default=10.0, gt=0)
    torch_threads: int = Field(default=1, ge=1)
    max_body: int = Field(default=1_000_000, ge=1)
    body_seconds: float = Field(default=10.0, gt=0)


def create_app(
    bundle: Path | Funnel | Scorer,
    config: ServingConfig | None = None,
    *,
    store: Path | None = None,
    note: Callable[[dict[str, Any]], None] | None = None,
) -> FastAPI:
    """The application that serves a bundle. A single ranker scores rows; a funnel recommends and scores items too.

    Args:
        store: directory of what users do while it is served; without one nothing is kept of them.
        note: told what the access log says of each request.

    Raises:
        ValueError: if the directory holds no store, or the bundle cannot be opened, see `load_bundle`, or does not
            answer as it should, see `check_answers`.
    """
    config = config or ServingConfig()
    torch.set_num_threads(config.torch_threads)
    content = load_bundle(bundle) if isinstance(bundle, Path) else bundle
    check_answers(content, bundle if isinstance(bundle, Path) else None)
    events = None if store is None else EventStore(store)
    instruments = Instruments()
    pool = Pool(config.workers, config.rows, config.share, config.seconds, instruments)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await pool.start(lambda: check_answers(content))
        yield
        pool.stop()
        if events is not None:
            events.close()

    app = FastAPI(
        title="fullrank",
        version=fullrank.__version__,
        summary="A ranking funnel over HTTP.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    add_routes(app, content, _version(bundle), pool, instruments, events, _about(bundle))
    add_feedback(app, content.schema, events)
    add_handlers(app)
    app.add_middleware(
        Limits,
        max_body=config.max_body,
        body_seconds=config.body_seconds,
        instruments=instruments,
        routes=PATHS,
        note=note,
    )
    return app


def _version(bundle: Path | Funnel | Scorer) -> str:
    """What tells bundles apart: a digest of the manifest, which has those of all files."""
    if not isinstance(bundle, Path):
        return "unsaved"
    return hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()[:12]


def _about(bundle: Path | Funnel | Scorer) -> dict[str, Any]:
    """What the manifest, which was checked with the bundle, says for people."""
    if not isinstance(bundle, Path):
        return {}
    return Manifest.model_validate_json((bundle / MANIFEST).read_bytes()).about
