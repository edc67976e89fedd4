"""A first guess at what the columns of a log mean, to be edited by hand.

A guess by name is held against the whole sample: a key must be able to be one, a label must have two values, a list
must have elements that recur. What is known only after the label (an outcome) is a label or left out, never a feature.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import ValidationError

from fullrank.data.chunk import Mask
from fullrank.data.column_facts import BAD_SHARE, CLASS_NAMES, HISTORY_WORDS, LABEL_NAMES, Facts, bare_name, facts_of
from fullrank.data.formats.base import Format, Sampled
from fullrank.data.raw import TRUE_PREFIX
from fullrank.data.spelling import as_text
from fullrank.data.times import are_recent, date_layout, seconds_of, text_layout, unit_of
from fullrank.data.values import as_numbers
from fullrank.schema import (
    MISSING_MARKERS,
    Categorical,
    EventId,
    EventNumber,
    Feature,
    Keys,
    Label,
    MultiCategorical,
    Numeric,
    Role,
    Schema,
    Sequence,
    TimeUnit,
    describe_errors,
)

# What happens after an impression, beside the click: with 0 and 1 these are labels too.
OUTCOME_NAMES = (
    "purchase", "purchased", "bought", "buy", "order", "ordered", "conversion", "converted", "convert", "like", "liked",
    "dislike", "disliked", "share", "shared", "follow", "followed", "comment", "commented", "favorite", "favorited",
    "favourite", "collect", "collected", "subscribe", "subscribed", "install", "installed", "register", "registered",
    "signup", "hide", "hidden", "skip", "skipped", "report", "reported", "cart", "add_to_cart", "addtocart",
    "long_view", "longview", "upvote", "downvote", "click", "clicked", "clk",
)  # fmt: skip
_OUTCOME_PREFIXES = ("is_", "has_", "did_", "label_", "y_", "is")
# Numbers that only what happened gives, such as how long it was watched.
_OUTCOME_NUMBERS = ("dwell", "watch_time", "watchtime", "play_time", "playtime", "play_duration", "revenue", "rating")
KEY_NAMES = {
    "request_id": ("request_id", "impression_id", "request", "bid_id", "bidid", "impressionid", "requestid"),
    "user_id": ("user_id", "userid", "user", "uid", "visitor_id", "visitorid", "customer_id", "reviewerid"),
    "item_id": ("item_id", "itemid", "item", "iid", "ad_id", "adid", "adgroup_id", "creative_id", "movie_id"),
    "timestamp": ("timestamp", "time", "ts", "datetime", "event_time", "time_stamp", "unix_timestamp", "date"),
    "weight": ("weight", "sample_weight"),
    "bid": ("bid", "bid_price"),
}
# Whom a log without users is about; beside users, what does not recur.
_SESSION_NAMES = ("session_id", "sessionid", "session", "visit_id", "search_id", "query_id", "page_view_id")
_TIME_WORDS = {"time", "ts", "timestamp", "date", "datetime", "at", "when", "millis", "ms", "epoch"}
_ITEM_KEYS_TOO = ("article_id", "video_id", "product_id", "news_id", "asin")
# A column follows from a key if rows of the same key differ in it less than so often as rows drawn at random would.
_DIFFERING = 0.01
_ROWS_THAT_TELL = 10.0
# Shares of repeated request ids and of unreadable times above which a column is no such key, as an import would fail.
_MOST_REPEATED = 0.001
# So unlikely must it be that a column is filled only at positives by chance.
_BY_CHANCE = 1e-6
_UNIT_NAMES: dict[TimeUnit, str] = {"s": "", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}


@dataclass(frozen=True)
class ColumnProfile:
    """What a sample shows of a column.

    Attributes:
        use: what the inferred schema does with it.
        role: whom it describes, if it is a feature: `user`, `item` or `context`.
        dtype: as stored; `text` columns are shown with what the text holds.
        distinct: number of different non-missing values in the sample.
        missing: share of missing values in the sample.
        readable: share of rows with a value that can be read as what the column is taken for.
        example: the most frequent value.
        is_outcome: whether it is left out because it tells what happened.
    """

    name: str
    use: str
    dtype: str
    distinct: int
    missing: float
    example: str
    role: str = ""
    readable: float = 1.0
    is_outcome: bool = False


def guessed_schema(
    source: Format,
    path: Path,
    labels: Collection[str] = (),
    keys: Mapping[str, str] | None = None,
    *,
    missing: Collection[str] | None = None,
    time_unit: TimeUnit | None = None,
    time_format: str | None = None,
) -> tuple[Schema, list[ColumnProfile], int]:
    """The schema that a format gives or a sample suggests, what was seen of each column, and in how many rows.

    Raises:
        ValueError: if the path is not in the format, or one of the columns does not exist.
    """
    if isinstance(source, Sampled):
        sample = source.sample(path)
        # A wrong format of times is refused before it is tried.
        with_reading(Schema(), missing, time_unit, time_format)
        marks = MISSING_MARKERS if missing is None else missing
        schema, columns = profile(sample, labels, keys, missing=marks, time_unit=time_unit, time_format=time_format)
        return schema, columns, sample.height
    return with_reading(source.default_schema(path), missing, time_unit, time_format), [], 0


def schema_for(
    source: Format,
    path: Path,
    labels: Collection[str] = (),
    keys: Mapping[str, str] | None = None,
    *,
    keep: Collection[str] = (),
    missing: Collection[str] | None = None,
    time_unit: TimeUnit | None = None,
    time_format: str | None = None,
) -> Schema:
    """The schema of `guessed_schema`, to import by; what is left out because it tells what happened is warned of.

    Args:
        keep: columns that are kept beside the features, and are none.
    """
    schema, columns, _ = guessed_schema(
        source, path, labels, keys, missing=missing, time_unit=time_unit, time_format=time_format
    )
    for column in columns:
        if column.is_outcome and column.name not in keep:
            warnings.warn(f'{path}: column "{column.name}" is {column.use}', stacklevel=3)
    return schema.without(keep)


def with_reading(
    schema: Schema,
    missing: Collection[str] | None = None,
    time_unit: TimeUnit | None = None,
    time_format: str | None = None,
) -> Schema:
    """The same schema with other missing markers, time unit or time format, where they are given.

    Raises:
        ValueError: in one line, if one cannot be.
    """
    given: dict[str, Any] = {"time_unit": time_unit, "time_format": time_format}
    given["missing"] = None if missing is None else tuple(text for text in missing if text)
    told = {name: value for name, value in given.items() if value is not None}
    if not told:
        return schema
    try:
        return Schema.model_validate({**schema.model_dump(), **told})
    except ValidationError as error:
        raise ValueError(describe_errors(error, "schema").splitlines()[0]) from None


def infer_schema(sample: pl.DataFrame, labels: Collection[str] = (), keys: Mapping[str, str] | None = None) -> Schema:
    """An unfitted schema guessed from the names and values of a sample of rows; see `profile`."""
    return profile(sample, labels, keys)[0]


def profile(
    sample: pl.DataFrame,
    labels: Collection[str] = (),
    keys: Mapping[str, str] | None = None,
    *,
    missing: Collection[str] = MISSING_MARKERS,
    time_unit: TimeUnit | None = None,
    time_format: str | None = None,
) -> tuple[Schema, list[ColumnProfile]]:
    """The guessed schema, and what was seen of each column.

    Args:
        labels: names of the labels, if they are known; other columns that are named like labels are then left out, for
            they would tell the labels. A column of other numbers than 0 and 1 becomes a regression.
        keys: columns of some of the keys, if they are known: `{"user_id": "visitor"}`.
        missing: texts that stand for no value.
        time_unit, time_format: of the timestamp, if they are known.

    Raises:
        ValueError: if one of these columns does not exist, or a label does not hold numbers.
    """
    facts = {name: facts_of(sample[name], missing) for name in sample.columns}
    given = dict(keys or {})
    for what, name in (*(("label", name) for name in labels), *given.items()):
        if name not in facts:
            raise ValueError(f'{what}: there is no column "{name}"; there are {", ".join(facts)}')
    told = _Time(time_unit, time_format)
    guessed = _keys(sample, facts, missing, told)
    guessed = {key: name for key, name in guessed.items() if name not in (*given.values(), *labels)}
    keys = guessed | given
    labels, outcomes = _labels(sample, facts, set(keys.values()), list(labels), missing)
    features: list[Feature] = []
    uses: dict[str, str] = {}
    roles: dict[str, Role] = {}
    for key, column in keys.items():
        uses[column] = f"key {key}"
    passing: dict[str, str] = {}
    for name, fact in facts.items():
        if name in keys.values() or name in labels or not fact.is_readable:
            continue
        if bare_name(name) in KEY_NAMES["request_id"]:
            passing[name] = "left out: repeats, so it is no key of single rows"
        elif bare_name(name) in _SESSION_NAMES:
            passing[name] = "left out: sessions do not come again"
        elif (
            fact.is_integer and fact.lowest > 0 and _is_called_time(name) and are_recent(as_text(sample[name], missing))
        ):
            passing[name] = "left out: a time, and not the key"
    uses |= passing | outcomes
    for label in labels:
        uses[label] = "label" if not facts[label].positive else f'label: 1 is "{facts[label].positive}"'
    only_keys = {keys.get(key) for key in ("request_id", "timestamp", "weight", "bid")}
    sequences: dict[str, list[str]] = {}
    for name in sample.columns:
        if name in labels or name in outcomes or name in passing or name in only_keys:
            continue
        fact = facts[name]
        if name.startswith(TRUE_PREFIX):
            uses[name] = "left out: a true probability"
            continue
        if not fact.is_readable:
            uses[name] = "left out: neither text nor numbers"
            continue
        role = roles[name] = _role(sample, name, keys, fact)
        if "." in name and name.partition(".")[0] in facts:
            uses[name] = "left out: there is a column of the name before the point"
            continue
        if fact.is_list and "." in name:
            sequences.setdefault(name.split(".", 1)[0], []).append(name)
            continue
        if fact.is_list and any(word in bare_name(name) for word in HISTORY_WORDS):
            shared = keys.get("item_id")
            table = shared if shared is not None and _overlap(sample, name, shared, fact.separator) > 0.5 else None
            field = EventId(name=shared or "id", table=table) if table else EventId(name="id")
            features.append(Sequence(name=name, fields=(field,), separator=fact.separator or "^"))
            roles[name] = "user"
            uses.setdefault(name, "sequence")
        elif fact.is_list:
            features.append(MultiCategorical(name=name, role=role, separator=fact.separator or "|"))
            uses.setdefault(name, "bag of ids")
        elif fact.all_distinct and name not in keys.values() and not fact.is_quantity:
            uses[name] = "left out: every value is different"
        elif fact.is_quantity and name not in keys.values():
            transform = "log1p" if fact.is_integer and fact.lowest >= 0 else "standard"
            features.append(
                Numeric(name=name, role=role, transform=transform, missing_indicator=fact.missing > 0)  # type: ignore[arg-type]
            )
            uses[name] = f"number, {transform}"
        else:
            features.append(Categorical(name=name, role=role))
            uses[name] = f"{uses[name]}, categorical" if name in uses else "categorical"
    for sequence, columns in sequences.items():
        fields = tuple(_event_field(column.split(".", 1)[1], facts[column], keys.get("item_id")) for column in columns)
        features.append(Sequence(name=sequence, fields=fields))
        uses.update(dict.fromkeys(columns, "sequence"))
        roles.update(dict.fromkeys(columns, "user"))
    time = told
    if "timestamp" in keys:
        time = _time(sample[keys["timestamp"]], missing, told)
        how = time.layout or _UNIT_NAMES[time.unit or "s"]
        uses[keys["timestamp"]] += f", {how}" if how else ""
    schema = Schema(
        features=tuple(features),
        labels=tuple(_label(name, facts[name]) for name in labels),
        keys=Keys(**keys),
        missing=tuple(missing),
        time_unit=time.unit or "s",
        time_format=time.layout,
    )
    featured = {feature.name for feature in features} | {name for names in sequences.values() for name in names}
    profiles = [
        ColumnProfile(
            name, uses[name], fact.dtype, fact.distinct, fact.missing, fact.top,
            roles[name] if name in featured else "", _readable(sample[name], fact, uses[name], missing, time),
            name in outcomes,
        )
        for name, fact in facts.items()
    ]  # fmt: skip
    return schema, profiles


def _readable(column: pl.Series, fact: Facts, use: str, missing: Collection[str], time: _Time) -> float:
    if use.startswith("key timestamp"):
        seconds = seconds_of(column, time.unit or "s", time.layout, missing)
        return 1.0 - seconds.null_count() / max(len(column), 1)
    return 0.0 if not fact.is_readable else 1.0 - fact.missing - fact.bad


def _keys(sample: pl.DataFrame, facts: dict[str, Facts], missing: Collection[str], time: _Time) -> dict[str, str]:
    """Columns named like keys that can be what they are named."""
    keys: dict[str, str] = {}
    bare = {bare_name(name): name for name in reversed(facts)}
    for key, names in KEY_NAMES.items():
        for short in (*names, *(_ITEM_KEYS_TOO if key == "item_id" else ())):
            name = bare.get(short)
            if key in keys or name is None or not facts[name].is_readable or facts[name].is_list:
                continue
            fact = facts[name]
            if key == "request_id":
                fits = fact.repeated <= _MOST_REPEATED and fact.missing <= _MOST_REPEATED
            elif key == "timestamp":
                found = _time(sample[name], missing, time)
                seconds = seconds_of(sample[name], found.unit or "s", found.layout, missing)
                fits = seconds.null_count() <= BAD_SHARE * len(seconds)
            else:
                fits = key not in ("weight", "bid") or (fact.is_number and fact.lowest >= 0)
            if fits:
                keys[key] = name
    if "user_id" not in keys:
        sessions = [bare[short] for short in _SESSION_NAMES if short in bare and facts[bare[short]].is_readable]
        if sessions:
            keys["user_id"] = sessions[0]
    if "timestamp" not in keys:
        times = [
            name for name, fact in facts.items()
            if name not in keys.values() and _is_called_time(name) and fact.is_readable and not fact.is_list
            and fact.missing <= _MOST_REPEATED and are_recent(as_text(sample[name].cast(pl.String), missing))
        ]  # fmt: skip
        if times:
            keys["timestamp"] = max(times, key=lambda name: facts[name].distinct)
    return keys


def _is_called_time(name: str) -> bool:
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name.partition(":")[0])
    return not _TIME_WORDS.isdisjoint(re.split(r"[\W_]+", words.lower()))


@dataclass(frozen=True)
class _Time:
    """How a timestamp is written, as far as it is known."""

    unit: TimeUnit | None
    layout: str | None


def _time(column: pl.Series, missing: Collection[str], told: _Time) -> _Time:
    """Unit and layout of a timestamp, by the whole sample if neither was told."""
    if told.unit or told.layout or column.dtype.is_temporal():
        return told
    text = as_text(column, missing)
    return _Time(unit_of(text), date_layout(text) or text_layout(text))


def _labels(
    sample: pl.DataFrame,
    facts: dict[str, Facts],
    keys: set[str],
    given: list[str],
    missing: Collection[str],
) -> tuple[list[str], dict[str, str]]:
    """The labels, the main one first, and why other columns that only what happened can fill are left out."""
    outcomes: dict[str, str] = {}
    free = [name for name, fact in facts.items() if name not in keys and fact.is_readable and not fact.is_list]
    named = [name for name in free if bare_name(name) in LABEL_NAMES and facts[name].is_binary]
    named += [name for name in free if name not in named and _named_outcome(name) and facts[name].is_binary]
    classes = [name for name in free if bare_name(name) in CLASS_NAMES and facts[name].is_binary]
    ratings = [name for name in free if bare_name(name) == "rating" and facts[name].is_number]
    binary = [name for name in free if facts[name].is_binary and facts[name].distinct > 1]
    # A single column of zeros and ones is the only thing that can be the label; of several, the user must choose.
    plain = [name for name in binary if facts[name].dtype != "Boolean" and not facts[name].positive] or binary
    labels = given or named or classes or ratings or (plain if len(plain) == 1 else [])
    for name in free:
        if name in labels:
            continue
        if name in named or (given and bare_name(name) in LABEL_NAMES):
            outcomes[name] = "left out: named like a label"
        elif any(bare_name(name).startswith(word) for word in _OUTCOME_NUMBERS) and facts[name].is_number and labels:
            outcomes[name] = "left out: known only after what it would predict, by its name"
    if labels and facts[labels[0]].is_binary:
        main = _ones(sample[labels[0]], facts[labels[0]], missing)
        for name in free:
            if name not in labels and name not in outcomes and _only_where(main, sample[name], facts[name], missing):
                if facts[name].is_binary and facts[name].distinct > 1 and not given:
                    labels = [*labels, name]
                else:
                    outcomes[name] = f"left out: filled only where {labels[0]} is 1, so known only after"
    return labels, outcomes


def _named_outcome(name: str) -> bool:
    bare = bare_name(name)
    return bare in OUTCOME_NAMES or any(bare.removeprefix(prefix) in OUTCOME_NAMES for prefix in _OUTCOME_PREFIXES)


def _ones(column: pl.Series, fact: Facts, missing: Collection[str]) -> Mask:
    text = as_text(column.cast(pl.Int8) if column.dtype == pl.Boolean else column, missing)
    if fact.positive:
        return (text == fact.positive).fill_null(False).to_numpy()
    ones: Mask = as_numbers(text)[0] == 1
    return ones


def _only_where(main: Mask, column: pl.Series, fact: Facts, missing: Collection[str]) -> bool:
    """Whether a column has a value other than 0 at positives alone, beyond chance."""
    if not fact.missing and not fact.is_number:
        return False
    text = as_text(column.cast(pl.String) if column.dtype.is_temporal() else column, missing)
    filled = text.is_not_null().to_numpy()
    if fact.is_number:
        filled = filled & ~(as_numbers(text)[0] == 0)
    count, share = int(filled.sum()), float(main.mean())
    return count > 0 and not filled.all() and bool(main[filled].all()) and share**count < _BY_CHANCE


def _label(name: str, fact: Facts) -> Label:
    if fact.positive:
        return Label(name=name, positive=(fact.positive,), negative=(fact.negative,))
    if not fact.is_number:
        raise ValueError(
            f'label: the column "{name}" holds {fact.dtype}, such as "{fact.top}", expected numbers (a schema may name '
            'the texts that mean 1: {"name": "' + name + '", "positive": ["' + fact.top + '"]})'
        )
    return Label(name=name, kind="binary" if fact.is_binary else "regression")


def _role(sample: pl.DataFrame, name: str, keys: dict[str, str], fact: Facts) -> Role:
    """The key that decides the column's value, if one does."""
    roles: tuple[tuple[str, Role], ...] = (("user_id", "user"), ("item_id", "item"))
    for key, role in roles:
        column = keys.get(key)
        if column is None:
            continue
        if name == column:
            return role
        if fact.distinct < 2 or isinstance(sample[name].dtype, (pl.List, pl.Array)):
            continue
        pairs = sample.select(
            pl.col(column).n_unique().alias("keys"), pl.struct(column, name).n_unique().alias("pairs")
        )
        different, both = pairs.row(0)
        shares = sample[name].value_counts()["count"].to_numpy() / max(sample.height, 1)
        # Rows after the first of their key, and how many of them would differ from it if the key decided nothing.
        by_chance = (sample.height - different) * (1.0 - float((shares**2).sum()))
        if by_chance >= _ROWS_THAT_TELL and both - different <= _DIFFERING * by_chance:
            return role
    return "context"


def _overlap(sample: pl.DataFrame, name: str, shared: str, separator: str | None) -> float:
    """Share of the elements of a list column that are values of another column."""
    column = sample[name].head(10_000)
    elements = (column if separator is None else column.str.split(separator)).explode().drop_nulls().cast(pl.String)
    return float(elements.is_in(sample[shared].cast(pl.String).unique().implode()).mean() or 0.0)  # type: ignore[arg-type]


def _event_field(name: str, fact: Facts, item: str | None) -> EventId | EventNumber:
    if fact.numbers_in_list:
        return EventNumber(name=name)
    return EventId(name=name, table=item if name == item else None)
