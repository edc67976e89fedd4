"""iPinYou real-time bidding log: impressions, joined with clicks on the bid id."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl

from fullrank.data.formats.delimited import delimited_chunks
from fullrank.data.formats.layout import Layout
from fullrank.data.raw import RawChunk
from fullrank.schema import Categorical, Keys, Label, MultiCategorical, Numeric, Role, Schema

COLUMNS = (
    "bid_id", "time", "log_type", "ipinyou_id", "agent", "ip", "region", "city", "exchange", "domain", "url",
    "anonymous_url", "slot_id", "slot_width", "slot_height", "slot_visibility", "slot_format", "slot_floor", "creative",
    "bidding_price", "paying_price", "landing_page", "advertiser", "user_tags",
)  # fmt: skip
CATEGORIES: dict[str, Role] = {
    "agent": "user",
    "region": "user",
    "city": "user",
    "exchange": "context",
    "domain": "context",
    "slot_id": "context",
    "slot_width": "context",
    "slot_height": "context",
    "slot_visibility": "context",
    "slot_format": "context",
    "creative": "item",
    "advertiser": "item",
}
FROM_TIME = ("hour", "weekday")


class IPinYou:
    """A directory of `imp*.txt` and `clk*.txt` files (or `.gz`), tab-separated, 24 fields, `null` for missing.

    A row is an impression; `click` is 1 if a click of the same bid id is in the directory. The time is read as UTC. The
    paying price is what the auction cost and becomes the key `bid`; it is known only after the auction and is no
    feature. Repeated bid ids are set aside as duplicates.
    """

    name = "ipinyou"

    def default_schema(self, path: Path) -> Schema:
        _files(path)
        times = [Categorical(name=name) for name in FROM_TIME]
        others = [Categorical(name=name, role=role) for name, role in CATEGORIES.items()]
        return Schema(
            features=(
                *times,
                *others,
                Numeric(name="slot_floor", transform="log1p"),
                MultiCategorical(name="user_tags", role="user", separator=",", max_length=64),
            ),
            labels=(Label(name="click"),),
            keys=Keys(
                request_id="bid_id",
                user_id="ipinyou_id",
                item_id="creative",
                timestamp="timestamp",
                bid="paying_price",
            ),
        )

    def chunks(self, path: Path, schema: Schema, extra: Collection[str] = ()) -> Iterator[RawChunk]:
        impressions, clicks = _files(path)
        clicked = pl.concat(
            [chunk.frame.select("bid_id") for file in clicks for chunk in _rows(file)] or [pl.DataFrame({"bid_id": []})]
        )["bid_id"].cast(pl.String)
        for file in impressions:
            for chunk in _rows(file):
                yield replace(chunk, frame=_derived(chunk.frame, clicked))

    def parts(self, path: Path) -> dict[str, Path] | None:
        return None


def _files(path: Path) -> tuple[list[Path], list[Path]]:
    if not path.is_dir():
        raise ValueError(f"{path}: expected a directory with iPinYou's imp*.txt and clk*.txt files")
    impressions, clicks = (
        sorted([*path.glob(f"{kind}*.txt"), *path.glob(f"{kind}*.txt.gz")]) for kind in ("imp", "clk")
    )
    if not impressions:
        raise ValueError(f"{path}: there is no imp*.txt or imp*.txt.gz")
    return impressions, clicks


def _rows(file: Path) -> Iterator[RawChunk]:
    yield from delimited_chunks(file, Layout(COLUMNS, "\t", skipped=0), COLUMNS, plain=frozenset(COLUMNS))


def _derived(frame: pl.DataFrame, clicked: pl.Series) -> pl.DataFrame:
    frame = frame.with_columns(pl.when(pl.col(pl.String) != "null").then(pl.col(pl.String)).name.keep())
    # Seconds are the first 14 of 17 digits; a time that does not parse is shown as it is in the report of bad rows.
    time = pl.col("time").str.head(14).str.to_datetime("%Y%m%d%H%M%S", strict=False)
    seconds = time.dt.epoch("s").cast(pl.String)
    return frame.with_columns(
        click=pl.col("bid_id").is_in(clicked.implode()).cast(pl.Int8),
        timestamp=pl.when(seconds.is_not_null()).then(seconds).otherwise("time " + pl.col("time")),
        hour=time.dt.hour().cast(pl.String),
        weekday=time.dt.weekday().cast(pl.String),
    )
