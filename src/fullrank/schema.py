"""What the columns of a log mean: features, labels and keys.

A `Schema` is written beside a dataset as `schema.json` and travels in every checkpoint and bundle, so that training,
evaluation and serving read the same columns in the same order. It is plain data: nothing in it is code.

A schema is born unfitted (from an importer, from `fullrank data inspect`, or by hand); fitting the encoders on the
training part fills in every `num_embeddings`. Models need a fitted schema.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Role = Literal["user", "item", "context"]
TimeUnit = Literal["s", "ms", "us", "ns"]

# Texts that stand for no value, beside the empty one, unless a schema says otherwise.
MISSING_MARKERS = ("NULL", "null", "NA", "N/A", "NaN", "nan", "None", "<NA>", "\\N", "-")

_TIME_PARTS = (*"YymdbBejHIMSpTRFDz%", ".f", "f", ":z", "#z")

# Ids that every vocabulary reserves. PADDING is never looked up: lengths say where a bag or a sequence ends.
MISSING_ID = 0
OUT_OF_VOCABULARY_ID = 1
FIRST_VOCABULARY_ID = 2
# Rows that a table of raw ids would have if each had one: they are 62 bits wide.
RAW_IDS = 1 << 62


class Part(BaseModel):
    """Base of every piece of a schema: unknown keys are errors, values do not change after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# Of counters, unless the schema says otherwise.
_TRANSFORMS = {"count": "log1p", "rate": "standard"}


