"""What a server would serve, without a port."""

from __future__ import annotations

import asyncio
import resource
import sys
from typing import Any

from fastapi import FastAPI

from fullrank.funnel.funnel import Funnel
from fullrank.funnel.scorer import Scorer
from fullrank.funnel.stages import FINAL, RETRIEVAL
from fullrank.serving.experiment import CONTROL
from fullrank.serving.live import Live
from fullrank.serving.routes import PATHS


def dry_run(app: FastAPI) -> dict[str, Any]:
    """Start an application, with the answers that it gives for a trial, end it, and say what it would serve.

    Returns:
        `served` by arm, `routes`, and `peak_memory_bytes` of this process so far.
    """

    async def run() -> dict[str, Any]:
        async with app.router.lifespan_context(app):
            return {name: _served(live) for name, live in app.state.arms.items()}

    served = asyncio.run(run())
    paths = app.openapi()["paths"]
    routes = [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]
    routes += [f"GET {path}" for path in sorted(PATHS - paths.keys())]
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "served": served,
        "routes": routes,
        "peak_memory_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def dry_run_text(said: dict[str, Any]) -> str:
    """The same for people."""
    lines = []
    for arm, each in said["served"].items():
        known = "".join(f", {each[what]:,} {what}" for what in ("items", "users") if each[what] is not None)
        lines.append(
            f"{'' if arm == CONTROL else f'{arm}: '}model {each['model_version']}{known}, value {each['value']}"
        )
        for stage in each["stages"]:
            candidates = "" if stage["candidates"] is None else f"  {stage['candidates']:,} candidates at most"
            lines.append(f"  {stage['stage']:<10} {stage['kind']}{candidates}")
    lines.append("routes")
    lines += [f"  {route}" for route in said["routes"]]
    lines.append(f"memory: at most {said['peak_memory_bytes'] / 2**20:,.0f} MiB until it was ready")
    return "\n".join(lines)


def _served(live: Live) -> dict[str, Any]:
    content, version, _ = live.served
    funnel = content if isinstance(content, Funnel) else None
    return {
        "model_version": version,
        "items": None if funnel is None else len(funnel.items),
        "users": None if funnel is None or funnel.users is None else len(funnel.users),
        "value": content.value.text,
        "stages": _stages(content),
    }


def _stages(content: Funnel | Scorer) -> list[dict[str, Any]]:
    if isinstance(content, Scorer):
        return [{"stage": FINAL, "kind": content.model.name, "candidates": None}]
    handed = (content.sizes.retrieve, *content.sizes.keeps(len(content.early)))
    stages = [{"stage": RETRIEVAL, "kind": content.retriever.name, "candidates": len(content.items)}]
    for (name, ranker), count in zip(content.rankers.items(), handed, strict=True):
        stages.append({"stage": name, "kind": ranker.name, "candidates": min(count, len(content.items))})
    return stages
