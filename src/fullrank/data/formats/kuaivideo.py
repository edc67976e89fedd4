"""KuaiVideo: clicks on micro-videos, with the videos that the user clicked and passed over before."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

from fullrank.data.formats.base import split_files, training_file
from fullrank.data.formats.delimited import named_chunks
from fullrank.data.formats.layout import text_layout
from fullrank.data.raw import RawChunk, check_columns
from fullrank.schema import Categorical, EventId, Keys, Label, Schema, Sequence

COLUMNS = ("timestamp", "user_id", "item_id", "is_click", "is_like", "is_follow", "pos_items", "neg_items")
_STORED = {"clicked.item": "pos_items", "passed.item": "neg_items"}
# As in the leaderboard's runs: a rarer video shares the out-of-vocabulary row.
MIN_COUNT = 10
HISTORY = 100


class KuaiVideo:
    """The leaderboard's CSV files, `train.csv` and `test.csv`, or one of them.

    Sequences `clicked` and `passed` are its columns pos_items and neg_items. The timestamps only order the rows (their
    origin and unit are hidden by the publisher), so they are no key; likes and follows are labels that a schema may
    name. The publisher's visual vectors of the videos are not read.
    """

    name = "kuaivideo"
    held_out: Literal["users", "rows"] = "users"

    def default_schema(self, path: Path) -> Schema:
        names = text_layout(training_file(self, path)).named
        check_columns(path, COLUMNS, names, " of KuaiVideo's format")
        event = EventId(name="item", table="item_id", min_count=MIN_COUNT)
        return Schema(
            features=(
                Categorical(name="user_id", role="user", min_count=MIN_COUNT),
                Categorical(name="item_id", role="item", min_count=MIN_COUNT),
                Sequence(name="clicked", fields=(event,), max_length=HISTORY),
                Sequence(name="passed", fields=(event,), max_length=HISTORY),
            ),
            labels=(Label(name="is_click"),),
            keys=Keys(user_id="user_id", item_id="item_id"),
        )

    def chunks(self, path: Path, schema: Schema, extra: Collection[str] = ()) -> Iterator[RawChunk]:
        return named_chunks(path, schema, _STORED, extra)

    def parts(self, path: Path) -> dict[str, Path] | None:
        return split_files(path, (".csv",))
