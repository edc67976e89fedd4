"""Amazon reviews as a log to rank from: the next item of each user against sampled others."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

from fullrank.data.formats.amazon_files import amazon_files
from fullrank.data.formats.base import split_files
from fullrank.data.formats.delimited import named_chunks
from fullrank.data.formats.event_log import event_rows, event_schema
from fullrank.data.formats.layout import text_layout
from fullrank.data.raw import RawChunk
from fullrank.schema import Schema

COLUMNS = ("label", "user_id", "item_id", "cate_id", "item_history", "cate_history")
_STORED = {"category_id": "cate_id", "history.item": "item_history", "history.category": "cate_history"}


class Amazon:
    """Reviews as JSON lines with metadata (J. McAuley's releases), item sequences with attributes (S3-Rec, as text or
    Parquet), interactions with categories (ReChorus, Parquet), or the leaderboard's AmazonElectronics_x1 as CSV.

    The CSV files are read as they are. Of the others, each event of a user after the first gives a row with label 1,
    and one with label 0 for an item that this user never took, drawn evenly from all items of the log with a fixed
    seed; both carry the user's earlier items, and their categories or attributes. Events of one time keep their order
    in the file. A user's last event is test, the last but one validation, unless another split is asked for.
    """

    name = "amazon"
    split_column = "split"
    held_out: Literal["users", "rows"] = "users"

    def default_schema(self, path: Path) -> Schema:
        files = self.parts(path)
        if files is not None or _is_csv(path):
            names = text_layout((files or {"train": path})["train"]).named
            if names != COLUMNS:
                raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}; it has {', '.join(names)}")
            return event_schema("category_id", timed=False)
        layout = amazon_files(path)
        return event_schema(layout.known, timed=layout.timed)

    def chunks(self, path: Path, schema: Schema, extra: Collection[str] = ()) -> Iterator[RawChunk]:
        if _is_csv(path):
            return named_chunks(path, schema, _STORED, extra)
        return event_rows(amazon_files(path), schema)

    def parts(self, path: Path) -> dict[str, Path] | None:
        if not path.is_dir() or not any((path / f"train{ending}").is_file() for ending in (".csv", ".csv.gz")):
            return None
        return split_files(path, (".csv",))


def _is_csv(path: Path) -> bool:
    return path.name.endswith((".csv", ".csv.gz"))
