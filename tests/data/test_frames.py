"""Tables in memory become datasets as files do."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from fullrank.data import frames
from fullrank.data.dataset import Dataset
from fullrank.data.importing import import_dataset
from fullrank.data.loader import Loader
from fullrank.schema import Categorical, Keys, Label, Schema


def table(rows: int = 400) -> pl.DataFrame:
    rng = np.random.default_rng(3)
    return pl.DataFrame(
        {
            "click": rng.integers(0, 2, rows),
            "user_id": [f"u{n}" for n in rng.integers(0, 30, rows)],
            "item_id": rng.integers(0, 20, rows),
            "price": np.where(rng.random(rows) < 0.1, np.nan, rng.random(rows)),
            "timestamp": np.arange(rows) * 60,
            "propensity": rng.random(rows),
        }
    ).with_columns(pl.col("price").fill_nan(None))


def assert_same(dataset: Dataset, expected: Dataset) -> None:
    assert dataset.schema == expected.schema
    assert dataset.splits == expected.splits
    for split in expected.splits:
        assert_frame_equal(dataset.scan(split).collect(), expected.scan(split).collect())


@pytest.mark.parametrize("kind", ["polars", "lazy", "arrow", "batches", "pandas", "mapping", "csv", "parquet"])
def test_a_table_gives_the_dataset_that_importing_its_file_gives(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "CHUNK_ROWS", 130)  # several chunks, as a large table has
    table().write_parquet(tmp_path / "log.parquet")
    expected = import_dataset("parquet", tmp_path / "log.parquet", tmp_path / "expected")
    given: Any = table()
    if kind == "csv":
        given.write_csv(tmp_path / "log.csv")
        given = tmp_path / "log.csv"
    elif kind == "parquet":
        given = str(tmp_path / "log.parquet")
    elif kind == "pandas":
        pandas = pytest.importorskip("pandas")
        given = pandas.DataFrame(table().to_dict(as_series=False))
    else:
        given = {
            "polars": given,
            "lazy": given.lazy(),
            "arrow": given.to_arrow(),
            "batches": given.to_arrow().to_reader(),
            "mapping": given.to_dict(as_series=False),
        }[kind]
    assert_same(Dataset.from_frame(given), expected)


def test_a_temporary_dataset_lives_as_long_as_what_reads_it() -> None:
    dataset = Dataset.from_frame(table())
    path = dataset.path
    loader = Loader(dataset, "train", 50)
    del dataset
    gc.collect()
    assert sum(len(batch) for batch in loader) == 320
    del loader
    gc.collect()
    assert not path.exists()


def test_a_dataset_stays_where_it_was_asked_for_and_is_opened_there(tmp_path: Path) -> None:
    made = Dataset.from_frame(table(), path=tmp_path / "data", split="random", keep=["propensity"])
    gc.collect()
    assert_same(Dataset.from_frame(tmp_path / "data"), made)
    assert made.extra == {"propensity": pl.Float32()}
    with pytest.raises(ValueError, match="exists already"):
        Dataset.from_frame(table(), path=tmp_path / "data")
    with pytest.raises(ValueError, match="is a dataset already"):
        Dataset.from_frame(tmp_path / "data", label="click")


def test_columns_that_are_named_are_not_guessed() -> None:
    frame = table().with_columns(
        pl.col("click") == 1, stay=pl.col("price").fill_null(0) * 100, visitor="user_id", target=pl.col("click")
    )
    schema = Dataset.from_frame(frame, label=["click", "stay"], user_id="visitor").schema
    assert schema.labels == (Label(name="click"), Label(name="stay", kind="regression"))
    assert schema.keys == Keys(user_id="visitor", item_id="item_id", timestamp="timestamp")
    # What is named like a label would tell the labels.
    assert "target" not in schema.embedded() and "target" not in schema.numeric_columns


def test_columns_of_pandas_that_have_no_single_type_are_text() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"click": [True, False, None, True], 7: [1, "a", None, 2.5]})
    schema = Schema(features=(Categorical(name="7"),), labels=(Label(name="click"),))
    dataset = Dataset.from_frame(frame, schema, split="none", max_bad=0.25)
    assert dataset.rejected == {"no label": 1}
    assert dataset.scan("train").collect()["click"].to_list() == [1.0, 0.0, 1.0]
    assert dataset.encoders.vocabularies["7"].values.to_list() == ["1", "2.5", "a"]
    with pytest.raises(ValueError, match='the column "click" appears twice'):
        Dataset.from_frame(pandas.concat([frame, frame], axis=1), schema)


@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        ({"click": [0, 1, 7], "x": [1, 2, 3]}, "schema", 'row 3: column "click" is "7": label is not 0 or 1$'),
        ({"click": [0, 1, 7], "x": [1, 2, 3]}, {}, "no label found; name its column"),
        ({"click": [0, 1], "x": ["a", "b"]}, {"label": "x"}, 'label: the column "x" holds text, such as "a"'),
        ({"click": [0, 1]}, {"item_id": "ad"}, 'item_id: there is no column "ad"; there are click'),
        ({"click": [0, 1]}, {"split": "tme"}, "split: kind: .* got 'tme'"),
        ({"click": []}, {}, "the table has no rows"),
        ({"click": [0, 1], "x": [1]}, {}, "not a table"),
        (17, {}, "expected a path or a table of pandas, polars or Arrow, got int"),
        ("nowhere.csv", {}, "nowhere.csv does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    frame: Any, options: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if options == "schema":
        options = {"schema": Schema(features=(Categorical(name="x"),), labels=(Label(name="click"),))}
    with pytest.raises(ValueError, match=message) as caught:
        Dataset.from_frame(frame, **options)
    assert "\n" not in str(caught.value)
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_polars_and_arrow_need_no_pandas() -> None:
    script = (
        "import sys\n"
        "class NoPandas:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] == 'pandas': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoPandas())\n"
        "import polars as pl; from fullrank.data.dataset import Dataset\n"
        "frame = pl.DataFrame({'click': [0, 1] * 30, 'x': list('ab') * 30})\n"
        "for table in (frame, frame.to_arrow()): print(Dataset.from_frame(table, split='none').rows('train'))\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["60", "60"]
