"""The parts of the report that are about what was measured: each takes what `evaluate_funnel` gives, and is HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fullrank.funnel import charts
from fullrank.funnel.charts import Bar, interval_of, number_of
from fullrank.funnel.stages import FINAL, RETRIEVAL

# What the page calls the thing that is judged: the final stage of a funnel, or a model that stands alone.
FINAL_STAGE, MODEL = "final stage", "model"
# Metrics of a binary task, and of a regression, in the order of the tables; and how they are called.
BINARY = {
    "ne": "NE",
    "auc": "AUC",
    "calibration": "calibration",
    "gauc": "GAUC",
    "rate": "rate",
    "gap_closed": "gap closed",
}
REGRESSION = {"rmse": "RMSE", "mae": "MAE", "mean": "mean", "calibration": "calibration"}
# A slice of few rows may have any; the small charts end here.
_WORST_NE = 1.5
_BASELINES = {"item_rate": "the item's mean"}


def warnings(judge: str, found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return ""
    items = []
    for warning in found:
        stage = str(warning.get("stage", FINAL))
        where = judge if stage == FINAL else stage if stage == RETRIEVAL else f"{stage} stage"
        message, advice = escape(str(warning.get("message", ""))), escape(str(warning.get("advice") or ""))
        items.append(
            f"<li><strong>{escape(where[:1].upper() + where[1:])}</strong>, {message}. {advice[:1].upper()}{advice[1:]}"
        )
    title = "One thing to look at" if len(found) == 1 else f"{len(found)} things to look at"
    return f"<div class=warnings style='border-color:var(--warn)'><h2>{title}</h2><ul>{''.join(items)}</ul></div>"


ESTIMATORS = {"ips": "IPS", "snips": "self-normalised IPS", "dr": "doubly robust"}


def cards(judge: str, final: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    recall, value = report.get("recall") or {}, report.get("true_value")
    made: list[tuple[str, str, str]] = []

    def card(key: str, form: str, text: str, *notes: str) -> None:
        if key in final:
            interval = interval_of((final.get("intervals") or {}).get(key))
            between = "" if interval is None else f"95 % interval {interval[0]:{form}} to {interval[1]:{form}}"
            number = number_of(final[key])
            if math.isfinite(number):
                made.append((f"{number:{form}}", text, "; ".join(filter(None, (between, *notes)))))
            else:
                made.append(("–", text, "undefined on these rows"))

    of = f", {judge}" if judge != MODEL else ""
    oracle = f"oracle {formatted(final['oracle_ne'], '.4f')}" if "oracle_ne" in final else ""
    card("ne", ".4f", f"normalized entropy{of}", "lower is better; the mean rate has 1", oracle)
    card("gap_closed", ".0%", "of the way from the mean to the oracle")
    card("auc", ".4f", f"AUC{of}", "higher is better; chance has 0.5")
    if "ne" in final:
        card("calibration", ".3f", "predicted over observed", "1 is unbiased")
    card("rmse", ".4g", f"root mean squared error{of}", "lower is better")
    card("mae", ".4g", "mean absolute error", "lower is better")
    card("mean", ".4g", "mean of what was observed")
    if "retrieval_at_100" in recall:
        made.append((formatted(recall["retrieval_at_100"], ".0%"), "recall@100 of retrieval", ""))
    if value is not None:
        made.append((formatted(value["share_of_best"], ".0%"), "of the best attainable value is earned", ""))
    items = "".join(
        f"<div class=card><b>{escape(big)}</b><span>{escape(text)}</span><small>{escape(note)}</small></div>"
        for big, text, note in made
    )
    return f"<div class=cards>{items}</div>"


def stages(judge: str, task: str, report: Mapping[str, Any]) -> str:
    """Each stage against baselines and the oracle, by the first task."""
    stages, baselines = report["stages"], (report.get("baselines") or {}).get(task) or {}
    rivals = [(_rival(name), values, "base") for name, values in baselines.items()]
    shown = [*rivals, *((f"{stage} stage", found[task], "early") for stage, found in stages.items() if stage != FINAL)]
    shown.append((judge, stages[FINAL][task], "final"))
    final = stages[FINAL][task]

    def drawn(key: str, title: str, start: float, *, lower: bool, baseline: str | None, form: str = ".4f") -> str:
        found = [] if baseline is None else [Bar(baseline, start, "base")]
        found += [
            Bar(name, number_of(values.get(key)), colour, interval_of((values.get("intervals") or {}).get(key)))
            for name, values, colour in shown
            if key in values
        ]
        if not any(math.isfinite(bar.number) for bar in found[baseline is not None :]):
            return ""
        if f"oracle_{key}" in final:
            found.append(Bar("oracle", number_of(final[f"oracle_{key}"]), "best"))
        unit = f"{'lower' if lower else 'higher'} {key.upper()}"
        return charts.bars(title, found, start=start, unit=unit, lower_is_better=lower, form=form)

    if "ne" in final:
        text = (
            "Normalized entropy (NE) is the cross-entropy of the predictions over that of always predicting the mean "
            "rate; AUC is the chance that a positive row is put before a negative one."
        )
        if "oracle_ne" in final:
            text += (
                " The oracle predicts the true probability of every row; what remains there is chance, and no model "
                "gets beyond it."
            )
        drawings = [
            drawn("ne", "Normalized entropy", 1.0, lower=True, baseline="predict the mean"),
            drawn("auc", "AUC", 0.5, lower=False, baseline="chance"),
        ]
        if not any(drawings):
            text += " Both need positive and negative rows, and here is one kind only: they are undefined."
    else:
        start = max((number_of(values.get("rmse")) for _, values, _ in rivals), default=math.nan)
        if not math.isfinite(start):
            return ""
        text = "The root mean squared error (RMSE) is in the unit of the label."
        drawings = [drawn("rmse", "Root mean squared error", start, lower=True, baseline=None, form=".4g")]
    heading = "Each stage against baselines" if len(stages) > 1 else "The model against baselines"
    return f"<h2>{heading}: {escape(task)}</h2><p>{text}</p>{pair(*drawings)}"


def _rival(name: str) -> str:
    return _BASELINES.get(name, name.replace("_", " "))


def tables(judge: str, report: Mapping[str, Any]) -> str:
    """All tasks of all stages, baselines and the oracle in numbers."""
    rows = [
        (*((judge.removesuffix(" stage"), FINAL) if stage == FINAL else (stage, "early")), task, values)
        for stage, tasks in report["stages"].items()
        for task, values in tasks.items()
    ]
    rows += [
        ("oracle", "best", task, {"ne": values["oracle_ne"], "auc": values["oracle_auc"]})
        for task, values in report["stages"][FINAL].items()
        if "oracle_ne" in values
    ]
    rows += [
        (_rival(name), "base", task, values)
        for task, found in (report.get("baselines") or {}).items()
        for name, values in found.items()
    ]
    return _table(BINARY, [row for row in rows if "ne" in row[3]]) + _table(
        REGRESSION, [row for row in rows if "ne" not in row[3]]
    )


def _table(columns: Mapping[str, str], rows: Sequence[tuple[str, str, str, Mapping[str, Any]]]) -> str:
    if not rows:
        return ""
    shown = [key for key in columns if any(key in values for *_, values in rows)]
    head = "".join(f"<th>{columns[key]}" for key in shown)
    body = "".join(
        f"<tr><td class=text><i style='background:var(--{colour})'></i>{escape(name)}<td class=text>{escape(task)}"
        + "".join(_cell(values, key) if key in values else "<td>" for key in shown)
        for name, colour, task, values in rows
    )
    return wide("metrics", f"<table><tr><th class=text>stage<th class=text>task{head}{body}</table>")


def _cell(values: Mapping[str, Any], key: str) -> str:
    form = ".1%" if key == "gap_closed" else ".3f" if key == "calibration" else ".4g" if key in REGRESSION else ".4f"
    interval = interval_of((values.get("intervals") or {}).get(key))
    small = "" if interval is None else f"<small>{interval[0]:{form}}–{interval[1]:{form}}</small>"
    return f"<td>{formatted(values[key], form)}{small}"


def calibration(judge: str, curve: Mapping[str, Any]) -> str:
    drawn = charts.calibration(
        "Observed and predicted rate" if judge == MODEL else f"Observed and predicted rate, {judge}", curve
    )
    if not drawn:
        return ""
    return (
        "<h2>Calibration</h2><p>Ten bins of equally many rows. On the dashed line predictions are unbiased; a bin "
        "above it is predicted too low, one below it too high. A whisker that touches the line may be chance.</p>"
        + drawn
    )


def recall(report: Mapping[str, Any]) -> str:
    """What is left of the positive rows' items after each stage."""
    found, early = report["recall"], [stage for stage in report["stages"] if stage != FINAL]
    alone = {
        "popularity_at_100": ("100 most popular items", "base"),
        "retrieval_at_100": ("retrieval, first 100", RETRIEVAL),
    }
    on_the_way = {
        RETRIEVAL: ("after retrieval", RETRIEVAL),
        **{stage: (f"after the {stage} stage", "early") for stage in early},
        "final_at_100": ("final list, first 100", FINAL),
    }
    shown = [Bar(name, number_of(found[key]), colour) for key, (name, colour) in alone.items() if key in found]
    before = 1.0
    for key, (name, colour) in on_the_way.items():
        share = number_of(found.get(key))
        shown.append(Bar(name, share, colour, note=f" (−{100 * (before - share):.1f})" if math.isfinite(share) else ""))
        before = share
    text = (
        f"Of the items of {found.get('requests', 0):,.0f} positive rows, those that are still there after each stage. "
        "After retrieval candidates are sorted by value, so cheap items that were wanted do drop out. In brackets the "
        "percentage points that are lost to the line before."
    )
    drawn = charts.bars("Items that are still there", shown, start=0.0, end=1.0, unit="a larger share", form=".1%")
    return f"<h2>What each stage loses</h2><p>{text}</p>{_early_recall(report.get('early_recall') or {})}{drawn}"


