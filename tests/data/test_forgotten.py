"""Rows of users who asked to be forgotten are in no dataset, and nobody else's row is another one."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from fullrank.cli.main import app
from fullrank.data.dataset import Dataset
from fullrank.data.forgotten import NobodyLeft, digest, forgotten_users
from fullrank.schema import Schema
from fullrank.serving.store import EventStore

SCHEMA = Schema.model_validate(
    {
        "features": [
            {"kind": "categorical", "name": "item", "role": "item"},
            {"kind": "sequence", "name": "seen", "of": ["item"], "length": 5},
        ],
        "labels": [{"name": "click"}],
        "keys": {"user_id": "user", "item_id": "item", "timestamp": "time"},
    }
)


def log(rows: int = 60) -> pl.DataFrame:
    numbers = range(rows)
    users = [None if k % 10 == 9 else k % 4 for k in numbers]
    items = [f"i{k * 7 % 5}" for k in numbers]
    return pl.DataFrame(
        {"user": users, "item": items, "time": [100 + k for k in numbers], "click": [k % 3 % 2 for k in numbers]}
    )


def test_what_is_left_is_what_a_log_without_them_gives(tmp_path: Path) -> None:
    store = EventStore(tmp_path / "store")
    store.forget("2")
    store.forget("somebody the log does not know")
    store.close()
    whole, without = log(), log().filter(pl.col("user").ne_missing(2))
    made = Dataset.from_frame(whole, SCHEMA, split="none", forgotten=forgotten_users(tmp_path / "store"))
    expected = Dataset.from_frame(without, SCHEMA, split="none")
    assert made.scan("train").collect().equals(expected.scan("train").collect())
    assert made.encoders.agrees_with(expected.encoders)
    assert made.forgotten == whole.height - without.height > 0
    assert expected.forgotten is None


def test_the_command_prints_how_many_and_the_manifest_has_it(tmp_path: Path) -> None:
    store = EventStore(tmp_path / "store")
    store.forget(1)
    store.close()
    log().write_csv(tmp_path / "log.csv")
    (tmp_path / "schema.json").write_text(SCHEMA.to_json())
    words = ["data", "import", "csv", "log.csv", "out", "--schema", "schema.json", "--forgotten", "store", "--json"]
    words = [str(tmp_path / word) if word in ("log.csv", "out", "schema.json", "store") else word for word in words]
    answer = CliRunner().invoke(app, words)
    gone = log().filter(pl.col("user") == 1).height
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["forgotten"] == gone == Dataset.open(tmp_path / "out").forgotten


def test_what_cannot_be_done_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no store of"):
        forgotten_users(tmp_path)
    everybody = {digest(user) for user in range(4)}
    with pytest.raises(NobodyLeft, match="all 54 rows are of users who are to be forgotten"):
        Dataset.from_frame(log().drop_nulls(), SCHEMA, forgotten=everybody)
    nobody = SCHEMA.model_validate(
        {"features": [{"kind": "categorical", "name": "item"}], "labels": [{"name": "click"}]}
    )
    with pytest.raises(ValueError, match="the schema names no user_id"):
        Dataset.from_frame(log(), nobody, forgotten=everybody)
