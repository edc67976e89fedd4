"""The HTTP application: a bundle behind `/v1/recommend` and `/v1/score`."""

from __future__ import annotations

import gc
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

import fullrank
from fullrank.funnel.canary import check_answers
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.scorer import Scorer
from fullrank.serving.admin import Bearer, add_admin, describe_token
from fullrank.serving.embedding_store import EmbeddingStore
from fullrank.serving.errors import add_handlers
from fullrank.serving.experiment import CONTROL, Experiment, add_experiment
from fullrank.serving.feedback import add_feedback
from fullrank.serving.impressions import ImpressionLog
from fullrank.serving.instruments import Instruments
from fullrank.serving.items import add_items
from fullrank.serving.limits import Limits
from fullrank.serving.live import Live
from fullrank.serving.pool import Pool
from fullrank.serving.routes import PATHS, add_routes
from fullrank.serving.shared import Shared, SharedArm
from fullrank.serving.shared_versions import SharedVersions, opened_alike
from fullrank.serving.store import Feedback
from fullrank.serving.stores import opened_events, opened_items
from fullrank.serving.student_histories import StudentHistories
from fullrank.serving.versions import Opened, Versions, opened, target_of
from fullrank.training.manifest import MANIFEST, Manifest
from fullrank.training.memory import return_freed_memory

