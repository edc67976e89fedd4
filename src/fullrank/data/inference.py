"""A first guess at what the columns of a log mean, to be edited by hand."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import polars as pl

from fullrank.data.raw import TRUE_PREFIX
from fullrank.data.spelling import as_text
from fullrank.data.values import as_numbers, is_value
from fullrank.schema import (
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
)

LABEL_NAMES = ("label", "click", "clicked", "is_click", "isclick", "clk", "y", "target", "conversion", "purchase")
KEY_NAMES = {
    "request_id": ("request_id", "impression_id", "request", "bid_id", "bidid"),
    "user_id": ("user_id", "userid", "user", "uid", "visitor_id"),
    "item_id": ("item_id", "itemid", "item", "iid", "ad_id", "adid", "adgroup_id", "creative_id", "movie_id"),
    "timestamp": ("timestamp", "time", "ts", "datetime", "event_time", "time_stamp", "unix_timestamp"),
    "weight": ("weight", "sample_weight"),
    "bid": ("bid", "bid_price"),
}
_ITEM_KEYS_TOO = ("article_id", "video_id", "product_id", "news_id", "asin")
_SEPARATORS = ("^", "|", ";")
_HISTORY_WORDS = ("history", "hist", "sequence", "seq")
# An integer column with more distinct values than this, not named like an id, is taken for a quantity.
_MOST_CODES = 1000
# So many bad values do not change what a column is: they are the importer's to reject.
_BAD_SHARE = 0.01
# Enough rows per user (or item) to believe that a column follows from it.
_ROWS_PER_KEY = 3


@dataclass(frozen=True)
class ColumnProfile:
    """What a sample shows of a column.

    Attributes:
        use: what the inferred schema does with it.
        dtype: as stored; `text` columns are shown with what the text holds.
        distinct: number of different non-missing values in the sample.
        missing: share of missing values in the sample.
        example: the most frequent value.
    """

    name: str
    use: str
    dtype: str
    distinct: int
    missing: float
    example: str


def infer_schema(sample: pl.DataFrame, labels: Collection[str] = (), keys: Mapping[str, str] | None = None) -> Schema:
    """An unfitted schema guessed from the names and values of a sample of rows; see `profile`."""
    return profile(sample, labels, keys)[0]


def profile(
    sample: pl.DataFrame, labels: Collection[str] = (), keys: Mapping[str, str] | None = None
) -> tuple[Schema, list[ColumnProfile]]:
    """The guessed schema, and what was seen of each column.

    Args:
        labels: names of the labels, if they are known; other columns that are named like labels are then left out, for
            they would tell the labels. A column of other numbers than 0 and 1 becomes a regression.
        keys: columns of some of the keys, if they are known: `{"user_id": "visitor"}`.

    Raises:
        ValueError: if one of these columns does not exist, or a label does not hold numbers.
    """
    facts = {name: _facts(sample[name]) for name in sample.columns}
    given = dict(keys or {})
    for what, name in (*(("label", name) for name in labels), *given.items()):
        if name not in facts:
            raise ValueError(f'{what}: there is no column "{name}"; there are {", ".join(facts)}')
    guessed = {key: name for key, name in _keys(facts).items() if name not in (*given.values(), *labels)}
    keys = guessed | given
    like_labels = {name for name in facts if name.lower() in LABEL_NAMES} if labels else set()
    labels = labels or _labels(facts)
    features: list[Feature] = []
    uses: dict[str, str] = {}
    for key, column in keys.items():
        uses[column] = f"key {key}"
    for name in like_labels:
        uses[name] = "left out: named like a label"
    for label in labels:
        uses[label] = "label"
    only_keys = {keys.get(key) for key in ("request_id", "timestamp", "weight", "bid")}
    sequences: dict[str, list[str]] = {}
    for name in sample.columns:
        if name in labels or name in like_labels or name in only_keys:
            continue
        fact = facts[name]
        if name.startswith(TRUE_PREFIX):
            uses[name] = "left out: a true probability"
            continue
        if not fact.is_readable:
            uses[name] = "left out: neither text nor numbers"
            continue
        role = _role(sample, name, keys, fact)
        if "." in name and name.partition(".")[0] in facts:
            uses[name] = "left out: there is a column of the name before the point"
            continue
        if fact.is_list and "." in name:
            sequences.setdefault(name.split(".", 1)[0], []).append(name)
            continue
        if fact.is_list and any(word in name.lower() for word in _HISTORY_WORDS):
            shared = keys.get("item_id")
            table = shared if shared is not None and _overlap(sample, name, shared, fact.separator) > 0.5 else None
            field = EventId(name=shared or "id", table=table) if table else EventId(name="id")
            features.append(Sequence(name=name, fields=(field,), separator=fact.separator or "^"))
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
    schema = Schema(
        features=tuple(features), labels=tuple(_label(name, facts[name]) for name in labels), keys=Keys(**keys)
    )
    profiles = [
        ColumnProfile(name, uses[name], facts[name].dtype, facts[name].distinct, facts[name].missing, facts[name].top)
        for name in sample.columns
    ]
    return schema, profiles


@dataclass(frozen=True)
class _Facts:
    dtype: str
    distinct: int
    missing: float
    top: str
    is_readable: bool = True
    is_list: bool = False
    separator: str | None = None
    is_number: bool = False
    is_integer: bool = False
    is_quantity: bool = False
    all_distinct: bool = False
    lowest: float = 0.0
    is_binary: bool = False
    numbers_in_list: bool = False


def _facts(column: pl.Series) -> _Facts:
    rows = max(len(column), 1)
    dtype = str(column.dtype)
    nested = isinstance(column.dtype, (pl.List, pl.Array))
    elements = column.explode().drop_nulls() if nested else column
    if not is_value(elements.dtype):
        return _Facts(dtype=dtype, distinct=0, missing=column.null_count() / rows, top="", is_readable=False)
    if nested:
        top = str(column.drop_nulls().head(1).to_list()[0])[:60] if column.null_count() < len(column) else ""
        return _Facts(
            dtype=dtype, distinct=elements.n_unique(), missing=column.null_count() / rows, top=top, is_list=True,
            numbers_in_list=elements.dtype.is_float(),
        )  # fmt: skip
    text = as_text(column.cast(pl.String) if column.dtype.is_temporal() else column)
    present = text.drop_nulls()
    counts = present.value_counts(sort=True).head(1)
    distinct = present.n_unique()
    numbers, wrong, infinite = as_numbers(column.drop_nulls() if column.dtype == pl.Boolean else present)
    bad = wrong | infinite
    is_number = len(present) > 0 and bad.mean() <= _BAD_SHARE and not column.dtype.is_temporal()
    numbers = numbers[~bad]
    is_integer = bool(is_number and (numbers == numbers.round()).all())
    lowest = float(numbers.min()) if is_number else 0.0
    named_id = column.name.lower().endswith(("id", "code", "_no")) or column.dtype == pl.Boolean
    separator = None if is_number else _separator(present)
    if column.dtype == pl.String:
        kind = "integer" if is_integer else "number" if is_number else "list" if separator else "text"
        dtype = kind if len(present) else "empty"
    return _Facts(
        dtype=dtype,
        distinct=distinct,
        missing=(rows - len(present)) / rows if len(column) else 0.0,
        top="" if not counts.height else str(counts.row(0)[0])[:60],
        is_list=separator is not None,
        separator=separator,
        is_number=is_number,
        is_integer=is_integer,
        is_quantity=is_number and not named_id and (not is_integer or distinct > _MOST_CODES),
        all_distinct=distinct == len(present) and len(present) > 100,
        lowest=lowest,
        is_binary=bool(is_number and ((numbers != 0) & (numbers != 1)).sum() + bad.sum() <= _BAD_SHARE * len(present)),
    )


def _separator(present: pl.Series) -> str | None:
    """The character that joins lists: it stands in at least a tenth of the texts, and cutting there finds values that
    recur."""
    for separator in _SEPARATORS:
        joined = present.filter(present.str.contains(separator, literal=True))
        if len(joined) >= max(len(present) // 10, 1):
            pieces = joined.str.split(separator).explode()
            if pieces.n_unique() < len(pieces):
                return separator
    return None


def _keys(facts: dict[str, _Facts]) -> dict[str, str]:
    keys: dict[str, str] = {}
    lower = {name.lower(): name for name in reversed(facts)}
    for key, names in KEY_NAMES.items():
        for name in (*names, *(_ITEM_KEYS_TOO if key == "item_id" else ())):
            if key not in keys and name in lower and facts[lower[name]].is_readable and not facts[lower[name]].is_list:
                keys[key] = lower[name]
    for key in ("timestamp", "weight", "bid"):
        if key in keys and not facts[keys[key]].is_number and key != "timestamp":
            del keys[key]
    return keys


def _labels(facts: dict[str, _Facts]) -> list[str]:
    named = [name for name in facts if name.lower() in LABEL_NAMES and facts[name].is_binary]
    if named:
        return named
    binary = [name for name in facts if facts[name].is_binary and facts[name].distinct > 1]
    # A single column of zeros and ones is the only thing that can be the label; of several, the user must choose.
    binary = [name for name in binary if facts[name].dtype != "Boolean"] or binary
    return binary if len(binary) == 1 else []


def _label(name: str, fact: _Facts) -> Label:
    if not fact.is_number:
        raise ValueError(f'label: the column "{name}" holds {fact.dtype}, such as "{fact.top}", expected numbers')
    return Label(name=name, kind="binary" if fact.is_binary else "regression")


def _role(sample: pl.DataFrame, name: str, keys: dict[str, str], fact: _Facts) -> Role:
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
        if sample.height >= _ROWS_PER_KEY * different and both == different:
            return role
    return "context"


def _overlap(sample: pl.DataFrame, name: str, shared: str, separator: str | None) -> float:
    """Share of the elements of a list column that are values of another column."""
    column = sample[name].head(10_000)
    elements = (column if separator is None else column.str.split(separator)).explode().drop_nulls().cast(pl.String)
    return float(elements.is_in(sample[shared].cast(pl.String).unique().implode()).mean() or 0.0)  # type: ignore[arg-type]


def _event_field(name: str, fact: _Facts, item: str | None) -> EventId | EventNumber:
    if fact.numbers_in_list:
        return EventNumber(name=name)
    return EventId(name=name, table=item if name == item else None)