def _early_recall(found: Mapping[str, Any]) -> str:
    if "top_10" not in found:
        return ""
    text = (
        f"What is before the final stage keeps {formatted(found['top_10'], '.1%')} of the ten items that the final "
        "stage, scoring everything that retrieval found, would put first"
    )
    if "value_of_top_10" in found:
        text += f", and {formatted(found['value_of_top_10'], '.1%')} of their value"
    return f"<p>{text}.</p>"


def slices(parts: Sequence[Mapping[str, Any]]) -> str:
    """Where the model is good and where not, with small intervals of the NE."""
    if not parts:
        return ""
    found = [(number_of(s.get("ne")), interval_of((s.get("intervals") or {}).get("ne"))) for s in parts]
    ends = [1.0, *(end for ne, interval in found for end in (ne, *(interval or ())) if math.isfinite(end))]
    span = (min(max(ends), _WORST_NE), min(ends))
    rows, before = "", None
    for s, (ne, interval) in zip(parts, found, strict=True):
        if s["by"] != before:
            rows += f"<tr class=group><td colspan=7>by {escape(str(s['by']))}"
        before = s["by"]
        rows += (
            f"<tr><td class=text>{escape(str(s['slice']))}"
            f"<td>{charts.interval_cell(ne, interval, span, 1.0)}"
            + "".join(_cell({key: None, **s}, key) for key in ("ne", "auc", "calibration"))
            + f"<td>{number_of(s.get('rows')):,.0f}<td>{formatted(s.get('rate'), '.4f')}"
        )
    head = "<th class=text>slice<th class=text>NE, better →<th>NE<th>AUC<th>calibration<th>rows<th>rate"
    return (
        f"<h2>Slices: {escape(str(parts[0].get('task', '')))}</h2><p>The NE of a slice is against the slice's own "
        "rate; the line in the small charts is 1, predicting that rate.</p>"
        + wide("slices", f"<table><tr>{head}{rows}</table>")
    )


