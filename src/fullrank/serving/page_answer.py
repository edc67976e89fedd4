"""What the page says of an answer of `/v1/recommend` or `/v1/score`: list, stages, and the way of every candidate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fullrank.funnel import charts
from fullrank.funnel.report_parts import pair, wide
from fullrank.funnel.stages import FINAL, RETRIEVAL

# Candidates that are shown at once, and after a click; a page of thousands is of no use to anyone.
SHOWN, MOST = 20, 200
# Ways that are drawn: of what fell out, and of the list.
DROPPED_PATHS, KEPT_PATHS = 40, 60
ENCODE = "encode"


def recommended(said: Mapping[str, Any], user: str | None, *, known: bool) -> str:
    """The answer of `/v1/recommend` to a request with `explain`.

    Args:
        said: as in JSON, a `RecommendResponse`.
        user: who asked; None for nobody by name.
        known: whether the bundle knows the user.
    """
    items, explained = said["items"], said["explained"] or []
    stages = list(said["candidates"])
    heading = "The list" if user is None else f"The list for {escape(user)}"
    parts = [f"<h2 id=list tabindex=-1>{heading}</h2>"]
    if user is not None and not known:
        parts.append(
            "<p class=note>The bundle does not know this user: the list is what a stranger gets who says the same.</p>"
        )
    if said["degraded"]:
        late = ", ".join(map(escape, said["degraded"]))
        parts.append(
            f"<div class=problem role=status><b>Degraded</b>: {late} was late or failed; the order of the stage before "
            "stands in for it.</div>"
        )
    if not items:
        parts.append(
            "<p class=note>Nothing to recommend: no item of the catalogue passed the request's conditions.</p>"
        )
    else:
        parts.append(_list(items, explained, stages))
    parts.append(pair(_stages(said), _paths(explained, stages)))
    if explained:
        parts.append(_candidates(explained, stages))
    return "".join(parts)


def scored(items: Sequence[Mapping[str, Any]]) -> str:
    """The answer of `/v1/score` to rows."""
    tasks = list(items[0]["predictions"]) if items else []
    head = "".join(f"<th>{escape(name)}" for name in ("value", *tasks))
    lines = "".join(
        f"<tr><td class=place>{place}<td>{number(item['value'])}"
        + "".join(f"<td>{number(item['predictions'].get(task))}" for task in tasks)
        for place, item in enumerate(items, 1)
    )
    table = f"<table class=narrow><tr><th class=place>row{head}</tr>{lines}</table>"
    return f"<h2 id=list tabindex=-1>The scores</h2>{wide('scores', table)}"


def number(value: Any) -> str:
    """A number for a cell; a dash for none."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


def _list(items: Sequence[Mapping[str, Any]], explained: Sequence[Mapping[str, Any]], stages: Sequence[str]) -> str:
    ranks = {str(item["item_id"]): item["ranks"] for item in explained}
    tasks = list(dict.fromkeys(task for item in items for task in item["predictions"]))
    # What is the same for all says nothing.
    beside = [
        name for name, usual in (("propensity", 1.0), ("payment", None)) if any(item[name] != usual for item in items)
    ]
    head = "".join(f"<th>{escape(name)}" for name in ("value", *tasks, *beside))
    head += "".join(f"<th>{escape(stage)}<small> rank</small>" for stage in stages)
    lines = []
    for place, item in enumerate(items, 1):
        cells = [item["value"], *(item["predictions"].get(task) for task in tasks), *(item[name] for name in beside)]
        own = ranks.get(str(item["item_id"]), {})
        lines.append(
            f"<tr><td class=place>{place}. <code>{escape(str(item['item_id']))}</code>"
            + "".join(f"<td>{number(cell)}" for cell in cells)
            + "".join(f"<td>{own.get(stage, '–')}" for stage in stages)
        )
    return wide("the list", f"<table><tr><th class=place>item{head}</tr>{''.join(lines)}</table>")


def colour(stage: str) -> str:
    """The colour that a stage has on the page."""
    return stage if stage in (RETRIEVAL, FINAL) else "base" if stage == ENCODE else "early"


def _stages(said: Mapping[str, Any]) -> str:
    """How many candidates each stage was handed, and how long it took."""
    handed, timings = said["candidates"], said["timings"]
    after = [*list(handed.values())[1:], len(said["items"])]
    on = dict(zip(handed, after, strict=True))
    longest = max([*timings.values(), 1e-9])
    lines = []
    for stage in dict.fromkeys((*timings, *handed)):
        spent = timings.get(stage)
        late = " <span class=late>degraded</span>" if stage in said["degraded"] else ""
        passed = f"{handed[stage]:,} → {on[stage]:,}" if stage in handed else ""
        # A bar has at least a pixel or two.
        bar = (
            ""
            if spent is None
            else f"<span class=track><span class=bar style='width:{max(2, 100 * spent / longest):.0f}%;"
            f"background:var(--{colour(stage)})'></span></span>"
        )
        lines.append(
            f"<tr><td class=text><i style='background:var(--{colour(stage)})'></i>{escape(stage)}{late}<td>{passed}"
            f"<td>{'–' if spent is None else f'{spent:.2f}'}{bar}"
        )
    total = sum(timings.values())
    table = (
        "<table class=narrow><tr><th class=text>stage<th>candidates<th>milliseconds<span class=track></span></tr>"
        f"{''.join(lines)}<tr><td class=text>all<td><td>{total:.2f}<span class=track></span></table>"
    )
    return f"<h3>The stages</h3>{wide('stages', table)}"


