"""Charts of the report as inline SVG. Bars grow to the right and curves rise where things get better, always.

They are drawn 340 units wide, the width of a phone's page, so that their text is readable there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH = 340
# Room for text above a bar, the bar, and the distance to the next one.
TEXT, BAR, GAP = 15, 12, 14

Interval = tuple[float, float]


class Bar(NamedTuple):
    """A bar: what it is of, its number, and the name of its colour."""

    name: str
    number: float
    colour: str
    interval: Interval | None = None
    note: str = ""


def number_of(value: object) -> float:
    """A number of a report; NaN for what is undefined there, which JSON has as null."""
    return float(value) if isinstance(value, int | float) else math.nan


def interval_of(value: object) -> Interval | None:
    """An interval of a report; None if it is absent or undefined."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        return None
    low, high = number_of(value[0]), number_of(value[1])
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def bars(
    title: str,
    shown: Sequence[Bar],
    *,
    start: float,
    unit: str,
    end: float = math.nan,
    lower_is_better: bool = False,
    form: str = ".4f",
) -> str:
    """Horizontal bars from `start` on, each with its interval as a whisker. Right is better: where lower numbers are,
    the axis runs from high to low.

    Args:
        end: the axis goes at least as far.
        form: of the numbers beside the bars.
    """
    sign = -1.0 if lower_is_better else 1.0
    ends = [start, end, *(bar.number for bar in shown), *(end for bar in shown for end in bar.interval or ())]
    goods = [sign * end for end in ends if math.isfinite(end)]
    low, high = min(goods), max(goods)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    left, right = 14.0, WIDTH - 14.0

    def x(number: float) -> float:
        return left + (right - left) * (sign * number - low) / (high - low)

    drawn, y = [], 0
    for bar in shown:
        defined = math.isfinite(bar.number)
        text = f"{bar.number:{form}}" if defined else "undefined"
        drawn.append(
            f"<text x='{left}' y='{y + 12:.0f}'>{escape(bar.name)}</text>"
            f"<text x='{right}' y='{y + 12:.0f}' text-anchor=end class=number>{text}{escape(bar.note)}</text>"
        )
        top = y + TEXT + 3
        drawn.append(f"<line class=axis x1='{x(start):.1f}' x2='{x(start):.1f}' y1='{top - 2}' y2='{top + BAR + 2}'/>")
        if defined:
            begin, end = sorted((x(start), x(bar.number)))
            drawn.append(
                f"<rect x='{begin - 1:.1f}' y='{top}' width='{end - begin + 2:.1f}' height='{BAR}' rx='2' "
                f"fill='var(--{bar.colour})'/>"
            )
            drawn.append(_whisker(bar.interval, x, top + BAR / 2))
        y += TEXT + BAR + GAP
    for tick in ticks(low, high):
        at = x(sign * tick)
        drawn.append(
            f"<line class=axis x1='{at:.1f}' x2='{at:.1f}' y1='{y:.0f}' y2='{y + 4:.0f}'/>"
            f"<text class=soft x='{at:.1f}' y='{y + 17:.0f}' text-anchor=middle>{abs(tick):.4g}</text>"
        )
    drawn.append(f"<line class=axis x1='{left}' x2='{right}' y1='{y:.0f}' y2='{y:.0f}'/>")
    drawn.append(_axis_title(f"{unit} is better →", right, y + 36))
    return figure(title, "".join(drawn), y + 42)


