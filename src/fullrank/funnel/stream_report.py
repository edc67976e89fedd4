"""The page of a stream: how well each window was predicted before it was learnt."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from fullrank.funnel import charts
from fullrank.funnel.charts import number_of
from fullrank.funnel.report import page_of
from fullrank.funnel.report_parts import formatted, pair, wide
from fullrank.training.publishing import read_pointer
from fullrank.training.stream import METRICS

# Metric -> its name, whether lower is better.
SHOWN = {"ne": ("NE", True), "auc": ("AUC", False), "calibration": ("calibration", True), "mse": ("MSE", True)}
# Windows in the table; the charts have all.
LISTED = 100


def stream_page(directory: Path, judge: str) -> str:
    """The page of the stream in a directory, about the label that decides on rollbacks."""
    lines = (directory / METRICS).read_text(encoding="utf-8").splitlines()
    windows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    found = [window["metrics"].get(judge, {}) for window in windows]
    names = [name for name in SHOWN if any(name in metrics for metrics in found)]
    curves = [
        charts.curve(
            f"{SHOWN[name][0]} of each window",
            [(float(number), number_of(metrics.get(name))) for number, metrics in enumerate(found)],
            colour="final",
            unit=f"{'lower' if SHOWN[name][1] else 'higher'} {SHOWN[name][0]}",
            lower_is_better=SHOWN[name][1],
            axis="window",
        )
        for name in names
        if name != "calibration"
    ]
    heads = "".join(f"<th>{SHOWN[name][0]}" for name in names)
    rows = []
    for window, metrics in list(zip(windows, found, strict=True))[-LISTED:]:
        cells = "".join(f"<td>{formatted(metrics.get(name), '.4f')}" for name in names)
        said = window["rolled_back"] or ("" if window["served"] else "nothing was served yet")
        rows.append(
            f"<tr><td class=text>{escape(window['window'])}<td>{window['rows']:,}<td>{window['late']:,}{cells}"
            f"<td>{window['deltas']:,}<td class=text>{escape(said)}"
        )
    table = (
        f"<table><tr><th class=text>window<th>rows<th>late{heads}<th>deltas<th class=text></tr>{''.join(rows)}</table>"
    )
    pointer = read_pointer(directory)
    back = sum(1 for window in windows if window["rolled_back"])
    rows_of = {name: sum(window[name] for window in windows) for name in ("rows", "late")}
    facts = {
        "windows": f"{len(windows):,}, {back:,} of which ended with a rollback",
        "rows": f"{rows_of['rows']:,}, and {rows_of['late']:,} late",
        "served": "nothing" if pointer is None else f"{pointer.bundle} ({pointer.reason})",
    }
    about = "".join(f"<tr><td>{escape(key)}<td>{escape(text)}" for key, text in facts.items())
    return page_of(
        f"stream of {judge}",
        "\n".join(
            [
                "<h2>Each window as it was predicted, before it was learnt</h2>",
                pair(*curves),
                wide("windows", table),
                f"<h2>What was run</h2><table class=facts>{about}</table>",
            ]
        ),
    )