# After which a thread lets another one go on: those that score keep the one that talks to clients waiting less.
SWITCH_SECONDS = 0.001


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
    store: Path | str | None = None,
    token: str | None = None,
    arms: Mapping[str, tuple[Path | Funnel, float]] | None = None,
    salt: str = "",
    log_impressions: bool = False,
    note: Callable[[dict[str, Any]], None] | None = None,
    shared: Shared | None = None,
    embeddings: Path | None = None,
) -> FastAPI:
    """The application that serves a bundle. A single ranker scores rows; a funnel recommends and scores items too.

    Args:
        bundle: its directory, or that of a stream, whose pointer is followed.
        token: that requests for `/v1` have to carry; with one, bundles can be looked for and rolled back by a request.
        store: directory of what users do while it is served, or URL of a Redis, for several hosts; without one nothing
            is kept of them.
        arms: other bundles of funnels by name, each with the share of users that it answers.
        salt: of the split; another one splits users independently.
        log_impressions: keep in the store the lists that are answered, with propensities and features.
        note: told what the access log says of each request.
        shared: with the other processes of the server that run the same application; `bundle` is then a directory, and
            so are those of the arms.
        embeddings: directory of a store of a foundation model's embeddings, for students among the rankers.

    Raises:
        ValueError: if a directory holds no store, Redis does not answer, or the bundle cannot be opened, see
            `load_bundle`, or does not answer as it should, see `check_answers`; or lists are to be logged without a
            store or a funnel.
    """
    config = config or ServingConfig()
    torch.set_num_threads(config.torch_threads)
    area = None if shared is None else shared.arm(CONTROL)
    first = _opened(bundle, area) if isinstance(bundle, Path) else None
    if first is not None and first.content is not None:
        content, version = first.content, first.target.version
    else:
        assert not isinstance(bundle, Path)
        content, version = bundle, "unsaved"
        check_answers(content)
    if log_impressions and (store is None or not isinstance(content, Funnel)):
        need = "a store, --store DIR" if store is None else "a funnel, and this bundle is a single ranker"
        raise ValueError(f"--log-impressions needs {need}")
    events = None if store is None else opened_events(store)
    items = opened_items(store if shared is None else store or shared.directory)
    histories = StudentHistories(None if embeddings is None else EmbeddingStore(embeddings))
    made = partial(Live, store=items, check=histories.check, events=events)
    live = made(content, version, told=None if area is None else area.tell_applied)
    instruments = Instruments(None if shared is None else shared.metrics)
    impressions = ImpressionLog(events, instruments) if log_impressions and events is not None else None
    experiment, others = None, dict[str, tuple[Live, Opened | None]]()
    areas = {} if shared is None else {name: shared.arm(name) for name in arms or ()}
    if arms:
        reward = next((label.name for label in content.schema.labels if label.kind == "binary"), "")
        others = {name: _arm(name, arm, made, areas.get(name)) for name, (arm, _) in arms.items()}
        lives = {name: (others[name][0], arms[name][1]) for name in arms}
        experiment = Experiment(live, lives, salt, reward, None if shared is None else shared.counts)
    beside = [] if experiment is None else [each for each in experiment.arms.values() if each is not live]
    instruments.items.set_function(lambda: _items(live))
    watched = dict[str, Versions]()
    if isinstance(bundle, Path) and first is not None:
        watched[CONTROL] = _watched(bundle, first, live, instruments, area)
    for name, (arm, _) in (arms or {}).items():
        arm_live, arm_first = others[name]
        if isinstance(arm, Path) and arm_first is not None:
            watched[name] = _watched(arm, arm_first, arm_live, instruments, areas.get(name), control=False)
    pool = Pool(config.workers, config.rows, config.share, config.seconds, instruments)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        await pool.start(lambda: check_answers(live.served.content))
        # What stays as long as the server need not be looked through for garbage again and again.
        gc.collect()
        gc.freeze()
        if shared is not None:
            return_freed_memory()
        yield
        sys.setswitchinterval(interval)
        pool.stop()
        gc.unfreeze()
        for each in watched.values():
            each.stop()
        for served in (live, *beside):
            served.stop()
        items.close()
        if impressions is not None:
            impressions.close()
        if events is not None:
            events.close()
        if experiment is not None:
            experiment.close()

    app = FastAPI(
        title="fullrank",
        version=fullrank.__version__,
        summary="A ranking funnel over HTTP.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    about = partial(_about, watched.get(CONTROL))
    add_routes(app, live, pool, instruments, events, experiment, about, impressions, histories)

    def told(feedback: Sequence[Feedback]) -> None:
        for arm in () if experiment is None else experiment.rewarded(feedback):
            instruments.arm_rewarded.labels(arm).inc()

    add_feedback(app, content.schema, events, None if experiment is None else told, histories.forget)
    add_items(app, live, beside, None if shared is None else shared.all_applied)
    add_experiment(app, experiment)
    app.state.versions = watched
    app.state.arms = {CONTROL: live} if experiment is None else experiment.arms
    if token is not None:
        add_admin(app, watched)
        app.add_middleware(Bearer, token=token)
        describe_token(app)
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


def _opened(place: Path, area: SharedArm | None) -> Opened:
    return opened(target_of(place)) if area is None else opened_alike(place, area)


def _watched(
    place: Path, first: Opened, live: Live, instruments: Instruments, area: SharedArm | None, *, control: bool = True
) -> Versions:
    if area is None:
        return Versions(place, first, live, instruments, control=control)
    return SharedVersions(place, first, live, instruments, area, control=control)


def _arm(
    name: str, bundle: Path | Funnel, made: Callable[..., Live], area: SharedArm | None
) -> tuple[Live, Opened | None]:
    """What serves an arm, and how it was opened."""
    first = _opened(bundle, area) if isinstance(bundle, Path) else None
    content = bundle if first is None else first.content
    if not isinstance(content, Funnel):
        raise ValueError(f"--arm {name}: {bundle} is a single ranker, and an experiment is about lists")
    version, told = "unsaved" if first is None else first.target.version, None if area is None else area.tell_applied
    return made(content, version, told=told), first


def _items(live: Live) -> int:
    content = live.served.content
    return len(content.items) if isinstance(content, Funnel) else 0


def _about(versions: Versions | None) -> dict[str, Any]:
    """What the manifest, which was checked with the bundle, says for people."""
    if versions is None:
        return {}
    return Manifest.model_validate_json((versions.now.bundle / MANIFEST).read_bytes()).about