def curve(
    title: str,
    points: Sequence[tuple[float, float]],
    *,
    colour: str,
    unit: str,
    lower_is_better: bool,
    kept: float | None = None,
    axis: str = "step",
) -> str:
    """A number by step, or what `axis` names. Up is better: where lower numbers are, the axis runs from high to low."""
    points = [(step, number) for step, number in points if math.isfinite(number)]
    if not points:
        return ""
    sign = -1.0 if lower_is_better else 1.0
    left, right, top, bottom = 54.0, WIDTH - 14.0, 24.0, 184.0
    first, last = 0.0, max(max(step for step, _ in points), 1.0)
    goods = [sign * number for _, number in points]
    low, high = min(goods), max(goods)
    margin = (high - low) * 0.06 or max(abs(high) * 0.01, 1e-6)
    low, high = low - margin, high + margin

    def x(step: float) -> float:
        return left + (right - left) * (step - first) / (last - first)

    def y(number: float) -> float:
        return bottom - (bottom - top) * (sign * number - low) / (high - low)

    drawn = [_axis_title(f"{unit} is better ↑", left - 46, 12, anchor="start")]
    for tick in ticks(low, high, 3):
        at = y(sign * tick)
        drawn.append(
            f"<line class=grid x1='{left}' x2='{right}' y1='{at:.1f}' y2='{at:.1f}'/>"
            f"<text class=soft x='{left - 6}' y='{at + 4:.1f}' text-anchor=end>{abs(tick):.4g}</text>"
        )
    for tick in ticks(first, last):
        drawn.append(f"<text class=soft x='{x(tick):.1f}' y='{bottom + 18}' text-anchor=middle>{_count(tick)}</text>")
    drawn.append(f"<line class=axis x1='{left}' x2='{right}' y1='{bottom}' y2='{bottom}'/>")
    drawn.append(_axis_title(axis, right, bottom + 36))
    chosen = [point for point in points if point[0] == kept]
    for step, _ in chosen:
        side, shift = ("end", -5) if x(step) > (left + right) / 2 else ("start", 5)
        drawn.append(
            f"<line class=kept x1='{x(step):.1f}' x2='{x(step):.1f}' y1='{top}' y2='{bottom}'/>"
            f"<text x='{x(step) + shift:.1f}' y='{bottom - 6}' text-anchor={side}>kept</text>"
        )
    line = " ".join(f"{x(step):.1f},{y(number):.1f}" for step, number in points)
    drawn.append(f"<polyline points='{line}' fill='none' stroke='var(--{colour})' stroke-width='2'/>")
    if len(points) <= 40:
        drawn += [
            f"<circle cx='{x(step):.1f}' cy='{y(number):.1f}' r='3' fill='var(--{colour})'/>" for step, number in points
        ]
    drawn += [f"<circle class=ring cx='{x(step):.1f}' cy='{y(number):.1f}' r='6'/>" for step, number in chosen]
    return figure(title, "".join(drawn), bottom + 42)


class Mark(NamedTuple):
    """A point of a frontier that has a name."""

    name: str
    cost: float
    number: float


def frontier(
    title: str,
    points: Sequence[tuple[float, float]],
    *,
    unit: str,
    cost: str,
    marks: Sequence[Mark] = (),
    budget: float = math.nan,
    form: Callable[[float], str] = lambda number: f"{number:.4g}",
) -> str:
    """The most that can be had for a cost, as steps, the cost on a logarithmic axis.

    Args:
        points: cost and number, from the cheapest on.
        unit: of the numbers; more is better.
        cost: what the cost is.
        budget: gets a line.
        form: how a mark of the upward axis is written.
    """
    points = [(c, number) for c, number in points if c > 0 and math.isfinite(number)]
    marks = [mark for mark in marks if mark.cost > 0 and math.isfinite(mark.number)]
    if not points:
        return ""
    left, right, top, bottom = 54.0, WIDTH - 14.0, 24.0, 204.0
    costs = [c for c, _ in points] + [mark.cost for mark in marks] + ([budget] if budget > 0 else [])
    numbers = [number for _, number in points] + [mark.number for mark in marks]
    first, last = math.log10(min(costs)) - 0.08, math.log10(max(costs)) + 0.08
    low, high = min(numbers), max(numbers)
    margin = (high - low) * 0.08 or max(abs(high) * 0.01, 1e-6)
    low, high = low - margin, high + margin

    def x(c: float) -> float:
        return left + (right - left) * (math.log10(c) - first) / (last - first)

    def y(number: float) -> float:
        return bottom - (bottom - top) * (number - low) / (high - low)

    drawn = [_axis_title(f"{unit} is better ↑", left - 46, 12, anchor="start")]
    for tick in ticks(low, high, 3):
        drawn.append(
            f"<line class=grid x1='{left}' x2='{right}' y1='{y(tick):.1f}' y2='{y(tick):.1f}'/>"
            f"<text class=soft x='{left - 6}' y='{y(tick) + 4:.1f}' text-anchor=end>{escape(form(tick))}</text>"
        )
    for tick in decades(first, last):
        drawn.append(
            f"<line class=axis x1='{x(tick):.1f}' x2='{x(tick):.1f}' y1='{bottom}' y2='{bottom + 4}'/>"
            f"<text class=soft x='{x(tick):.1f}' y='{bottom + 18}' text-anchor=middle>{short(tick)}</text>"
        )
    drawn.append(f"<line class=axis x1='{left}' x2='{right}' y1='{bottom}' y2='{bottom}'/>")
    drawn.append(_axis_title(f"← fewer {cost}", right, bottom + 36))
    if budget > 0:
        side, shift = ("end", -5) if x(budget) > (left + right) / 2 else ("start", 5)
        drawn.append(
            f"<line class=kept x1='{x(budget):.1f}' x2='{x(budget):.1f}' y1='{top}' y2='{bottom}'/>"
            f"<text x='{x(budget) + shift:.1f}' y='{bottom - 6}' text-anchor={side}>budget</text>"
        )
    steps, before = [], None
    for c, number in points:
        if before is not None:
            steps.append(f"{x(c):.1f},{y(before):.1f}")
        steps.append(f"{x(c):.1f},{y(number):.1f}")
        before = number
    drawn.append(f"<polyline points='{' '.join(steps)}' fill='none' stroke='var(--final)' stroke-width='2'/>")
    drawn += [f"<circle cx='{x(c):.1f}' cy='{y(n):.1f}' r='2.5' fill='var(--final)'/>" for c, n in points]
    for place, mark in enumerate(marks):
        side, shift = ("end", -9) if x(mark.cost) > (left + right) / 2 else ("start", 9)
        # Names of two points that are near each other stand above and below.
        lift = 16 if place % 2 == 0 else -8
        drawn.append(
            f"<circle class=ring cx='{x(mark.cost):.1f}' cy='{y(mark.number):.1f}' r='6'/>"
            f"<text x='{x(mark.cost) + shift:.1f}' y='{y(mark.number) + lift:.1f}' text-anchor={side}>"
            f"{escape(mark.name)}</text>"
        )
    return figure(title, "".join(drawn), bottom + 42)


