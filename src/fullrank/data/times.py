"""Reading times: numbers since 1970 in a unit, dates written as numbers, ISO texts, and texts of any layout."""

# Shapes: n values of a column.

from __future__ import annotations

from collections.abc import Collection

import polars as pl

from fullrank.data.spelling import as_text
from fullrank.schema import TimeUnit

UNITS: dict[TimeUnit, int] = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
# Seconds since 1970 beyond this are the year 5138: surely another unit.
LATEST_TIMESTAMP = 100_000_000_000
# The years 2000 and 2100: numbers that are called times and lie between are times.
_RECENT = (946_684_800, 4_102_444_800)
# Numbers that are dates; as seconds, the first are some days of August 1970 and the second years beyond 2030.
_DATES = {8: "%Y%m%d", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}
_ISO = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d %H:%M:%S%.f%#z", "%Y-%m-%d %H:%M:%S%.f %#z", "%Y-%m-%d")
_USUAL = (
    *(f"{date}{time}" for date in ("%d/%m/%Y", "%m/%d/%Y", "%Y/%m/%d", "%d.%m.%Y", "%d-%m-%Y")
      for time in (" %H:%M:%S", " %H:%M", "")),
    "%d/%b/%Y:%H:%M:%S %z", "%Y%m%dT%H%M%S", "%d %b %Y %H:%M:%S", "%m %d, %Y",
)  # fmt: skip


def seconds_of(
    values: pl.Series, unit: TimeUnit = "s", layout: str | None = None, missing: Collection[str] = ()
) -> pl.Series:
    """Whole seconds since 1970 UTC, null where a value is no time; a time without an offset is UTC.

    Args:
        values: times, numbers, or text of either.
        unit: of numbers.
        layout: of texts and of dates written as numbers, such as `%d/%m/%Y %H:%M`. Without it texts are ISO 8601.
        missing: texts that stand for no time.

    Raises:
        ValueError: if the column has a type that cannot be a time.
    """
    if values.dtype.is_temporal():
        if values.dtype in (pl.Time, pl.Duration):
            raise ValueError(f'column "{values.name}" holds {values.dtype}, expected a time with its date')
        return values.cast(pl.Datetime("ms")).dt.epoch("s")
    if layout is not None:
        return _laid_out(as_text(values, missing), layout)
    text = as_text(values, missing) if values.dtype == pl.String else values
    whole = text.cast(pl.Int64, strict=False) if text.dtype == pl.String or text.dtype.is_integer() else None
    seconds = pl.Series([None] * len(text), dtype=pl.Int64) if whole is None else whole // UNITS[unit]
    if seconds.null_count():
        numbers = text.cast(pl.Float64, strict=False) / UNITS[unit]
        numbers = numbers.to_frame("n").select(pl.when(pl.col("n").is_finite()).then(pl.col("n"))).to_series()
        seconds = seconds.zip_with(seconds.is_not_null(), numbers.floor().cast(pl.Int64, strict=False))
    return parsed_times(text, seconds) if text.dtype == pl.String else seconds


def parsed_times(text: pl.Series, seconds: pl.Series | None = None) -> pl.Series:
    """Seconds since 1970 of texts such as `2014-10-21 05:00:00`, `2014-10-21T05:00:00Z`, `2014-10-21T07:00:00.5+02:00`
    or `2014-10-21`, where `seconds` has none yet; null where none fits."""
    if seconds is None:
        numbers = text.cast(pl.Float64, strict=False)
        numbers = numbers.to_frame("n").select(pl.when(pl.col("n").is_finite()).then(pl.col("n"))).to_series()
        seconds = numbers.floor().cast(pl.Int64, strict=False)
    if seconds.null_count() == text.null_count():
        return seconds
    plain = text.str.strip_chars().str.strip_suffix("Z").str.replace("T", " ", literal=True)
    for layout in _ISO:
        if seconds.null_count() == text.null_count():
            break
        seconds = seconds.zip_with(seconds.is_not_null(), _laid_out(plain, layout))
    return seconds


def _laid_out(text: pl.Series, layout: str) -> pl.Series:
    """Seconds since 1970 of texts of one layout; null where it does not fit."""
    if "z" in layout.replace("%%", ""):
        parsed = text.str.to_datetime(layout, time_unit="ms", time_zone="UTC", strict=False)
    elif not any(part in layout for part in ("%H", "%I", "%T", "%R")):
        return text.str.to_date(layout, strict=False).cast(pl.Datetime("ms")).dt.epoch("s")
    elif not any(part in layout for part in ("%M", "%T", "%R")):
        # Hours alone are no time of day for the parser.
        parsed = (text + "|00").str.to_datetime(f"{layout}|%M", time_unit="ms", strict=False)
    else:
        parsed = text.str.to_datetime(layout, time_unit="ms", strict=False)
    return parsed.dt.epoch("s")


def date_layout(values: pl.Series) -> str | None:
    """The layout of dates written as numbers, such as 20200930, if every value is one; at least two values."""
    text = as_text(values).drop_nulls() if not values.dtype.is_temporal() else pl.Series([], dtype=pl.String)
    if len(text) < 2 or not text.str.contains(r"^(19|20)[0-9]{2}(0[1-9]|1[0-2])[0-3][0-9]+$").all():
        return None
    lengths = text.str.len_bytes().unique()
    layout = _DATES.get(lengths[0]) if len(lengths) == 1 else None
    return layout if layout is not None and not _laid_out(text, layout).null_count() else None


def text_layout(text: pl.Series) -> str | None:
    """The one usual layout, other than ISO 8601, that fits every text; None if none or several do."""
    present = text.drop_nulls().unique()
    if not len(present) or present.head(100).cast(pl.Float64, strict=False).null_count() == 0:
        return None
    if parsed_times(present.head(100)).null_count() == 0:
        return None
    fitting = [layout for layout in _USUAL if not _laid_out(present.head(100), layout).null_count()]
    fitting = [layout for layout in fitting if not _laid_out(present, layout).null_count()]
    return fitting[0] if len(fitting) == 1 else None


def are_recent(values: pl.Series) -> bool:
    """Whether (nearly) all of these are times between 2000 and 2100, in some unit or as a date and time."""
    text = as_text(values.cast(pl.String) if values.dtype.is_temporal() else values).drop_nulls()
    seconds = seconds_of(text, unit_of(text) or "s", date_layout(text)).drop_nulls()
    within = seconds.is_between(*_RECENT).sum() if len(seconds) else 0
    return len(text) > 0 and within >= 0.99 * len(text)


def unit_of(values: pl.Series) -> TimeUnit | None:
    """The unit in which all of these numbers are times between 1973 and 5138; None if there is no such unit, or the
    numbers are no later than that in seconds."""
    if values.dtype.is_temporal():
        return None
    numbers = as_text(values).cast(pl.Float64, strict=False).drop_nulls()
    numbers = numbers.filter(numbers.is_finite() & (numbers > 0))
    if not len(numbers):
        return None
    low, high = numbers.quantile(0.01, "nearest"), numbers.quantile(0.99, "nearest")
    assert low is not None and high is not None
    unit: TimeUnit
    for unit in ("ms", "us", "ns"):
        if low >= LATEST_TIMESTAMP * UNITS[unit] / 1000 and high < LATEST_TIMESTAMP * UNITS[unit]:
            return unit
    return None
