"""Which rows train a model and which judge it."""

# Shapes: n rows.

from __future__ import annotations

from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fullrank.data.hashing import splitmix, stable_hash
from fullrank.schema import describe_errors

PARTS = ("train", "valid", "test")
TRAIN, VALID, TEST = range(3)
Parts = npt.NDArray[np.int8]

_GIVEN = {
    "train": TRAIN,
    "training": TRAIN,
    "valid": VALID,
    "validation": VALID,
    "val": VALID,
    "dev": VALID,
    "test": TEST,
}


class SplitSpec(BaseModel):
    """How to split a log.

    Attributes:
        kind: `time` trains on the earliest rows and tests on the latest; `user` keeps all rows of a user together;
            `random` draws rows; `given` reads the part from `column`; `none` puts every row into train. None means
            `time` when the schema has a timestamp, else `random`.
        valid, test: shares of the rows (of the users, for `user`).
        seed: of `user` and `random`.
        column: values train, valid (validation, val, dev) or test.
        protocol: `bars`: of a benchmark that comes as a train and a test file, the test rows are the validation rows
            too, as in its leaderboard's runs, so that figures compare. Early stopping then sees the test labels, which
            flatters the result; by default, part of the training rows is set aside instead.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["time", "user", "random", "given", "none"] | None = None
    valid: float = Field(default=0.1, ge=0, lt=1)
    test: float = Field(default=0.1, ge=0, lt=1)
    seed: int = Field(default=0, ge=0)
    column: str | None = None
    protocol: Literal["bars"] | None = None

    @classmethod
    def of(cls, value: Self | str | None) -> Self:
        """The split that its kind alone stands for.

        Raises:
            ValueError: if there is no such kind.
        """
        if isinstance(value, cls):
            return value
        try:
            return cls.model_validate({"kind": value})
        except ValidationError as error:
            raise ValueError(describe_errors(error, "split").splitlines()[0]) from None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.valid + self.test >= 1:
            raise ValueError(
                f"valid + test is {self.valid + self.test}, expected less than 1: nothing is left to train on"
            )
        if (self.kind == "given") != (self.column is not None):
            raise ValueError('split "given" needs the name of its column, and only "given" has one')
        return self


class TimestampCounts:
    """How many rows each second has, over chunks; what a split by time is computed from."""

    def __init__(self) -> None:
        self._merged: pl.DataFrame | None = None
        self._pending: list[pl.DataFrame] = []
        self._pending_rows = 0

    def add(self, timestamps: pl.Series) -> None:
        frame = timestamps.alias("timestamp").to_frame().group_by("timestamp").len("rows")
        self._pending.append(frame.cast({"rows": pl.Int64}))
        self._pending_rows += frame.height
        if self._pending_rows > max(1 << 20, 0 if self._merged is None else self._merged.height):
            self._merge()

    def _merge(self) -> None:
        frames = self._pending if self._merged is None else [self._merged, *self._pending]
        if frames:
            self._merged = pl.concat(frames).group_by("timestamp").agg(pl.col("rows").sum())
        self._pending, self._pending_rows = [], 0

    def cuts(self, valid: float, test: float) -> tuple[int, int]:
        """Timestamps from which rows are valid and test, so that their shares are as near as whole seconds allow."""
        self._merge()
        assert self._merged is not None
        ordered = self._merged.sort("timestamp")
        times = ordered["timestamp"].to_numpy()
        before = np.concatenate([[0], np.cumsum(ordered["rows"].to_numpy())])

        def cut(share: float) -> int:
            if share == 0:
                return int(times[-1]) + 1
            place = int(np.abs(before[:-1] - (1 - share) * before[-1]).argmin())
            # The first second always trains: a log of a single second has no future to test on.
            return int(times[place]) if place > 0 else int(times[-1]) + 1

        test_from = cut(test)
        return min(cut(valid + test), test_from), test_from


def by_time(timestamps: npt.NDArray[np.int64], valid_from: int, test_from: int) -> Parts:
    """Part of each row: equal timestamps stay together, and training ends before validation begins."""
    return (timestamps >= valid_from).astype(np.int8) + (timestamps >= test_from).astype(np.int8)


def by_hash(hashes: npt.NDArray[np.uint64], spec: SplitSpec) -> Parts:
    """Part of each row by a hash of its number or its user: no state, so it streams and can be repeated."""
    seed = splitmix(np.array([spec.seed], dtype=np.uint64))[0]
    uniform = (splitmix(hashes ^ seed) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    parts = np.full(len(hashes), TRAIN, dtype=np.int8)
    parts[uniform < spec.valid + spec.test] = VALID
    parts[uniform < spec.test] = TEST
    return parts


def by_user(users: pl.Series, spec: SplitSpec) -> Parts:
    """Part of each row by its user, integers or text; rows without one stay together."""
    return by_hash(stable_hash(users).fill_null(0).to_numpy(), spec)


def by_name(names: pl.Series) -> npt.NDArray[np.int8]:
    """Part of each row from its name; -1 where there is none of that name."""
    return names.cast(pl.String).str.to_lowercase().replace_strict(_GIVEN, default=-1, return_dtype=pl.Int8).to_numpy()