def short(number: float) -> str:
    """A number with a letter for its thousands: 25k, 1.5M, 3G."""
    for letter, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def alone(drawn: str, style: str) -> str:
    """The chart of a figure as a file of its own, with its title above it."""
    title = drawn[drawn.index("<figcaption>") + 12 : drawn.index("</figcaption>")]
    begin, end = drawn.index("<svg "), drawn.index("</svg>")
    width, height = WIDTH + 20, float(drawn[begin:].split("viewBox='")[1].split("'")[0].split()[3]) + 40
    inner = drawn[drawn.index(">", begin) + 1 : end]
    # What HTML takes without quotation marks, XML does not.
    inner = re.sub(r"=([A-Za-z][\w-]*)(?=[ />])", r"='\1'", inner)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='-10 0 {width} {height:.0f}' width='{2 * width}' "
        f"height='{2 * height:.0f}'><style>{style}</style>"
        f"<rect x='-10' width='{width}' height='{height:.0f}' fill='var(--back)'/>"
        f"<text x='8' y='22' font-weight='600'>{title}</text><g transform='translate(0 34)'>{inner}</g></svg>\n"
    )


def decades(low: float, high: float) -> list[float]:
    """Round numbers between two powers of ten, three of them at least."""
    for digits in _DECADES:  # the fewest that mark an axis in three places
        found = [digit * 10.0**power for power in range(-9, 19) for digit in digits]
        found = [tick for tick in found if low <= math.log10(tick) <= high]
        if len(found) >= 3:
            break
    return found


# Marks of a decade of a logarithmic axis.
_DECADES = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0), tuple(n / 10 for n in range(10, 100)))