def true_value(value: dict[str, Any]) -> str:
    bars = [
        Bar("random ads", value["random"], "base"),
        Bar("the log's policy", value["log"], "base"),
        Bar("this funnel", value["funnel"], FINAL),
        Bar("best possible", value["best"], "best"),
    ]
    parts = [
        "<h2>What the lists are really worth</h2>",
        f"<p>Expected value of one request, the sum over its slots of bid times <em>true</em> click probability, over "
        f"{value['requests']:,} requests. The best possible list knows the true probability of every living ad; the "
        "log's policy went by interest and took no account of bids.</p>",
        charts.bars("Value of a request", bars, start=0.0, unit="more", form=".3f"),
        "<h2>Some ranked lists</h2>"
        "<p>What the final stage predicts, and the true probability of a click had the ad been shown in that slot. "
        "A check marks ads that the best possible list has too. Predictions in a list run high: a list picks the ads "
        "whose predictions err upwards.</p>",
    ]
    for sample in value["samples"]:
        rows = "".join(
            f"<tr><td>{item['item_id']}<td>{item['bid']:.2f}<td>{item['value']:.3f}"
            f"<td>{_probability(item['predicted'], FINAL)}<td>{_probability(item['true'], 'best')}"
            f"<td class=yes>{'✓' if item['best'] else ''}"
            for item in sample["items"]
        )
        parts.append(
            f"<p><strong>User {sample['user_id']}</strong></p><div class=wide><table><tr><th>ad<th>bid<th>value"
            f"<th>predicted click<th>true click<th>in the best list{rows}</table></div>"
        )
    return "\n".join(parts)


