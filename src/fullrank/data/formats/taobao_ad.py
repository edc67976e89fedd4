"""Taobao's display advertising log: ads shown to users, with what the users browsed, and bought, before."""

# Shapes: n rows of a chunk.

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

import polars as pl

from fullrank.data.formats.base import split_files, training_file
from fullrank.data.formats.by_user import ByUser, groups_for
from fullrank.data.formats.delimited import delimited_chunks, named_chunks
from fullrank.data.formats.layout import text_layout
from fullrank.data.formats.lines import first_line
from fullrank.data.histories import point_in_time
from fullrank.data.raw import LINE_COLUMN, RawChunk, check_columns, only_rejected, raw_columns, rejected_table
from fullrank.schema import Categorical, EventId, Feature, Keys, Label, Numeric, Role, Schema, Sequence

SAMPLE, ADS, USERS, BEHAVIOR = "raw_sample.csv", "ad_feature.csv", "user_profile.csv", "behavior_log.csv"
PROFILE = (
    "cms_segid", "cms_group_id", "final_gender_code", "age_level", "pvalue_level", "shopping_level", "occupation",
    "new_user_class_level",
)  # fmt: skip
ROLES: dict[str, Role] = {
    "userid": "user",
    **dict.fromkeys(PROFILE, "user"),
    **dict.fromkeys(("adgroup_id", "cate_id", "campaign_id", "customer", "brand"), "item"),
    "pid": "context",
    "btag": "context",
}
# Names in the leaderboard's CSV files, where they differ from the schema's.
_STORED = {"behavior.cate": "cate_his", "behavior.brand": "brand_his", "behavior.btag": "btag_his"}
# As in the leaderboard's runs: a rarer value shares the out-of-vocabulary row.
MIN_COUNT = 10
HISTORY = 50
# The kind of behaviour that an ad is shown for: a page view.
PAGE_VIEW = "pv"
# The eighth day of the log, 2017-05-13 in China, tests; the last tenth of the seven days before it validates.
TEST_FROM = 1_494_604_800
VALID_FROM = TEST_FROM - 7 * 86_400 // 10
CHUNK_ROWS = 32_768
_SHOWN = 200


class TaobaoAd:
    """The directory of the original release (`raw_sample.csv`, `ad_feature.csv`, `user_profile.csv` and, for the
    sequence `behavior`, `behavior_log.csv`), or the leaderboard's TaobaoAd_x1 (`train.csv`, `test.csv`).

    Of the original files, the eighth day is the test part and the last tenth of the days before it (by time) the
    validation part; a user or ad without a profile keeps its row with missing values. Behaviours at the second of an
    impression or later are not part of its history. The behaviour log is sorted into temporary files by user (TMPDIR
    needs about half its size), and the rows come out by groups of users.
    """

    name = "taobao-ad"
    split_column = "split"
    held_out: Literal["users", "rows"] = "rows"

    def default_schema(self, path: Path) -> Schema:
        directory = _original(path)
        if directory is not None:
            return _schema(history=(directory / BEHAVIOR).is_file(), timed=True)
        names = text_layout(training_file(self, path)).named
        check_columns(path, ("clk", *ROLES, "price", *_STORED.values()), names, " of TaobaoAd_x1")
        return _schema(history=True, timed=False)

    def chunks(self, path: Path, schema: Schema, extra: Collection[str] = ()) -> Iterator[RawChunk]:
        directory = _original(path)
        return named_chunks(path, schema, _STORED, extra) if directory is None else _rows(directory, schema)

    def parts(self, path: Path) -> dict[str, Path] | None:
        return None if _original(path) is not None else split_files(path, (".csv",))


def _original(path: Path) -> Path | None:
    """The directory of the original files, if `path` is it or one of them."""
    directory = path if path.is_dir() else path.parent
    if path.is_file() and (path.name != SAMPLE or "time_stamp" not in first_line(path)):
        return None
    if not (directory / SAMPLE).is_file():
        return None
    for name in (ADS, USERS):
        if not (directory / name).is_file():
            raise ValueError(f"{directory}: {SAMPLE} is there and {name} is missing")
    return directory


def _schema(*, history: bool, timed: bool) -> Schema:
    ids = [name for name in ROLES if history or name != "btag"]
    features: list[Feature] = [Categorical(name=name, role=ROLES[name], min_count=MIN_COUNT) for name in ids]
    # The original prices go up to 10^8; those of the leaderboard's files are on a scale of their own.
    # The leaderboard's models read a standardised scalar.
    features.append(
        Numeric(name="price", role="item", transform="log1p")
        if timed
        else Numeric(name="price", role="item", transform="standard", encoding="scalar")
    )
    if history:
        tables = {"cate": "cate_id", "brand": "brand", "btag": "btag"}
        fields = tuple(EventId(name=name, table=table, min_count=MIN_COUNT) for name, table in tables.items())
        features.append(Sequence(name="behavior", fields=fields, max_length=HISTORY))
    keys = Keys(user_id="userid", item_id="adgroup_id", timestamp="time_stamp" if timed else None)
    return Schema(features=tuple(features), labels=(Label(name="clk"),), keys=keys)