def calibration(title: str, values: Mapping[str, Sequence[float]]) -> str:
    """Observed rate by predicted rate of the bins, both axes logarithmic, with 95 % intervals of the observed one.

    Nothing where no row is positive. A bin without a positive row is a hollow point at the bottom.
    """
    bins = [
        (p, o, _wilson(o, n))
        for p, o, n in zip(values["predicted"], values["observed"], values["rows"], strict=True)
        if p > 0
    ]
    positive = [rate for p, o, _ in bins for rate in (p, o) if rate > 0]
    if not any(o > 0 for _, o, _ in bins):
        return ""
    low, high = math.log10(min(positive)) - 0.15, min(0.0, math.log10(max(positive)) + 0.15)
    left, top, size = 54.0, 24.0, 262.0

    def along(rate: float) -> float:
        return size * max(0.0, min(1.0, (math.log10(max(rate, 1e-12)) - low) / (high - low)))

    def x(rate: float) -> float:
        return left + along(rate)

    def y(rate: float) -> float:
        return top + size - along(rate)

    drawn = []
    for tick in decades(low, high):
        drawn.append(
            f"<line class=grid x1='{x(tick):.1f}' x2='{x(tick):.1f}' y1='{top}' y2='{top + size}'/>"
            f"<line class=grid x1='{left}' x2='{left + size}' y1='{y(tick):.1f}' y2='{y(tick):.1f}'/>"
            f"<text class=soft x='{x(tick):.1f}' y='{top + size + 18}' text-anchor=middle>{tick:g}</text>"
            f"<text class=soft x='{left - 6}' y='{y(tick) + 4:.1f}' text-anchor=end>{tick:g}</text>"
        )
    drawn.append(f"<line class=unbiased x1='{left}' y1='{top + size}' x2='{left + size}' y2='{top}'/>")
    for p, o, (least, most) in bins:
        drawn.append(
            f"<line class=whisker x1='{x(p):.1f}' x2='{x(p):.1f}' y1='{y(least):.1f}' y2='{y(most):.1f}'/>"
            f"<circle cx='{x(p):.1f}' cy='{y(o):.1f}' r='4.5' fill='var(--{'final' if o > 0 else 'back'})' "
            "stroke='var(--final)' stroke-width='1.5'/>"
        )
    drawn.append(_axis_title("observed rate", 8, 12, anchor="start"))
    drawn.append(_axis_title("predicted rate", left + size, top + size + 36))
    return figure(title, "".join(drawn), top + size + 42)


def interval_cell(number: float, interval: Interval | None, span: Interval, start: float) -> str:
    """A dot with its whisker for a cell of a table; right is better.

    Args:
        span: the worst and the best number that the cell has room for.
        start: where its line is.
    """
    width, height = 120, 16
    worst, best = span

    def x(value: float) -> float:
        return 5 + (width - 10) * max(0.0, min(1.0, (value - worst) / (best - worst or 1.0)))

    if not math.isfinite(number):
        return ""
    return (
        f"<svg class=cell viewBox='0 0 {width} {height}' width='{width}' height='{height}' aria-hidden=true>"
        f"<line class=axis x1='{x(start):.1f}' x2='{x(start):.1f}' y1='0' y2='{height}'/>"
        f"{_whisker(interval, x, height / 2)}"
        f"<circle cx='{x(number):.1f}' cy='{height / 2}' r='4' fill='var(--final)'/></svg>"
    )


def ticks(low: float, high: float, parts: int = 2) -> list[float]:
    """Round numbers between two, 1, 2 or 5 times a power of ten apart, that make at least so many parts."""
    apart = (high - low) / parts
    power = 10.0 ** math.floor(math.log10(apart))
    step = max(power * digit for digit in (1, 2, 5) if power * digit <= apart * (1 + 1e-9))
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [place * step for place in range(first, last + 1)]


def figure(title: str, drawn: str, height: float) -> str:
    return (
        f"<figure><figcaption>{escape(title)}</figcaption><svg viewBox='0 0 {WIDTH} {height:.0f}' role=img "
        f"aria-label='{escape(title)}'>{drawn}</svg></figure>"
    )


def _axis_title(text: str, x: float, y: float, anchor: str = "end") -> str:
    return f"<text class=soft x='{x:.0f}' y='{y:.0f}' text-anchor={anchor}>{escape(text)}</text>"


def _whisker(interval: Interval | None, x: Callable[[float], float], y: float) -> str:
    if interval is None:
        return ""
    low, high = sorted((x(interval[0]), x(interval[1])))
    return (
        f"<path class=whisker d='M{low:.1f} {y - 4:.1f}v8M{low:.1f} {y:.1f}H{high:.1f}M{high:.1f} {y - 4:.1f}v8' "
        "fill='none'/>"
    )


def _wilson(rate: float, rows: float) -> Interval:
    """95 % interval of a rate observed in so many rows.

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 1927.
    """
    z = 1.96
    middle = (rate + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(rate * (1 - rate) / rows + z * z / (4 * rows * rows))
    return max(0.0, middle - half), min(1.0, middle + half)


def _count(number: float) -> str:
    return f"{number / 1e6:g}M" if number >= 1e6 else f"{number / 1e3:g}k" if number >= 1e4 else f"{number:g}"
