"""Facts about the part of the page that is about the funnel as a whole."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from fullrank.funnel import charts
from fullrank.funnel.charts import Mark
from fullrank.funnel.report_cascade import cascade, tuned


def stage(share: float, lost: float, *, flops: float, **more: Any) -> dict[str, Any]:
    taken = {"p50": 1.25, "p99": 2.5}
    interval = {"share": [share - 0.02, share + 0.01]}
    values = {"recall": share - 0.1, "share": share, "value": 10 * share, "lost": lost, "intervals": interval}
    return {**values, "candidates": 300, "flops": flops, "milliseconds": taken, **more}


def found(*, true: bool = True) -> dict[str, Any]:
    stages = {
        "retrieval": stage(0.9, 1.0, flops=2e5, true_value=3.1, true_lost=-0.1),
        "coarse": stage(0.75, 1.5, flops=8e5, true_value=2.5, true_lost=0.6),
        "final": stage(0.75, 0.0, flops=4e6, true_value=2.5, true_lost=1.0),
    }
    curve = [{"flops": 1e6, "share": 0.5}, {"flops": 1e7, "share": 0.8}, {"flops": 1e8, "share": 0.95}]
    result = {
        "requests": 100,
        "catalogue": 5000,
        "k": 10,
        "whole": {"value": 10.0, "true_value": 3.0},
        "best": {"true_value": 4.0},
        "stages": stages,
        "total": {"flops": 5e6, "milliseconds": {"p50": 3.75, "p99": 7.5}},
        "curve": curve,
    }
    if not true:
        del result["best"]
        for values in stages.values():
            del values["true_value"], values["true_lost"]
    return result


def test_each_stage_has_what_it_loses_and_costs() -> None:
    page = cascade(found())
    for text in ("90.0% (-10.0)", "75.0% (-15.0)", "4.000", "3.000 (-25.0)", "3.100 (+2.5)", "2.500 (-15.0)"):
        assert text in page, text
    assert "5,000 items" in page and page.count("<figure") == 3
    rows = re.findall(r"<tr>(.*?)(?=<tr>|</table>)", page)
    cells = [re.sub(r"<[^>]*>", " ", row).split() for row in rows]
    assert cells[1] == ["retrieval", "300", "200k", "4.0%", "1.25", "2.50", "0.800", "90.0%", "3.100", "-0.100"]
    assert cells[2][:4] == ["coarse", "300", "800k", "16.0%"] and cells[4] == ["all", "5M", "3.75", "7.50"]
    assert len({row.count("<td") for row in rows[1:]}) == 1


def test_without_a_world_nothing_is_said_of_true_value() -> None:
    page = cascade(found(true=False))
    assert "rue value" not in page and page.count("<figure") == 2


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_what_is_undefined_is_said_to_be(nothing: Any) -> None:
    report = found()
    report["whole"]["value"] = nothing
    for values in report["stages"].values():
        values["share"] = values["recall"] = nothing
    page = cascade(report)
    assert "undefined" in page and "nan" not in page


def test_the_frontier_rises_in_steps_and_marks_lie_on_it() -> None:
    points = [(1e6, 0.5), (1e7, 0.8), (1e8, 0.95)]
    drawn = charts.frontier("t", points, unit="u", cost="FLOPs", marks=[Mark("now", 1e7, 0.8)], budget=2e7)
    line = [tuple(map(float, p.split(","))) for p in re.findall(r"points='([^']*)'", drawn)[0].split()]
    assert len(line) == 5
    (x0, y0), (x1, y1), (x2, y2), (x3, y3), (x4, _) = line
    assert x0 < x1 == x2 < x3 == x4 and y0 == y1 > y2 == y3  # SVG counts from the top
    assert x2 - x0 == pytest.approx(x4 - x2, abs=0.2)  # decades are alike
    x, y = re.findall(r"class=ring cx='([\d.]+)' cy='([\d.]+)'", drawn)[0]
    assert (float(x), float(y)) == line[2]
    budget = float(re.findall(r"class=kept x1='([\d.]+)'", drawn)[0])
    assert budget == pytest.approx(x2 + (x4 - x2) * math.log10(2), abs=0.2)
    assert charts.frontier("t", [(1e6, math.nan)], unit="u", cost="c") == ""


def test_the_plot_of_tuning_marks_what_was_chosen_and_what_is_now() -> None:
    def point(flops: float, share: float) -> dict[str, Any]:
        return {"flops": flops, "share": share, "sizes": [flops]}

    front = [point(1e6, 0.5), point(1e7, 0.8)]
    result = {"by": "flops", "budget": 2e7, "front": front, "chosen": front[1], "current": point(3e7, 0.7)}
    assert re.findall(r">(chosen|now|budget)<", tuned(result)) == ["budget", "chosen", "now"]
    assert ">now<" not in tuned({**result, "current": front[1]})


def test_numbers_have_a_letter_for_their_thousands() -> None:
    assert [charts.short(n) for n in (0.5, 999, 25_000, 1.5e6, 3e9)] == ["0.5", "999", "25k", "1.5M", "3G"]