class Numeric(Part):
    """One real number per row.

    Attributes:
        name: of the column.
        role: whom it describes.
        transform: how the raw number is bent before it is encoded; `standard` and `quantile` are fitted on training
            rows.
        encoding: what models read of the number. `scalar`: itself, times a learned vector. `piecewise_linear`: how
            far it fills each of the bins between training quantiles, so that any continuous function of it with bends
            at the quantiles is a linear one of its code. `periodic`: sines and cosines of it at learned frequencies.
        bins: at most so many, for `piecewise_linear`. A value with more than a bin's share of the rows (the zero of a
            zero-inflated number) has a bin's edge of its own.
        missing_indicator: add the column `<name>__missing`, which is 1 where the number is missing. A missing number
            becomes the training mean; a piecewise linear one has a code of its own where training rows miss some.
        of: if given, the number is no column of the log but a counter over the earlier rows that have the same values
            as the row in these columns (id features, or the keys user_id and item_id): see `data.derived`.
        statistic: `count` of these rows (of those whose `label` is 1, if there is one), or `rate`, the mean of `label`
            over them, drawn towards the mean of all rows so far. The transform of a count is log1p and that of a rate
            is standard unless said, and its role that of its columns.
        label: what a counter counts.
        smoothing: of a rate: rows that the mean of all rows weighs.
    """

    kind: Literal["numeric"] = "numeric"
    name: str = Field(min_length=1)
    role: Role = "context"
    transform: Literal["none", "log1p", "standard", "quantile"] = "none"
    encoding: Literal["scalar", "piecewise_linear", "periodic"] = "piecewise_linear"
    bins: int = Field(default=32, ge=1, le=1024)
    missing_indicator: bool = False
    of: tuple[str, ...] = ()
    statistic: Literal["count", "rate"] | None = None
    label: str | None = None
    smoothing: float = Field(default=20.0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _usual_transform(cls, values: Any) -> Any:
        if isinstance(values, dict) and "transform" not in values and values.get("statistic") in _TRANSFORMS:
            return {**values, "transform": _TRANSFORMS[values["statistic"]]}
        return values

    @model_validator(mode="after")
    def _counts_something(self) -> Self:
        if bool(self.of) != (self.statistic is not None):
            raise ValueError(f'feature "{self.name}": a counter needs both "of" (columns) and "statistic"')
        if self.statistic == "rate" and self.label is None:
            raise ValueError(f'feature "{self.name}": a rate needs the label whose rate it is')
        if self.label is not None and not self.of:
            raise ValueError(f'feature "{self.name}": "label" belongs to a counter, which names columns in "of"')
        return self

    @property
    def missing_column(self) -> str | None:
        """The column that is 1 where the number is missing, if there is one."""
        return f"{self.name}__missing" if self.missing_indicator else None

    @property
    def columns(self) -> tuple[str, ...]:
        """The number's columns of `Batch.numeric_BN`, side by side."""
        return (self.name,) if self.missing_column is None else (self.name, self.missing_column)


class _Embedded(Part):
    """What the three kinds of id features share.

    Attributes:
        name: of the column.
        role: whom it describes.
        encoding: `vocabulary` keeps the values seen at least `min_count` times in training, `hash` maps a value to one
            of `num_embeddings` buckets, `log2_bucket` buckets a count as floor(log2(x)**2) does for x > 2 (the
            Criteo challenge's winning recipe), `quantile` buckets a number by training quantiles, `identity` takes
            integers in [0, num_embeddings) as they are, `raw` keeps every value apart without having seen it: whole
            numbers as they are, texts by 62 bits of their hash. Its table must be of a kind that has no row for each.
        table: name of the embedding table; features with the same table share rows. Default: the feature's own name.
        min_count: rows of the training part that a value has to occur in, for `vocabulary`.
        num_embeddings: rows of the table, reserved ids included; None until fitted, required for `hash`/`identity`.
        embedding_dim: width of this table; None means the model's default.
    """

    name: str = Field(min_length=1)
    role: Role = "context"
    encoding: Literal["vocabulary", "hash", "log2_bucket", "quantile", "identity", "raw"] = "vocabulary"
    table: str | None = None
    min_count: int = Field(default=1, ge=1)
    num_embeddings: int | None = Field(default=None, ge=1)
    embedding_dim: int | None = Field(default=None, ge=1)

    @property
    def table_name(self) -> str:
        return self.table or self.name

    @property
    def is_wide(self) -> bool:
        """Whether its ids take 64 bits where they are stored, and not 32."""
        return self.num_embeddings is not None and self.num_embeddings > 1 << 31

    @model_validator(mode="after")
    def _sized(self) -> Self:
        if self.encoding == "raw":
            if self.num_embeddings not in (None, RAW_IDS):
                raise ValueError(f'feature "{self.name}": encoding "raw" takes no num_embeddings')
            object.__setattr__(self, "num_embeddings", RAW_IDS)  # the feature is frozen for its users
        if self.encoding in ("hash", "identity") and self.num_embeddings is None:
            raise ValueError(f'feature "{self.name}": encoding "{self.encoding}" needs num_embeddings')
        return self


class Categorical(_Embedded):
    """Exactly one id per row."""

    kind: Literal["categorical"] = "categorical"


class MultiCategorical(_Embedded):
    """A bag of ids per row, in no particular order; possibly empty.

    Attributes:
        separator: splits the raw text; lists in Parquet need none.
        max_length: longer bags keep their first ids.
        pooling: how the bag's vectors become one; the mean of an empty bag is the zero vector.
    """

    kind: Literal["multi_categorical"] = "multi_categorical"
    separator: str = Field(default="|", min_length=1)
    max_length: int = Field(default=32, ge=1)
    pooling: Literal["sum", "mean"] = "mean"


class EventId(_Embedded):
    """An id carried by each event of a sequence, such as the clicked item or its category."""

    kind: Literal["event_id"] = "event_id"


class EventNumber(Part):
    """A real number carried by each event of a sequence, such as its age in seconds at request time.

    Attributes:
        name: of the field.
        transform: how the raw number becomes a model input.
    """

    kind: Literal["event_number"] = "event_number"
    name: str = Field(min_length=1)
    transform: Literal["none", "log1p"] = "none"


class Sequence(Part):
    """Events in time order, oldest first; all fields of one sequence have the same length in a row.

    Attributes:
        name: of the sequence.
        role: whom it describes.
        fields: columns in the data are named `<sequence>.<field>`.
        separator: splits the raw text of a field; lists in Parquet need none.
        max_length: longer histories keep their most recent events; `length` is read as another name of it.
        of: if given, the sequence is no column of the log but the user's earlier rows: these id features of each. The
            fields follow from them and share their tables, so they are left out. See `data.derived`.
        where: only rows whose label of this name is 1 are events.
        age: a derived history has one more field `age`: log1p of the seconds between event and row.
    """

    kind: Literal["sequence"] = "sequence"
    name: str = Field(min_length=1)
    role: Role = "user"
    fields: tuple[Annotated[EventId | EventNumber, Field(discriminator="kind")], ...] = ()
    separator: str = Field(default="^", min_length=1)
    max_length: int = Field(default=50, ge=1)
    of: tuple[str, ...] = ()
    where: str | None = None
    age: bool = False

    @model_validator(mode="before")
    @classmethod
    def _length(cls, values: Any) -> Any:
        if isinstance(values, dict) and "length" in values and "max_length" not in values:
            return {("max_length" if key == "length" else key): value for key, value in values.items()}
        return values

    @model_validator(mode="after")
    def _has_fields(self) -> Self:
        if not self.fields and not self.of:
            raise ValueError(f'sequence "{self.name}" needs "fields", or "of": the columns to derive a history from')
        if not self.of and (self.where is not None or self.age):
            raise ValueError(f'sequence "{self.name}": "where" and "age" belong to a derived history: give "of"')
        wanted = [*self.of, *(["age"] if self.age else [])]
        if len(set(wanted)) < len(wanted):
            raise ValueError(f'sequence "{self.name}": two fields would be called alike: {", ".join(wanted)}')
        if self.of and self.fields and [field.name for field in self.fields] != wanted:
            raise ValueError(f'sequence "{self.name}": its fields follow from "of": leave out "fields"')
        return self

    @property
    def id_fields(self) -> tuple[EventId, ...]:
        return tuple(field for field in self.fields if isinstance(field, EventId))

    @property
    def number_fields(self) -> tuple[EventNumber, ...]:
        return tuple(field for field in self.fields if isinstance(field, EventNumber))

    def column(self, field: EventId | EventNumber) -> str:
        return f"{self.name}.{field.name}"


Feature = Annotated[Numeric | Categorical | MultiCategorical | Sequence, Field(discriminator="kind")]


class Label(Part):
    """One task.

    Attributes:
        name: of the column.
        kind: `binary` is in [0, 1] and predicted as log-odds, `regression` is any number.
        delay_seconds: how long after the impression the label is final; 0 when it is known at once.
        weight: weight of the task in the training loss.
        positive: texts that mean 1 where the column does not hold numbers, such as `>50K` or `purchase`. Truth values
            need none.
        negative: texts that mean 0, any further one making a bad row; when empty, all that are not positive mean 0.
    """

    name: str = Field(min_length=1)
    kind: Literal["binary", "regression"] = "binary"
    delay_seconds: float = Field(default=0.0, ge=0)
    weight: float = Field(default=1.0, gt=0)
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _mapped(self) -> Self:
        if (self.positive or self.negative) and self.kind != "binary":
            raise ValueError(f'label "{self.name}": only a binary label has positive and negative values')
        if self.negative and not self.positive:
            raise ValueError(f'label "{self.name}": negative values need positive ones')
        both = set(self.positive) & set(self.negative)
        if both:
            raise ValueError(f'label "{self.name}": "{min(both)}" is both positive and negative')
        return self


class Keys(Part):
    """Names of the columns that identify a row; they are carried beside the features, never fed to a model.

    Attributes:
        request_id: of one row; a later row with the same one is rejected.
        user_id: of the user; GAUC is computed within users.
        item_id: of the item; what retrieval finds.
        timestamp: int64 seconds since 1970, UTC.
        weight: non-negative importance of the row in loss and metrics.
        bid: non-negative value of one action of the first label, used by the value formula.
    """

    request_id: str | None = None
    user_id: str | None = None
    item_id: str | None = None
    timestamp: str | None = None
    weight: str | None = None
    bid: str | None = None


class Schema(Part):
    """Features, labels and keys of a log.

    Attributes:
        version: of this format. Where it is written, so are encodings and missing markers: a number without one is a
            scalar there, and only the empty text is missing.
        features: their order is the order of columns in a `Batch`.
        labels: what there is to predict, the main task first.
        keys: columns that identify a row.
        missing: texts that stand for no value, beside the empty one, in logs and in requests.
        time_unit: of timestamps that are numbers since 1970.
        time_format: of timestamps that are texts, or dates written as numbers, such as `%Y%m%d`; ISO 8601 needs none.
    """

    version: Literal[1] = 1
    features: tuple[Feature, ...] = ()
    labels: tuple[Label, ...] = ()
    keys: Keys = Keys()
    missing: tuple[str, ...] = MISSING_MARKERS
    time_unit: TimeUnit = "s"
    time_format: str | None = None

    @field_validator("time_format")
    @classmethod
    def _known_format(cls, value: str | None) -> str | None:
        if value is None:
            return None
        unknown = [part for part in re.findall(r"%(\.?:?#?.?)", value) if part not in _TIME_PARTS]
        if unknown:
            raise ValueError(f'"%{unknown[0]}" is no part of a time; there are %{", %".join(_TIME_PARTS)}')
        if not {"%Y", "%y", "%F", "%D"} & {f"%{part}" for part in re.findall(r"%(.)", value)}:
            raise ValueError("expected a year in it, such as %Y")
        return value

    @model_validator(mode="before")
    @classmethod
    def _as_of_old(cls, written: Any) -> Any:
        # Saved schemas say their version and every field; those that know no encodings are of models that knew none.
        if not isinstance(written, Mapping) or written.get("version") != 1:
            return written
        features = written.get("features", ())
        if isinstance(features, (list, tuple)):
            features = [
                {"encoding": "scalar", **feature}
                if isinstance(feature, Mapping) and feature.get("kind") == "numeric"
                else feature
                for feature in features
            ]
        # Likewise, their models knew "NA" and the like as values.
        return {"missing": (), **written, "features": features}

    @model_validator(mode="after")
    def _derived(self) -> Self:
        """What derived features take over from the columns that they come from."""
        resolved = tuple(self._resolved(feature) for feature in self.features)
        if any(new is not old for new, old in zip(resolved, self.features, strict=True)):
            # The schema is frozen for its users.
            object.__setattr__(self, "features", resolved)
        return self

    def _resolved(self, feature: Feature) -> Feature:
        if not isinstance(feature, (Numeric, Sequence)) or not feature.of:
            return feature
        history = isinstance(feature, Sequence)
        for key in ("timestamp", "user_id") if history else ("timestamp",):
            if getattr(self.keys, key) is None:
                what = "a history" if history else "a counter"
                raise ValueError(f'feature "{feature.name}": {what} derived from the log needs the key {key}')
        label = feature.where if isinstance(feature, Sequence) else feature.label
        if label is not None and label not in (known := [label.name for label in self.labels]):
            raise ValueError(f'feature "{feature.name}": there is no label "{label}"; there is {", ".join(known)}')
        ids = {column.name: column for column in self.categorical}
        if isinstance(feature, Sequence):
            return feature if feature.fields else self._with_fields(feature, ids)
        if "role" in feature.model_fields_set:
            return feature
        roles = self.counted_roles()
        found = {roles.get(name) for name in feature.of}
        if None in found:
            name = next(name for name in feature.of if name not in roles)
            raise ValueError(
                f'feature "{feature.name}": "{name}" is neither a categorical feature nor the key user_id or item_id; '
                f"these are {', '.join(roles) or 'missing'}"
            )
        return feature.model_copy(update={"role": found.pop() if len(found) == 1 else "context"})

    def counted_roles(self) -> dict[str, Role]:
        """Whom each column describes that counters may be of."""
        roles: dict[str, Role] = {column.name: column.role for column in self.categorical}
        if self.keys.item_id is not None:
            roles[self.keys.item_id] = "item"
        if self.keys.user_id is not None:
            roles[self.keys.user_id] = "user"
        return roles

    @staticmethod
    def _with_fields(sequence: Sequence, ids: dict[str, Categorical]) -> Sequence:
        for name in sequence.of:
            if name not in ids:
                raise ValueError(
                    f'sequence "{sequence.name}": "{name}" is not a categorical feature, of which events can be made; '
                    f"these are {', '.join(ids) or 'missing'}"
                )
        fields: list[EventId | EventNumber] = [
            EventId(
                name=name,
                role=sequence.role,
                table=ids[name].table_name,
                **ids[name].model_dump(include={"encoding", "min_count", "num_embeddings", "embedding_dim"}),
            )
            for name in sequence.of
        ]
        if sequence.age:
            fields.append(EventNumber(name="age", transform="log1p"))
        return sequence.model_copy(update={"fields": tuple(fields)})

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [feature.name for feature in self.features] + [label.name for label in self.labels]
        for name, count in Counter(names).items():
            if count > 1:
                raise ValueError(f'the name "{name}" is used twice; features and labels need distinct names')
        sizes: dict[str, tuple[str, int | None, int | None]] = {}
        for name, feature in self.embedded().items():
            size = (feature.num_embeddings, feature.embedding_dim)
            first = sizes.setdefault(feature.table_name, (name, *size))
            if first[1:] != size:
                raise ValueError(
                    f'features "{first[0]}" and "{name}" share table "{feature.table_name}" but differ in '
                    f"num_embeddings or embedding_dim: {first[1:]} and {size}"
                )
        return self

    @property
    def numeric(self) -> tuple[Numeric, ...]:
        return tuple(feature for feature in self.features if isinstance(feature, Numeric))

    @property
    def categorical(self) -> tuple[Categorical, ...]:
        return tuple(feature for feature in self.features if isinstance(feature, Categorical))

    @property
    def bags(self) -> tuple[MultiCategorical, ...]:
        return tuple(feature for feature in self.features if isinstance(feature, MultiCategorical))

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return tuple(feature for feature in self.features if isinstance(feature, Sequence))

    @property
    def counters(self) -> tuple[Numeric, ...]:
        """The numbers that are derived from earlier rows."""
        return tuple(feature for feature in self.numeric if feature.of)

    @property
    def pair_counters(self) -> tuple[Numeric, ...]:
        """The counters of a user and an item together, which neither of them has alone."""
        roles = self.counted_roles()
        return tuple(
            counter for counter in self.counters if {"user", "item"} <= {roles.get(name) for name in counter.of}
        )

    @property
    def histories(self) -> tuple[Sequence, ...]:
        """The sequences that are derived from earlier rows."""
        return tuple(feature for feature in self.sequences if feature.of)

    @property
    def stored(self) -> Schema:
        """The same schema with only what a log itself holds: without counters and derived histories."""
        return self.without(
            [*(feature.name for feature in self.counters), *(feature.name for feature in self.histories)]
        )

    @property
    def numeric_columns(self) -> tuple[str, ...]:
        """Columns of `Batch.numeric_BN`: each numeric feature, followed by its missing indicator if it has one."""
        return tuple(column for feature in self.numeric for column in feature.columns)

    @property
    def jagged_keys(self) -> tuple[str, ...]:
        """Keys of `Batch.jagged_values`: bags, then the id fields of each sequence as `<sequence>.<field>`."""
        events = [sequence.column(field) for sequence in self.sequences for field in sequence.id_fields]
        return (*(bag.name for bag in self.bags), *events)

    @property
    def event_number_keys(self) -> tuple[str, ...]:
        """Keys of `Batch.event_values`: the number fields of each sequence as `<sequence>.<field>`."""
        return tuple(sequence.column(field) for sequence in self.sequences for field in sequence.number_fields)

    def roles(self) -> dict[str, Role]:
        """Whom each column of a batch describes: numbers, their missing markers, ids, bags and fields of sequences."""
        roles: dict[str, Role] = {}
        for feature in self.features:
            if isinstance(feature, Sequence):
                roles.update((feature.column(field), feature.role) for field in feature.fields)
            else:
                columns = feature.columns if isinstance(feature, Numeric) else (feature.name,)
                roles.update(dict.fromkeys(columns, feature.role))
        return roles

    def embedded(self) -> dict[str, Categorical | MultiCategorical | EventId]:
        """Every id column of a batch and its feature, in lookup order: categorical, then `jagged_keys`."""
        columns: dict[str, Categorical | MultiCategorical | EventId] = {f.name: f for f in self.categorical}
        columns.update({bag.name: bag for bag in self.bags})
        for sequence in self.sequences:
            columns.update({sequence.column(field): field for field in sequence.id_fields})
        return columns

    def tables(self) -> dict[str, int]:
        """Rows of each embedding table.

        Raises:
            ValueError: if a feature is not fitted yet.
        """
        rows: dict[str, int] = {}
        for name, feature in self.embedded().items():
            if feature.num_embeddings is None:
                raise ValueError(f'feature "{name}" has no num_embeddings yet: fit the encoders on training data first')
            rows[feature.table_name] = feature.num_embeddings
        return rows

    def with_table_sizes(self, sizes: dict[str, int]) -> Schema:
        """The same schema with `num_embeddings` of each table in `sizes` set."""

        def sized(part: Any) -> Any:
            if isinstance(part, Sequence):
                return part.model_copy(update={"fields": tuple(sized(field) for field in part.fields)})
            if isinstance(part, _Embedded) and part.table_name in sizes:
                return part.model_copy(update={"num_embeddings": sizes[part.table_name]})
            return part

        return self.model_validate(
            self.model_copy(update={"features": tuple(sized(f) for f in self.features)}).model_dump()
        )

    def select(self, roles: set[Role]) -> Schema:
        """The same schema with only the features of `roles`; labels and keys stay."""
        return self.model_copy(update={"features": tuple(f for f in self.features if f.role in roles)})

    def without(self, names: Collection[str]) -> Schema:
        """The same schema without the features of these names."""
        return self.model_copy(update={"features": tuple(f for f in self.features if f.name not in names)})

    def to_json(self) -> str:
        return self.model_dump_json(indent=2, exclude_defaults=False) + "\n"

    @classmethod
    def from_json(cls, text: str, place: str = "schema") -> Schema:
        """Parse a schema.

        Raises:
            ValueError: one line per wrong field, each naming `place` and the path of the field.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ValueError(describe_errors(error, place)) from None

    @classmethod
    def read(cls, path: Path) -> Schema:
        return cls.from_json(path.read_text(encoding="utf-8"), str(path))


def describe_errors(error: ValidationError, place: str) -> str:
    """One line per wrong field: `place: path.to.field: what was expected, got what`."""
    lines = []
    for item in error.errors():
        path = ".".join(str(step) for step in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key"
        got = "" if item["type"] in ("missing", "extra_forbidden", "value_error") else f", got {item['input']!r}"
        lines.append(": ".join(piece for piece in (place, path, message) if piece) + got)
    return "\n".join(lines)
