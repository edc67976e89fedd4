"""The part of the report that is about the funnel as a whole: what its stages lose, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fullrank.funnel import charts
from fullrank.funnel.charts import Bar, Mark, interval_of, number_of, short
from fullrank.funnel.report_parts import formatted, pair, wide
from fullrank.funnel.stages import FINAL, RETRIEVAL


def cascade(found: Mapping[str, Any]) -> str:
    """Of what `evaluate_cascade` gives."""
    stages = found["stages"]
    text = (
        f"The final stage, asked for its best {found['k']} of all {found['catalogue']:,} items, would make a list. "
        f"Here is what is left of its value after each stage, over {found['requests']:,} requests, and what each stage "
        "costs a request."
    )
    drawn = [_left(found), _true(found), _curve(found)]
    return (
        f"<h2>The funnel as a whole</h2><p>{text}</p>{pair(*drawn)}"
        + wide("stages", _table(stages, found["total"]))
        + "<p class=soft>FLOPs are those of matrix products; milliseconds those of one request alone on the machine of "
        "the evaluation. Recall is of the items of that list.</p>"
    )


def _colour(stage: str) -> str:
    return stage if stage in (RETRIEVAL, FINAL) else "early"


def _after(stage: str) -> str:
    return "after retrieval" if stage == RETRIEVAL else f"after the {stage} stage"


def _points(lost: float) -> str:
    # A stage that drops what was overvalued gains.
    return f" ({round(-100 * lost, 1) + 0.0:+.1f})" if math.isfinite(lost) else ""


def _left(found: Mapping[str, Any]) -> str:
    whole = number_of(found["whole"]["value"])
    shown = [Bar("final stage, all items", 1.0 if whole > 0 else math.nan, FINAL)]
    for stage, values in found["stages"].items():
        if stage != FINAL:
            lost = number_of(values["lost"]) / whole if whole > 0 else math.nan
            interval = interval_of(values["intervals"].get("share"))
            shown.append(Bar(_after(stage), number_of(values["share"]), _colour(stage), interval, _points(lost)))
    return charts.bars("Value by the final stage", shown, start=0.0, end=1.0, unit="a larger share", form=".1%")


def _true(found: Mapping[str, Any]) -> str:
    if "best" not in found:
        return ""
    best = number_of(found["best"]["true_value"])
    shown = [Bar("best possible list", best, "best")]
    lost = number_of(found["stages"][FINAL]["true_lost"])
    name = "final stage, all items"
    shown.append(Bar(name, number_of(found["whole"]["true_value"]), FINAL, note=_points(lost / best)))
    for stage, values in found["stages"].items():
        if stage != FINAL:
            note = _points(number_of(values["true_lost"]) / best)
            shown.append(Bar(_after(stage), number_of(values["true_value"]), _colour(stage), note=note))
    return charts.bars("True value of the list", shown, start=0.0, unit="more", form=".3f") + (
        "<p class=soft>In brackets the change in percent of the best possible list; the last bar is the funnel's "
        "list. A stage that drops items which the final stage overrates makes the list worth more.</p>"
    )


def _curve(found: Mapping[str, Any]) -> str:
    points = [(number_of(point["flops"]), number_of(point["share"])) for point in found.get("curve") or []]
    last = [stage for stage in found["stages"] if stage != FINAL][-1]
    now = Mark("this funnel", number_of(found["total"]["flops"]), number_of(found["stages"][last]["share"]))
    drawn = charts.frontier(
        "Value for FLOPs, with other sizes",
        points,
        unit="a larger share of value",
        cost="FLOPs a request",
        marks=[now],
        form=lambda number: f"{number:.0%}",
    )
    return drawn and drawn + (
        "<p class=soft>The line is what other numbers of candidates would reach; <code>fullrank funnel tune</code> "
        "chooses among them.</p>"
    )


def _table(stages: Mapping[str, Mapping[str, Any]], total: Mapping[str, Any]) -> str:
    true = any("true_value" in values for values in stages.values())
    heads = ["scores", "FLOPs", "of all", "ms, median", "ms, 99 %", "recall", "value left"]
    heads += ["true value", "lost"] if true else []
    whole, rows = number_of(total["flops"]), ""
    for stage, values in stages.items():
        flops, taken = number_of(values["flops"]), values["milliseconds"]
        cells = [f"{values['candidates']:,}", short(flops), formatted(flops / whole if whole else math.nan, ".1%")]
        cells += [formatted(taken["p50"], ".2f"), formatted(taken["p99"], ".2f")]
        cells += [formatted(values["recall"], ".3f"), formatted(values["share"], ".1%")]
        if true:
            cells += [formatted(values["true_value"], ".3f"), formatted(values["true_lost"], "+.3f")]
        rows += _row(f"<i style='background:var(--{_colour(stage)})'></i>{escape(stage)}", cells)
    taken = total["milliseconds"]
    sums = ["", short(whole), "", formatted(taken["p50"], ".2f"), formatted(taken["p99"], ".2f"), "", ""]
    rows += _row("<strong>all</strong>", sums + ([""] * 2 if true else []))
    head = "".join(f"<th>{name}" for name in heads)
    return f"<table><tr><th class=text>stage{head}{rows}</table>"


def _row(name: str, cells: Sequence[str]) -> str:
    return f"<tr><td class=text>{name}" + "".join(f"<td>{cell}" for cell in cells)


def tuned(found: Mapping[str, Any]) -> str:
    """The plot of what `tune` gives: value against the cost that has the budget."""
    by = str(found["by"])
    what = {"flops": "FLOPs", "milliseconds": "milliseconds"}[by]
    chosen, current = found["chosen"], found["current"]
    marks = [Mark("chosen", number_of(chosen[by]), number_of(chosen["share"]))]
    if current["sizes"] != chosen["sizes"]:
        marks.append(Mark("now", number_of(current[by]), number_of(current["share"])))
    return charts.frontier(
        f"Value for {what}",
        [(number_of(point[by]), number_of(point["share"])) for point in found["front"]],
        unit="a larger share of value",
        cost=f"{what} a request",
        marks=marks,
        budget=number_of(found["budget"]),
        form=lambda number: f"{number:.0%}",
    )