def _paths(explained: Sequence[Mapping[str, Any]], stages: Sequence[str]) -> str:
    """Ranks of candidates from stage to stage, on a logarithmic axis, the first at the top."""
    if not explained or len(stages) < 2:
        return ""
    left, right, top, bottom = 40.0, charts.WIDTH - 24.0, 30.0, 250.0
    last = max(max(item["ranks"].values(), default=1) for item in explained)

    def x(stage: int) -> float:
        return left + (right - left) * stage / (len(stages) - 1)

    def y(rank: int) -> float:
        return top + (bottom - top) * (math.log(rank) / math.log(last) if last > 1 else 0.0)

    drawn = []
    for tick in sorted({1, *(10**power for power in range(1, 9) if 10**power < last), last}):
        drawn.append(
            f"<line class=grid x1='{left}' x2='{right}' y1='{y(tick):.1f}' y2='{y(tick):.1f}'/>"
            if 10 * tick <= last * 8 or tick == last
            else ""
        )
        if tick == last or last / tick > 1.6:
            drawn.append(
                f"<text class=soft x='{left - 8}' y='{y(tick) + 4:.1f}' text-anchor=end>{charts.short(tick)}</text>"
            )
    kept = [item for item in explained if item["fell_out"] is None]
    dropped = [item for item in explained if item["fell_out"] is not None]
    step = max(1, math.ceil(len(dropped) / DROPPED_PATHS))
    for item, name in (
        *((item, "path") for item in dropped[::step]),
        *((item, "path kept") for item in kept[:KEPT_PATHS]),
    ):
        points = [(x(place), y(item["ranks"][s])) for place, s in enumerate(stages) if s in item["ranks"]]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        drawn.append(
            f"<polyline class='{name}' points='{line}'><title>{escape(str(item['item_id']))}</title></polyline>"
        )
        end, colour_ = points[-1], "final" if name != "path" else "base"
        drawn.append(f"<circle cx='{end[0]:.1f}' cy='{end[1]:.1f}' r='2.5' fill='var(--{colour_})'/>")
    for place, stage in enumerate(stages):
        anchor = "start" if place == 0 else "end" if place == len(stages) - 1 else "middle"
        at = x(place) + (16 if anchor == "end" else -4 if anchor == "start" else 0)
        drawn.append(
            f"<line class=axis x1='{x(place):.1f}' x2='{x(place):.1f}' y1='{top - 6}' y2='{bottom + 4}'/>"
            f"<text x='{at:.1f}' y='{top - 14}' text-anchor={anchor}>{escape(stage)}</text>"
        )
    others = "what fell out" if step == 1 else f"one in {step} of what fell out"
    drawn.append(
        f"<text class=soft x='{left - 4}' y='{bottom + 26}'>rank, by stage. Blue: the list;</text>"
        f"<text class=soft x='{left - 4}' y='{bottom + 43}'>grey: {others}</text>"
    )
    return charts.figure("How candidates moved", "".join(drawn), bottom + 50)


def _candidates(explained: Sequence[Mapping[str, Any]], stages: Sequence[str]) -> str:
    """Every candidate: those that came furthest first."""
    depth = {stage: place for place, stage in enumerate(stages)}

    def order(item: Mapping[str, Any]) -> tuple[int, int]:
        end = item["fell_out"]
        return -depth.get(end, len(stages)), item["ranks"].get(end or stages[-1], 0)

    ordered = sorted(explained, key=order)
    rankers = [stage for stage in stages if stage != RETRIEVAL]
    tasks = list(ordered[0]["predictions"][rankers[-1]])
    groups = [("rank", list(stages)), ("value", list(stages)), *((task, rankers) for task in tasks)]
    over = "".join(f"<th class=over colspan={len(names)}>{escape(name)}" for name, names in groups)
    under = "".join(f"<th>{escape(name)}" for _, names in groups for name in names)
    head = f"<tr><th class=place rowspan=2>item<th class=text rowspan=2>what became of it{over}</tr><tr>{under}</tr>"

    def line(item: Mapping[str, Any]) -> str:
        kept = item["fell_out"] is None
        cells = [str(item["ranks"].get(stage, "–")) for stage in stages]
        cells += [number(item["values"].get(stage)) for stage in stages]
        cells += [number(item["predictions"][stage].get(task)) for task in tasks for stage in rankers]
        what = "in the list" if kept else escape(item["reason"])
        return (
            f"<tr{' class=kept' if kept else ''}><td class=place><code>{escape(str(item['item_id']))}</code>"
            f"<td class='text what'>{what}" + "".join(f"<td>{cell}" for cell in cells)
        )

    def table(rows: Sequence[Mapping[str, Any]]) -> str:
        return wide("candidates", f"<table>{head}{''.join(map(line, rows))}</table>")

    more, left = ordered[SHOWN:MOST], len(ordered) - MOST
    text = (
        "<h3>Every candidate</h3><p class=soft>What retrieval found, those that came furthest first. A stage's value "
        "is what it would give the candidate, whether it was handed it or not; a rank is among what it was handed.</p>"
        + table(ordered[:SHOWN])
    )
    if more:
        text += f"<details><summary>{len(more):,} more candidates</summary>{table(more)}</details>"
    if left > 0:
        text += f"<p class=soft>{left:,} others fell out before; <code>/v1/recommend</code> tells all with explain.</p>"
    return text
