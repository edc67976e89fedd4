"""One HTML page about a trained funnel or ranker: no script, no outside file, charts as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from fullrank.data import atomic

_STYLE = """
:root{--ink:#1b2430;--soft:#5c6878;--line:#dfe4ea;--card:#f6f8fa;--back:#fff;--main:#2457c5;--second:#e07b1f;--good:#1f8a55}
@media(prefers-color-scheme:dark){:root{--ink:#e2e7ee;--soft:#98a5b6;--line:#303947;--card:#1d232c;--back:#141920;
--main:#7aa2ff;--second:#f2a65a;--good:#5ecb95}}
body{font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;color:var(--ink);background:var(--back);
max-width:60rem;margin:2.5rem auto;padding:0 1.25rem}
h1{font-size:1.7rem;margin:0}h2{font-size:1.2rem;margin:2.5rem 0 .25rem}p{margin:.35rem 0;max-width:46rem}
.soft,figcaption{color:var(--soft);font-size:.92rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.4rem,1fr));gap:.75rem;margin:1.5rem 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.75rem 1rem}
.card b{display:block;font-size:1.55rem;font-variant-numeric:tabular-nums}
.card span{color:var(--soft);font-size:.88rem}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(22rem,1fr));gap:1.5rem;align-items:start}
figure{margin:.75rem 0}svg{width:100%;max-width:34rem;height:auto;font:12px system-ui,sans-serif}
svg text{fill:var(--ink)}svg .soft{fill:var(--soft)}svg .grid{stroke:var(--line)}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;margin:.5rem 0}
th,td{padding:.3rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--soft);font-size:.88rem}th:first-child,td:first-child{text-align:left}
td .track{display:inline-block;width:80px;margin-left:.5rem;text-align:left}
td .bar{display:inline-block;height:.6rem;border-radius:2px;background:var(--main);vertical-align:middle}
.facts td:last-child{text-align:left;width:100%;white-space:normal}
.yes{color:var(--good)}
"""

Bar = tuple[str, float, str]


def write_report(path: Path, title: str, report: dict[str, Any], facts: dict[str, str]) -> None:
    """Write the page.

    Args:
        report: of `evaluate_funnel`; with the key `true_value` the result of that function.
        facts: what was run, for the table at the end.
    """
    atomic.write_text(path, render(title, report, facts))


def render(title: str, report: dict[str, Any], facts: dict[str, str]) -> str:
    """The page as text."""
    stages = report["stages"]
    task = next(iter(stages["final"]))
    final, early = stages["final"][task], {stage: tasks[task] for stage, tasks in stages.items() if stage != "final"}
    recall, value = report.get("recall", {}), report.get("true_value")
    judge = "final stage" if "recall" in report else "ranker"
    against = " against the oracle" if "oracle_ne" in final else ""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{escape(title)}</title><style>{_STYLE}</style><h1>{escape(title)}</h1>",
        f"<p class=soft>Measured on the {escape(report['split'])} split: {report['rows']:,} impressions that come "
        "after everything the models were trained on.</p>",
        _cards(judge, final, recall, value),
        f"<h2>{'Each stage' if early else f'The {judge}'}{against}: {escape(task)}</h2>",
        "<p>Normalized entropy is the cross-entropy of the predictions over that of always predicting the mean rate: "
        "1 is the mean, lower is better. The oracle predicts the true probability of every impression; what remains "
        "there is chance, and no model can go below it.</p>"
        if "oracle_ne" in final
        else "<p>Normalized entropy is the cross-entropy of the predictions over that of always predicting the mean "
        "rate: 1 is the mean, lower is better.</p>",
        "<div class=pair>",
        _bars("Normalized entropy", _stage_bars("ne", early, judge, final, 1.0), low=_floor(early, final)),
        _bars("AUC", _stage_bars("auc", early, judge, final, 0.5), low=0.5),
        "</div>",
        _task_table(stages),
        f"<h2>Calibration{' and recall' if recall else ''}</h2><div class=pair>",
        _calibration(judge, report["calibration_curve"]) if "calibration_curve" in report else "",
        _recall_chart(recall, list(early)) if recall else "",
        "</div>",
        _early_text(report.get("early_recall", {})),
    ]
    if value is not None:
        parts.append(_true_value(value))
    rows = "".join(f"<tr><td>{escape(name)}<td>{escape(text)}" for name, text in facts.items())
    parts.append(f"<h2>What was run</h2><div class=wide><table class=facts>{rows}</table></div></html>\n")
    return "\n".join(part for part in parts if part)


def _cards(judge: str, final: dict[str, float], recall: dict[str, float], value: dict[str, Any] | None) -> str:
    cards = [(f"{final['ne']:.4f}", f"normalized entropy, {judge}")]
    if "oracle_ne" in final:
        cards[0] = (cards[0][0], f"normalized entropy, {judge}; the oracle has {final['oracle_ne']:.4f}")
        cards.append((f"{final['gap_closed']:.0%}", "of the way from the mean to the oracle"))
    cards.append((f"{final['auc']:.4f}", f"AUC, {judge}"))
    cards.append((f"{final['calibration']:.3f}", "predicted over observed clicks; 1 is unbiased"))
    if "retrieval_at_100" in recall:
        cards.append((f"{recall['retrieval_at_100']:.0%}", "recall@100 of retrieval"))
    if value is not None:
        cards.append((f"{value['share_of_best']:.0%}", "of the best attainable value earned by the funnel"))
    items = "".join(f"<div class=card><b>{escape(big)}</b><span>{escape(small)}</span></div>" for big, small in cards)
    return f"<div class=cards>{items}</div>"


def _stage_bars(
    metric: str, early: dict[str, dict[str, float]], judge: str, final: dict[str, float], mean: float
) -> list[Bar]:
    bars = [("predict the mean", mean, "soft")]
    bars += [(f"{stage} stage", values[metric], "second") for stage, values in early.items()]
    bars.append((judge, final[metric], "main"))
    if f"oracle_{metric}" in final:
        bars.append(("oracle", final[f"oracle_{metric}"], "good"))
    return bars


def _floor(early: dict[str, dict[str, float]], final: dict[str, float]) -> float:
    lowest = min(final["ne"], *(values["ne"] for values in early.values()), final.get("oracle_ne", 1.0))
    return max(0.0, math.floor(lowest * 10 - 1) / 10)


def _bars(title: str, bars: Sequence[Bar], *, low: float = 0.0, digits: int = 4) -> str:
    """Horizontal bars from `low` on; the axis is labelled, so that a cut one is seen as such."""
    finite = [number for _, number, _ in bars if math.isfinite(number)]
    step = _step(max([*finite, low + 1e-9]) - low)
    high = max([*finite, low + step])
    width, left, right, row = 460, 150, 60, 30
    height = row * len(bars) + 34

    def x(number: float) -> float:
        return left + (width - left - right) * max(0.0, min(1.0, (number - low) / (high - low)))

    drawn = []
    for place, (name, number, colour) in enumerate(bars):
        y = place * row + 6
        end = x(number) if math.isfinite(number) else left
        label = f"{number:.{digits}f}" if math.isfinite(number) else "undefined"
        drawn.append(
            f"<text x='{left - 8}' y='{y + 15}' text-anchor=end>{escape(name)}</text>"
            f"<rect x='{left}' y='{y}' width='{max(end - left, 1):.1f}' height='20' rx='2' fill='var(--{colour})'/>"
            f"<text x='{end + 6:.1f}' y='{y + 15}'>{label}</text>"
        )
    base = row * len(bars) + 8
    drawn.append(f"<line class=grid x1='{left}' x2='{width - right}' y1='{base}' y2='{base}'/>")
    for tick in range(int((high - low) / step + 1e-6) + 1):
        number = low + tick * step
        drawn.append(f"<text class=soft x='{x(number):.1f}' y='{base + 16}' text-anchor=middle>{number:.4g}</text>")
    return (
        f"<figure><svg viewBox='0 0 {width} {height}' role=img aria-label='{escape(title)}'>{''.join(drawn)}</svg>"
        f"<figcaption>{escape(title)}</figcaption></figure>"
    )


def _step(span: float) -> float:
    """A round distance (1, 2 or 5 times a power of ten) that divides the span into two to five parts."""
    power: float = 10.0 ** math.floor(math.log10(span / 2))
    return max(power * digit for digit in (1, 2, 5) if power * digit <= span / 2 * (1 + 1e-9))


def _calibration(judge: str, curve: dict[str, list[float]]) -> str:
    """Predicted against observed rate of ten equal bins, both axes logarithmic."""
    points = [(p, o) for p, o in zip(curve["predicted"], curve["observed"], strict=True) if p > 0]
    positive = [number for pair in points for number in pair if number > 0]
    if not positive:
        return ""
    low, high = math.log10(min(positive)) - 0.1, min(0.02, math.log10(max(positive)) + 0.1)
    size, left, top = 300, 60, 10
    width, height = 460, size + 60

    def x(number: float) -> float:
        return left + size * (math.log10(max(number, 1e-12)) - low) / (high - low)

    def y(number: float) -> float:
        return top + size - size * (math.log10(max(number, 10**low)) - low) / (high - low)

    drawn = []
    for exponent in range(-6, 1):
        for digit in (1, 2, 5):
            tick = digit * 10.0**exponent
            if not low <= math.log10(tick) <= high:
                continue
            drawn.append(
                f"<line class=grid x1='{x(tick):.1f}' x2='{x(tick):.1f}' y1='{top}' y2='{top + size}'/>"
                f"<line class=grid x1='{left}' x2='{left + size}' y1='{y(tick):.1f}' y2='{y(tick):.1f}'/>"
                f"<text class=soft x='{x(tick):.1f}' y='{top + size + 16}' text-anchor=middle>{tick:g}</text>"
                f"<text class=soft x='{left - 6}' y='{y(tick) + 4:.1f}' text-anchor=end>{tick:g}</text>"
            )
    first, last = 10**low, 10**high
    drawn.append(
        f"<line x1='{x(first):.1f}' y1='{y(first):.1f}' x2='{x(last):.1f}' y2='{y(last):.1f}' stroke='var(--soft)' "
        "stroke-dasharray='5 4'/>"
    )
    drawn += [f"<circle cx='{x(p):.1f}' cy='{y(o):.1f}' r='5' fill='var(--main)'/>" for p, o in points]
    drawn.append(
        f"<text class=soft x='{left + size / 2}' y='{top + size + 36}' text-anchor=middle>predicted</text>"
        f"<text class=soft x='{left + size + 8}' y='{y(last) + 4:.1f}'>unbiased</text>"
    )
    return (
        f"<figure><svg viewBox='0 0 {width} {height}' role=img aria-label='Calibration'>{''.join(drawn)}</svg>"
        f"<figcaption>Calibration of the {judge}: observed rate (up) against predicted rate, in ten bins of "
        "equally many impressions.</figcaption></figure>"
    )


def _recall_chart(recall: dict[str, float], early: Sequence[str]) -> str:
    shown = {
        "popularity_at_100": ("100 most clicked", "soft"),
        "retrieval_at_100": ("retrieval, first 100", "main"),
        "retrieval": ("retrieval, all", "main"),
        **{stage: (f"after the {stage} stage", "second") for stage in early},
        "final_at_100": ("final list, first 100", "good"),
    }
    bars = [(name, recall[key], colour) for key, (name, colour) in shown.items() if key in recall]
    text = (
        "Share of clicked items that are still there. After retrieval candidates are sorted by value, not by "
        "click, so cheap items that were clicked do drop out."
    )
    return _bars(text, bars, digits=3)


def _early_text(early: dict[str, float]) -> str:
    if "top_10" not in early:
        return ""
    text = (
        f"What is before the final stage keeps {early['top_10']:.1%} of the ten items that the final stage, scoring "
        "everything that retrieval found, would put first"
    )
    if "value_of_top_10" in early:
        text += f", and {early['value_of_top_10']:.1%} of their value"
    return f"<p>{text}.</p>"


def _task_table(stages: dict[str, dict[str, dict[str, float]]]) -> str:
    columns = {
        "rate": "rate",
        "ne": "NE",
        "oracle_ne": "oracle NE",
        "gap_closed": "gap closed",
        "auc": "AUC",
        "oracle_auc": "oracle AUC",
        "gauc": "GAUC",
        "calibration": "calibration",
    }
    first = next(iter(stages["final"].values()))
    shown = [key for key in columns if key in first]
    head = "".join(f"<th>{columns[key]}" for key in shown)
    rows = []
    for stage, tasks in stages.items():
        for task, values in tasks.items():
            cells = "".join(
                f"<td>{values[key]:.1%}" if key == "gap_closed" else f"<td>{values[key]:.4f}"
                for key in shown
                if key in values
            )
            rows.append(f"<tr><td>{escape(stage)}<td>{escape(task)}{cells}")
    return f"<div class=wide><table><tr><th>stage<th>task{head}{''.join(rows)}</table></div>"


def _true_value(value: dict[str, Any]) -> str:
    bars = [
        ("random ads", value["random"], "soft"),
        ("the log's policy", value["log"], "second"),
        ("this funnel", value["funnel"], "main"),
        ("best possible", value["best"], "good"),
    ]
    parts = [
        "<h2>What the lists are really worth</h2>",
        f"<p>Expected value of one request, the sum over its slots of bid times <em>true</em> click probability, over "
        f"{value['requests']:,} requests. The best possible list knows the true probability of every living ad; the "
        "log's policy went by interest and took no account of bids.</p>",
        _bars("Expected value per request", bars, digits=3),
        "<h2>Some ranked lists</h2>"
        "<p>What the final stage predicts, and the true probability of a click had the ad been shown in that slot. "
        "A check marks ads that the best possible list has too. Predictions in a list run high: a list picks the ads "
        "whose predictions err upwards.</p>",
    ]
    for sample in value["samples"]:
        rows = "".join(
            f"<tr><td>{item['item_id']}<td>{item['bid']:.2f}<td>{item['value']:.3f}"
            f"<td>{_probability(item['predicted'])}<td>{_probability(item['true'])}"
            f"<td class=yes>{'✓' if item['best'] else ''}"
            for item in sample["items"]
        )
        parts.append(
            f"<p><strong>User {sample['user_id']}</strong></p><div class=wide><table><tr><th>ad<th>bid<th>value"
            f"<th>predicted click<th>true click<th>in the best list{rows}</table></div>"
        )
    return "\n".join(parts)


def _probability(p: float) -> str:
    return f"{p:.3f}<span class=track><span class=bar style='width:{max(1.0, 80 * p):.0f}px'></span></span>"