def _rows(directory: Path, schema: Schema) -> Iterator[RawChunk]:
    columns = [*raw_columns(schema), "split"]
    about: list[pl.DataFrame] = []
    for name, key, others in (
        (ADS, "adgroup_id", ["cate_id", "campaign_id", "customer", "brand", "price"]),
        (USERS, "userid", list(PROFILE)),
    ):
        tables = list(_texts(directory / name, [key, *others]))
        rejected = pl.concat(table.rejected for table in tables)
        if rejected.height:
            yield only_rejected(columns, rejected)
        about.append(pl.concat(table.frame for table in tables).drop(LINE_COLUMN).unique(key, maintain_order=True))
    lengths = [sequence.max_length for sequence in schema.sequences if sequence.name == "behavior"]
    chunks = _with_histories(directory, lengths[0], columns) if lengths else _impressions(directory / SAMPLE)
    for chunk in chunks:
        frame = chunk.frame
        for table, key in zip(about, ("adgroup_id", "userid"), strict=True):
            frame = frame.join(table, on=key, how="left", maintain_order="left")
        time = pl.col("time_stamp").cast(pl.Int64, strict=False)
        before = pl.when(time >= VALID_FROM).then(pl.lit("valid")).otherwise(pl.lit("train"))
        part = pl.when(time >= TEST_FROM).then(pl.lit("test")).otherwise(before)
        yield RawChunk(frame.with_columns(split=part, btag=pl.lit(PAGE_VIEW)), chunk.rejected)


def _impressions(file: Path) -> Iterator[RawChunk]:
    for chunk in _texts(file, ["user", "time_stamp", "adgroup_id", "pid", "clk"]):
        yield RawChunk(chunk.frame.rename({"user": "userid"}), chunk.rejected)


def _with_histories(directory: Path, length: int, columns: list[str]) -> Iterator[RawChunk]:
    """The impressions, each with the behaviours before it."""
    groups = groups_for([directory / SAMPLE, directory / BEHAVIOR])
    with ByUser("userid", groups) as shown, ByUser("userid", groups) as done:
        for chunk in _impressions(directory / SAMPLE):
            frame, rejected = _integers(chunk, ["userid", "time_stamp"], [], "")
            shown.add(frame)
            if rejected.height:
                yield only_rejected(columns, rejected)
        for chunk in _texts(directory / BEHAVIOR, ["user", "time_stamp", "btag", "cate", "brand"]):
            chunk = RawChunk(chunk.frame.rename({"user": "userid"}), chunk.rejected)
            frame, rejected = _integers(chunk, ["userid", "time_stamp"], ["cate", "brand"], f" ({BEHAVIOR})")
            done.add(frame.drop(LINE_COLUMN).with_columns(pl.col("btag").replace("ipv", PAGE_VIEW)))
            if rejected.height:
                yield only_rejected(columns, rejected)
        nothing = pl.DataFrame(
            schema={"userid": pl.Int64, "time_stamp": pl.Int64, "btag": pl.String, "cate": pl.Int64, "brand": pl.Int64}
        )
        for place in range(groups):
            frame_of_group, events = shown.frame(place), done.frame(place)
            if frame_of_group is None:
                continue
            for first in range(0, frame_of_group.height, CHUNK_ROWS):
                rows = point_in_time(
                    frame_of_group[first : first + CHUNK_ROWS],
                    nothing if events is None else events,
                    user="userid",
                    timestamp="time_stamp",
                    fields={name: f"behavior.{name}" for name in ("cate", "brand", "btag")},
                    max_length=length,
                )
                yield RawChunk(rows.with_columns(pl.col("userid").cast(pl.String)))


def _texts(file: Path, columns: list[str]) -> Iterator[RawChunk]:
    """Columns of one of the original files as text, with `__line`; "NULL" is missing."""
    layout = text_layout(file)
    check_columns(file, columns, layout.named)
    for chunk in delimited_chunks(file, layout, columns, plain=frozenset(columns)):
        rejected = chunk.rejected
        if file.name != SAMPLE:
            rejected = rejected.with_columns((pl.col("column") + f" ({file.name})").str.strip_chars())
        values = pl.col(columns).replace(["NULL", ""], None)
        yield RawChunk(chunk.numbered().with_columns(values), rejected)


def _integers(chunk: RawChunk, keys: list[str], ids: list[str], where: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Columns as integers (ids may be missing), and all rows rejected so far, those where one is none included."""
    frame, rejected = chunk.frame, [chunk.rejected]
    for name in (*keys, *ids):
        values = frame[name].cast(pl.Int64, strict=False)
        wrong = values.is_null() if name in keys else values.is_null() & frame[name].is_not_null()
        bad = frame.filter(wrong).select(LINE_COLUMN, name)
        rows = [(line, name + where, "not an integer", (value or "")[:_SHOWN]) for line, value in bad.rows()]
        rejected.append(rejected_table(rows))
        frame = frame.with_columns(values).filter(~wrong)
    return frame, pl.concat(rejected)