def off_policy(found: Mapping[str, Any]) -> str:
    """What the funnel would have earned on a log that was drawn with propensities."""
    names = {"logged": "what was logged", **ESTIMATORS}
    bars = [
        Bar(
            text,
            number_of(found[name]["value"]),
            "base" if name == "logged" else FINAL,
            interval_of(found[name]["interval"]),
        )
        for name, text in names.items()
        if name in found
    ]
    policy = ", ".join(str(value) for value in found["policy"].values())
    alarms = "".join(f"<li>{escape(text)}" for text in found["warnings"])
    return (
        "<h2>What the funnel would have earned on this log</h2>"
        f"<p>Value of a request by <em>{escape(found['reward'])}</em> under the slot policy {escape(policy)}, from "
        f"{found['slates']:,} lists of {found['users']:,} users that were drawn with logged propensities. Effective "
        f"sample size {found['effective_sample_size']:,.0f}, largest weight {found['largest_weight']:,.1f}, mean "
        f"weight {found['mean_weight']:.3f}.</p>"
        + charts.bars("Value of a request", bars, start=0.0, unit="more", form=".4f")
        + (f"<ul>{alarms}</ul>" if alarms else "")
    )


def _probability(p: float, colour: str) -> str:
    style = f"width:{max(1.0, 80 * p):.0f}px;background:var(--{colour})"
    return f"{p:.3f}<span class=track><span class=bar style='{style}'></span></span>"


def formatted(value: object, form: str) -> str:
    number = number_of(value)
    return f"{number:{form}}" if math.isfinite(number) else "undefined"


def pair(*parts: str) -> str:
    """Beside each other where there is room."""
    found = "".join(f"<div>{part}</div>" for part in parts if part)
    return f"<div class=pair>{found}</div>" if found else ""


def wide(what: str, table: str) -> str:
    return f"<div class=wide tabindex=0 role=region aria-label='{escape(what)}'>{table}</div>"
