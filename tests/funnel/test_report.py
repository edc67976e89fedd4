"""Facts about the page: where a chart puts its numbers, what it says of what is undefined, and when a run writes it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import fullrank as fr
from fullrank.cli.evaluate import evaluate
from fullrank.funnel import charts
from fullrank.funnel.charts import Bar
from fullrank.funnel.report import render, run_page
from fullrank.funnel.report_style import MEANINGS
from fullrank.training.run import Report, run


def numbers(ne: float, auc: float, **more: Any) -> dict[str, Any]:
    intervals = {"ne": [ne - 0.02, ne + 0.01], "auc": [auc - 0.01, auc + 0.02], "calibration": [0.9, 1.1]}
    return {"rate": 0.03, "ne": ne, "auc": auc, "calibration": 1.0, "intervals": intervals, **more}


def whole() -> dict[str, Any]:
    """A report with all that a page may show."""
    regression = {"rmse": 12.5, "mae": 8.25, "mean": 21.0, "intervals": {"rmse": [11.75, 13.25]}}
    slices = [
        {"by": "user", "slice": "known", "task": "click", "rows": 900, **numbers(0.83, 0.77)},
        {"by": "user", "slice": "new", "task": "click", "rows": 100, **numbers(0.97, 0.61)},
        {"by": "device", "slice": "<b>", "task": "click", "rows": 3, "rate": 0.0, "ne": None, "auc": None},
    ]
    return {
        "split": "test",
        "rows": 1000,
        "stages": {
            "coarse": {"click": numbers(0.92, 0.7)},
            "final": {
                "click": numbers(0.85, 0.76, oracle_ne=0.8, oracle_auc=0.8, gap_closed=0.75),
                "watch": regression,
            },
        },
        "baselines": {"click": {"item_rate": numbers(0.96, 0.63)}, "watch": {"item_rate": {"rmse": 14.5}}},
        "warnings": [{"stage": "coarse", "message": "The stage <i>loses</i>.", "advice": "Leave it out."}],
        "slices": slices,
        "calibration_curve": {"predicted": [0.01, 0.02, 0.05], "observed": [0.0, 0.025, 0.05], "rows": [300.0] * 3},
        "recall": {"requests": 500.0, "retrieval_at_100": 0.6, "retrieval": 0.9, "coarse": 0.7, "final_at_100": 0.65},
    }


def points(*values: float) -> list[dict[str, Any]]:
    return [
        {"step": 10 * k, "epoch": k / 2, "loss": 0.5 / k, "valid": {"ne": value}} for k, value in enumerate(values, 1)
    ]


TRAINING = {
    "curves": {"coarse": points(0.95, 0.93), "final": points(0.9, 0.86, 0.88)},
    "monitor": {"coarse": "ne", "final": "ne"},
    "best_step": {"coarse": 20, "final": 20},
    "seconds": {
        "import": 1.0,
        "fit": 6.0,
        "retrieval": 2.0,
        "coarse": 1.0,
        "final": 3.0,
        "evaluate": 1.0,
        "total": 8.0,
    },
}


def bar_ends(chart: str) -> list[float]:
    found = re.findall(r"<rect x='([\d.]+)' y='\d+' width='([\d.]+)'", chart)
    return [float(x) + float(width) - 1 for x, width in found]


def whiskers(chart: str) -> list[tuple[float, float]]:
    found = re.findall(r"d='M([\d.]+) [\d.]+v8M[\d.]+ [\d.]+H([\d.]+)M", chart)
    return [(float(low), float(high)) for low, high in found]


@pytest.mark.parametrize("lower", [True, False])
def test_a_better_bar_ends_further_to_the_right_and_inside_its_whisker(lower: bool) -> None:
    sign = -1 if lower else 1
    shown = [Bar(str(k), sign * k, "final", (sign * k - 0.5, sign * k + 0.25)) for k in (1.0, 3.0, 2.0)]
    chart = charts.bars("t", shown, start=0.0, unit="u", lower_is_better=lower)
    one, three, two = bar_ends(chart)
    assert one < two < three and three - two == pytest.approx(two - one, abs=0.2)
    scale = two - one
    for end, (low, high) in zip((one, three, two), whiskers(chart), strict=True):
        before, after = (0.25, 0.5) if lower else (0.5, 0.25)
        assert low == pytest.approx(end - before * scale, abs=0.2) and high == pytest.approx(
            end + after * scale, abs=0.2
        )


def test_what_is_worse_than_where_the_bars_start_goes_to_the_left_of_it() -> None:
    chart = charts.bars(
        "t", [Bar("a", 1.1, "final"), Bar("b", 0.9, "final")], start=1.0, unit="NE", lower_is_better=True
    )
    (x, width), (start, _) = re.findall(r"<rect x='([\d.]+)' y='\d+' width='([\d.]+)'", chart)
    assert float(x) + float(width) - 2 == pytest.approx(float(start), abs=0.2)


def test_a_curve_rises_as_its_metric_improves_and_rings_the_step_that_was_kept() -> None:
    for values, lower in (([0.9, 0.8, 0.85], True), ([0.6, 0.8, 0.7], False)):
        steps = list(zip((10.0, 20.0, 30.0), values, strict=True))
        chart = charts.curve("t", steps, colour="final", unit="u", lower_is_better=lower, kept=20)
        drawn = [tuple(map(float, p.split(","))) for p in re.findall(r"points='([^']*)'", chart)[0].split()]
        assert min(drawn, key=lambda point: point[1]) == drawn[1]  # SVG counts from the top
        x, y = re.findall(r"class=ring cx='([\d.]+)' cy='([\d.]+)'", chart)[0]
        assert (float(x), float(y)) == drawn[1]
    assert charts.curve("t", [(1.0, math.nan)], colour="final", unit="u", lower_is_better=True) == ""


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.93, -0.7245), (0.5, 0.5001), (0.0, 123_456.0)])
@pytest.mark.parametrize("parts", [2, 3])
def test_ticks_are_round_few_and_inside(low: float, high: float, parts: int) -> None:
    found = charts.ticks(low, high, parts)
    assert parts - 1 <= len(found) <= 2.5 * parts + 1
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    apart = (found[-1] - found[0]) / (len(found) - 1)
    assert round(apart / 10 ** math.floor(math.log10(apart) + 1e-9), 6) in (1, 2, 5)


def test_the_page_says_all_that_the_report_has_and_warns_first() -> None:
    page = render("funnel <1>", whole(), {"log": "a & b"}, TRAINING)
    assert "funnel &lt;1&gt;" in page and "a &amp; b" in page and "&lt;b&gt;" in page
    assert page.index("The stage &lt;i&gt;loses&lt;/i&gt;.") < page.index("Leave it out.") < page.index("class=cards")
    for text in ("0.8300–0.8600", "0.7500–0.7800", "11.75–13.25", "the item&#x27;s mean", "75%", "coarse stage"):
        assert text in page, text
    assert "70.0% (−20.0)" in page and "65.0% (−5.0)" in page  # what a stage loses is against the one before
    assert "by user" in page and "by device" in page and "undefined" in page
    assert page.count("class=ring") == 4 and "training, retrieval<td>2.0<td>25%" in page
    assert not re.search(r"https?://|<script|<link|@import|url\(|\bnan\b", page)


def test_a_colour_is_in_the_legend_if_it_is_on_the_page_and_means_one_thing() -> None:
    page = render("t", whole(), {}, TRAINING)
    assert all(f"background:var(--{colour})'></i>{text}" in page for colour, text in MEANINGS.items())
    used = dict(
        re.findall(r">([^<>]*)</text>(?:<text[^>]*class=number>[^<]*</text>)(?:<line[^>]*>)<rect[^>]*--(\w+)", page)
    )
    stages = {"coarse stage": "early", "after the coarse stage": "early", "final stage": "final"}
    others = {
        "after retrieval": "retrieval",
        "predict the mean": "base",
        "oracle": "best",
        "final list, first 100": "final",
    }
    assert {name: used[name] for name in stages | others} == stages | others
    alone = {**whole(), "stages": {"final": {"click": numbers(0.85, 0.76)}}}
    for key in ("recall", "warnings"):
        del alone[key]
    page = render("t", alone, {}).split("</style>")[1]
    assert "this model" in page and "final stage" not in page
    assert not any(f"--{colour})" in page for colour in ("early", "retrieval", "best", "warn"))


def test_null_and_nan_are_both_undefined() -> None:
    pages = []
    for nothing in (None, math.nan):
        report = whole()
        del report["stages"]["coarse"], report["baselines"]
        report["stages"]["final"] = {"click": {"rate": 0.0, "ne": nothing, "auc": nothing, "calibration": nothing}}
        report["calibration_curve"]["observed"] = [0.0, 0.0, 0.0]
        pages.append(render("t", report, {}))
    assert pages[0] == pages[1] and "here is one kind only: they are undefined" in pages[0]
    assert "Calibration" not in pages[0] and "nan" not in pages[0]


def log(rows: int = 600) -> pl.DataFrame:
    random = np.random.default_rng(0)
    item = random.integers(0, 20, rows)
    click = (random.random(rows) < 0.2 + 0.03 * item).astype(np.int64)
    minutes = np.round(5.0 + item + random.normal(size=rows), 3)
    return pl.DataFrame({"item": [f"i{k}" for k in item], "price": item * 0.5, "click": click, "minutes": minutes})


def a_run(data: fr.Dataset, out: Path, **training: Any) -> tuple[Report, str]:
    settings = {"batch_size": 64, "epochs": 2, **training}
    report = run({"data": {"dataset": data.path}, "model": {"name": "lr"}, "training": settings}, out, page=run_page)
    return report, (out / "report.html").read_text(encoding="utf-8")


def test_the_page_of_a_run_has_its_metrics_its_curves_and_its_times(tmp_path: Path) -> None:
    data = fr.Dataset.from_frame(log(), label="click", item_id="item", path=tmp_path / "shop")
    report, page = a_run(data, tmp_path / "run", validate_every=3)
    test = report.metrics["test"]["click"]
    assert f"<b>{test['ne']:.4f}</b>" in page and f"<b>{test['auc']:.4f}</b>" in page and "<h1>lr on shop</h1>" in page
    assert page.count("class=ring") == 2 and "How it learnt" in page and "<h2>Times</h2>" in page
    assert report.details["best_step"]["final"] == report.details["best"]["step"]


def test_a_page_without_rows_to_measure_on_is_about_the_training(tmp_path: Path) -> None:
    from fullrank.data.splits import SplitSpec

    data = fr.Dataset.from_frame(log(), label="click", path=tmp_path / "d", split=SplitSpec(kind="none"))
    report, page = a_run(data, tmp_path / "run")
    assert not report.metrics and "Nothing was measured" in page and "lower mean loss" in page
    assert [point["valid"] for point in report.details["curves"]["final"]] == [{}, {}]
    assert "ring" not in page.split("</style>")[1] and "best_step" in report.details


def test_a_model_of_numbers_has_a_page(tmp_path: Path) -> None:
    data = fr.Dataset.from_frame(log().drop("click"), label="minutes", path=tmp_path / "d")
    report, page = a_run(data, tmp_path / "run")
    assert report.details["monitor"]["final"] == "mse" and "lower MSE" in page
    assert "Normalized entropy" not in page and "undefined" not in page


def test_evaluate_writes_a_page_beside_the_bundle_or_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = fr.Dataset.from_frame(log(), label="click", path=tmp_path / "shop")
    bundle = tmp_path / "run" / "model"
    fr.fit(data, model="lr", training={"epochs": 1}).save(bundle)
    evaluate(bundle, data.path, split="valid", as_json=True)
    page = tmp_path / "run" / "report-shop-valid.html"
    assert capsys.readouterr().err.endswith(f"report: {page}\n") and "the valid split of the log" in page.read_text()
    evaluate(bundle, data.path, place=tmp_path / "p.html", as_json=True)
    assert "model on shop, test" in (tmp_path / "p.html").read_text()
    for place in (tmp_path, tmp_path / "nowhere" / "p.html"):
        with pytest.raises(ValueError, match=f"{place}: the report cannot be written there .*with --report"):
            evaluate(bundle, data.path, place=place)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "shop", "p.html"}
