"""The model card of the page: what is served, how it was judged, and how it does at the moment."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fullrank.funnel.charts import calibration
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.report_parts import BINARY, REGRESSION, pair, wide
from fullrank.funnel.scorer import Scorer
from fullrank.funnel.stages import RETRIEVAL
from fullrank.serving.instruments import Instruments
from fullrank.serving.page_answer import colour, number

_METRICS = {**BINARY, **REGRESSION}
# Parts of `about` in which no metrics are looked for: settings, and numbers of parts of the rows.
_ASIDE = {"recipe", "intervals", "slices", "baselines", "cost", "warnings"}
# So deep may metrics lie in `about`, which a person may have written.
_DEPTH = 6
_MOST_ROWS, _MOST_CURVES = 40, 4


def model_card(content: Funnel | Scorer, version: str, about: Mapping[str, Any]) -> str:
    """What is served, and what its bundle says of how well it did.

    Args:
        about: of the manifest.
    """
    tasks = ", ".join(f"{label.name} ({label.kind})" for label in content.schema.labels)
    facts = {"value": content.value.text, "tasks": tasks}
    if isinstance(content, Funnel):
        facts["items"] = f"{len(content.items):,}, {content.retriever.cost():,} of them searched"
        facts["known users"] = f"{len(content.users):,}" if content.users is not None else "none"
        if content.deadlines:
            facts["deadlines"] = ", ".join(f"{stage} {limit:g} ms" for stage, limit in content.deadlines.items())
        handed: tuple[int | None, ...] = (content.sizes.retrieve, *content.sizes.keeps(len(content.early)))
        retriever = content.retriever
        config = retriever.config.model_dump(mode="json", exclude_defaults=True)
        stages = [_stage(RETRIEVAL, retriever.name, len(content.items), None, config)]
    else:
        facts["columns"] = f"{len(content.columns):,}"
        handed, stages = (None,), []
    for (name, model), count in zip(content.rankers.items(), handed, strict=True):
        size = model.num_parameters()
        config = model.config.model_dump(mode="json", exclude_defaults=True)
        stages.append(_stage(name, model.name, count, (size.total, size.embedding), config))
    facts["model version"] = version
    listed = "".join(f"<tr><td>{escape(name)}<td><code>{escape(text)}</code>" for name, text in facts.items())
    table = (
        "<table class=narrow><tr><th class=text>stage<th class=text>model<th>candidates, at most"
        "<th>parameters<th>in tables</tr>"
        f"{''.join(stages)}</table>"
    )
    return (
        f"<h2>What is served</h2><table class=facts>{listed}</table><h3>Stages</h3>{wide('models', table)}"
        f"{_measured(about)}"
    )


def _stage(stage: str, model: str, handed: int | None, size: tuple[int, int] | None, config: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in config.items())
    small = f"<small>{escape(settings)}</small>" if settings else ""
    numbers = "<td>–<td>–" if size is None else f"<td>{size[0]:,}<td>{size[1]:,}"
    return (
        f"<tr><td class=text><i style='background:var(--{colour(stage)})'></i>{escape(stage)}"
        f"<td class=text>{escape(model)}{small}<td>{'–' if handed is None else f'{handed:,}'}{numbers}"
    )


def _measured(about: Mapping[str, Any]) -> str:
    """Metrics and calibration curves of `about`, wherever they are in it."""
    rows, curves = [], []
    for path, found in _dicts(about, ()):
        if path and path[-1] == "calibration_curve":
            drawn = _curve(" ".join((*path[:-1], "calibration")).removeprefix("metrics "), found)
            curves += [drawn] if drawn else []
        numbers = {name: found[name] for name in _METRICS if _is_number(found.get(name))}
        if numbers:
            rows.append((" ".join(path).removeprefix("metrics ").replace("stages ", ""), numbers))
    if not rows and not curves:
        return "<h2>How well it did</h2><p class=soft>The bundle holds no metrics.</p>"
    rows = rows[:_MOST_ROWS]
    names = [name for name in _METRICS if any(name in numbers for _, numbers in rows)]
    head = "".join(f"<th>{_METRICS[name]}" for name in names)
    lines = "".join(
        f"<tr><td class=text>{escape(path or 'final')}" + "".join(f"<td>{number(values.get(name))}" for name in names)
        for path, values in rows
    )
    table = wide("metrics", f"<table class=narrow><tr><th class=text>{head}</tr>{lines}</table>") if rows else ""
    return f"<h2>How well it did</h2><p class=soft>As its bundle says.</p>{table}{pair(*curves[:_MOST_CURVES])}"


def _dicts(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    if isinstance(value, Mapping) and len(path) <= _DEPTH:
        yield path, value
        for name, inner in value.items():
            if name not in _ASIDE:
                yield from _dicts(inner, (*path, str(name)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _curve(title: str, curve: Mapping[str, Any]) -> str:
    """The chart of a curve; nothing if a bundle has something else under its name."""
    columns = [curve.get(name) for name in ("predicted", "observed", "rows")]
    if not all(isinstance(column, list) and all(map(_is_number, column)) for column in columns):
        return ""
    predicted, observed, rows = (list(map(float, column or ())) for column in columns)
    if len({len(predicted), len(observed), len(rows)}) > 1 or any(n <= 0 for n in rows):
        return ""
    if not all(0 <= rate <= 1 for rate in (*predicted, *observed)):
        return ""
    return calibration(title, {"predicted": predicted, "observed": observed, "rows": rows})


def live_numbers(instruments: Instruments) -> str:
    """What the server has done since it began."""
    requests = instruments.totals("fullrank_requests_total")
    in_flight = sum(instruments.totals("fullrank_requests_in_flight").values())
    refused = sum(instruments.totals("fullrank_requests_refused_total").values())
    failed = sum(count for labels, count in requests.items() if labels[-1].startswith("5"))
    cards = "".join(
        f"<div class=card><b>{count:,.0f}</b><span>{what}</span></div>"
        for count, what in (
            (sum(requests.values()), "requests"),
            (in_flight, "in flight"),
            (refused, "refused with 429"),
            (failed, "failed with 5xx"),
        )
    )
    parts = [f"<div class=cards>{cards}</div>"]
    for name, what in (("fullrank_request_seconds", "path"), ("fullrank_stage_seconds", "stage")):
        found = instruments.quantiles(name, (0.5, 0.99))
        lines = "".join(
            f"<tr><td class=text>{escape(label)}<td>{count:,}"
            + "".join(f"<td>{1000 * seconds:.3g}" for seconds in times)
            for label, (count, times) in found.items()
        )
        if lines:
            head = f"<tr><th class=text>{what}<th>count<th>p50 ms<th>p99 ms</tr>"
            parts.append(wide(f"{what} latency", f"<table class=narrow>{head}{lines}</table>"))
    return parts[0] + pair(*parts[1:])
