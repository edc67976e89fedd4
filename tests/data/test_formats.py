"""Public formats: Criteo, Avazu, libFM; on their own samples where these are at hand."""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from fullrank.cli import data
from fullrank.data.dataset import Dataset
from fullrank.data.formats import FORMATS, open_format
from fullrank.data.formats.criteo import COLUMNS
from fullrank.data.importing import import_dataset
from fullrank.data.splits import SplitSpec
from fullrank.registry import import_modules
from fullrank.schema import Categorical, Label, MultiCategorical, Schema


def bring(format_: str, path: Path, out: Path, kind: str | None = "none", max_bad: float = 0.0) -> Dataset:
    spec = SplitSpec(kind=kind)  # type: ignore[arg-type]
    return import_dataset(format_, path, out, split=spec, max_bad=max_bad)


def test_an_unknown_format_is_refused_with_the_list_of_formats() -> None:
    with pytest.raises(ValueError, match='format "excel" is unknown; choose one of .*avazu, criteo'):
        open_format("excel")
    assert {"criteo", "avazu", "csv", "parquet", "libfm"} <= set(FORMATS)


def test_every_format_opens_under_its_name() -> None:
    for name in FORMATS:
        assert open_format(name).name == name


TWENTY_LINES = """
from collections.abc import Collection, Iterator
from pathlib import Path

import polars as pl

from fullrank.data.formats import register
from fullrank.data.raw import RawChunk
from fullrank.schema import Categorical, Label, Schema


@register
class Lines:
    name = "lines"

    def default_schema(self, path: Path) -> Schema:
        return Schema(features=(Categorical(name="user"), Categorical(name="item")), labels=(Label(name="click"),))

    def chunks(self, path: Path, schema: Schema, extra: Collection[str] = ()) -> Iterator[RawChunk]:
        rows = [line.split() for line in path.read_text().splitlines()]
        yield RawChunk(pl.DataFrame(rows, ["click", "user", "item", "part"], orient="row"))

    def parts(self, path: Path) -> dict[str, Path] | None:
        return None
"""


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A log in a format of one's own, beside a module that defines it; nothing is registered yet."""
    (tmp_path / "my_formats.py").write_text(TWENTY_LINES)
    (tmp_path / "log").write_text("1 u a train\n0 v a test\nmaybe u b train\n0 u b train\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(FORMATS, "_things", {})
    monkeypatch.setattr(FORMATS, "_installed", None)
    yield tmp_path / "log"
    sys.modules.pop("my_formats", None)


def test_a_format_of_ones_own_in_twenty_lines_imports_a_log(lines: Path, tmp_path: Path) -> None:
    import_modules(["my_formats"], "--import")
    spec = SplitSpec(kind="given", column="part")
    dataset = import_dataset("lines", lines, tmp_path / "out", split=spec, max_bad=0.3)
    assert dataset.scan("train").collect().rows() == [(2, 2, 1.0), (2, 3, 0.0)]  # ids in order of text, then the label
    assert dataset.scan("test").collect().rows() == [(1, 2, 0.0)]
    assert dataset.rejected == {"label is not a number": 1}
    with pytest.raises(ValueError, match='the format "lines" exists already'):
        FORMATS.register("lines", open_format)  # type: ignore[arg-type]


def test_a_format_of_an_installed_package_is_known_to_the_command(lines: Path, tmp_path: Path) -> None:
    about = tmp_path / "my_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[fullrank.formats]\nlines = my_formats:Lines\n")
    arguments = ["import", "lines", str(lines), str(tmp_path / "out"), "--split", "none", "--max-bad", "0.3", "--json"]
    result = CliRunner().invoke(data.app, arguments, catch_exceptions=False)
    assert json.loads(result.stdout)["rows"] == {"train": 3}


def test_a_format_of_a_module_that_the_command_is_told_to_import(lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["inspect", str(lines), "--format", "lines"]
    with pytest.raises(ValueError, match='format "lines" is unknown'):
        CliRunner().invoke(data.app, arguments, catch_exceptions=False)
    result = CliRunner().invoke(data.app, [*arguments, "--import", "my_formats"], catch_exceptions=False)
    assert Schema.from_json(result.stdout) == open_format("lines").default_schema(lines)


def test_criteo_sample(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "criteo-sample" / "criteo.txt.gz"
    dataset = bring("criteo", path, tmp_path / "out")
    train = dataset.scan("train").collect()
    with gzip.open(path, "rt") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    assert dataset.rows("train") == len(rows) == 8000
    assert train["label"].to_list() == [float(row[0]) for row in rows]
    assert train["label"].mean() == pytest.approx(0.216, abs=5e-4)
    for place, name in enumerate(COLUMNS[1:], start=1):
        missing = [row[place] == "" for row in rows]
        assert [id_ == 0 for id_ in train[name].to_list()] == missing, name
    # Values seen fewer than ten times share the out-of-vocabulary id.
    for place, name in enumerate(COLUMNS[14:], start=14):
        counts = Counter(row[place] for row in rows if row[place])
        rare = [bool(row[place]) and counts[row[place]] < 10 for row in rows]
        assert [id_ == 1 for id_ in train[name].to_list()] == rare, name
        frequent = sum(count >= 10 for count in counts.values())
        assert dataset.schema.tables()[name] == 2 + frequent


def test_criteo_as_csv_with_a_header_gives_the_same(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "criteo-sample" / "criteo.txt.gz"
    text = gzip.decompress(path.read_bytes()).decode()
    copy = tmp_path / "train.csv"
    copy.write_text(",".join(COLUMNS) + "\n" + text.replace("\t", ","))
    expected = bring("criteo", path, tmp_path / "a").scan("train").collect()
    assert bring("criteo", copy, tmp_path / "b").scan("train").collect().equals(expected)


def test_avazu_sample(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "avazu-sample" / "avazu.csv.gz"
    dataset = bring("avazu", path, tmp_path / "out", kind=None)
    source = pl.read_csv(path, infer_schema=False)
    assert sum(dataset.rows(split) for split in dataset.splits) == source.height == 23_299
    rows = pl.concat([dataset.scan(split).collect() for split in dataset.splits])
    assert rows["click"].mean() == pytest.approx(0.1709, abs=5e-5)
    # Hours ascend in the file, and a split by time keeps them so: parts follow each other.
    assert rows["__timestamp"].is_sorted()
    stamps = pl.from_epoch(rows["__timestamp"])
    assert stamps.dt.strftime("%y%m%d%H").to_list() == source["hour"].to_list()
    assert rows["__request_id"].cast(pl.String).to_list() == source["id"].to_list()
    hours = [None, None, *dataset.encoders.vocabularies["hour_of_day"].values.to_list()]
    train = dataset.scan("train").collect()
    assert [hours[id_] for id_ in train["hour_of_day"].to_list()] == stamps.head(train.height).dt.hour().cast(
        pl.String
    ).to_list()
    assert dataset.schema.tables()["weekday"] == 4


def test_avazu_hours_that_are_no_hours(shared_data: Path, tmp_path: Path) -> None:
    with gzip.open(shared_data / "avazu-sample" / "avazu.csv.gz", "rt") as file:
        lines = [next(file) for _ in range(200)]
    lines[7] = re.sub(",141021..,", ",14102125,", lines[7])
    lines[9] = re.sub(",141021..,", ",1410210,", lines[9])
    path = tmp_path / "log.csv"
    path.write_text("".join(lines))
    dataset = bring("avazu", path, tmp_path / "out", kind="time", max_bad=0.02)
    table = pl.read_csv(dataset.path / "rejected.tsv", separator="\t", infer_schema=False)
    assert table.rows() == [
        ("8", "timestamp", "not a timestamp", "hour 14102125"),
        ("10", "timestamp", "not a timestamp", "hour 1410210"),
    ]


@pytest.mark.parametrize(("format_", "other"), [("criteo", "avazu"), ("avazu", "criteo"), ("libfm", "criteo")])
def test_a_file_of_another_format_is_refused(shared_data: Path, tmp_path: Path, format_: str, other: str) -> None:
    path = shared_data / f"{other}-sample" / {"criteo": "criteo.txt.gz", "avazu": "avazu.csv.gz"}[other]
    with pytest.raises(ValueError, match=f"{path.name}.*") as caught:
        bring(format_, path, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_libfm_with_one_entry_per_field(tmp_path: Path) -> None:
    source = tmp_path / "frappe"
    source.mkdir()
    (source / "frappe.train.libfm").write_text("1 3:1 10:1 20:1\n-1 4:1 10:1 21:1\n1 3:1 11:1 20:1\n")
    (source / "frappe.validation.libfm").write_text("-1 3:1 12:1 20:1\n")
    (source / "frappe.test.libfm").write_text("1 4:1 10:1 20:1\n")
    dataset = bring("libfm", source, tmp_path / "out", kind=None)
    assert dataset.schema.features == tuple(Categorical(name=f"field_{n}", num_embeddings=4) for n in (1, 2, 3))
    assert dataset.scan("train").collect().rows() == [(2, 2, 2, 1.0), (3, 2, 3, 0.0), (2, 3, 2, 1.0)]
    assert dataset.scan("valid").collect().rows() == [(2, 1, 2, 0.0)]
    assert dataset.scan("test").collect().rows() == [(3, 2, 2, 1.0)]


def test_libfm_rows_that_are_not_ids_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "log.libfm"
    path.write_text("1 3:1 10:1\n" * 300 + "1 3:0.5 10:1\n1 3:1\n1 3:1 x\n0 3:1 10:1.0\n")
    dataset = bring("libfm", path, tmp_path / "out", max_bad=1.0)
    table = pl.read_csv(dataset.path / "rejected.tsv", separator="\t", infer_schema=False)
    assert sorted(table.rows()) == [
        ("301", "field_1", "not an entry index:1", "3:0.5"),
        ("302", "", "2 fields, expected 3", "1 3:1"),
        ("303", "field_2", "not an entry index:1", "x"),
    ]
    assert dataset.scan("train").collect()["field_2"].to_list() == [2] * 301


def test_libsvm_rows_of_varying_length_are_bags(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "a9a" / "a9a.svm.gz"
    dataset = bring("libfm", path, tmp_path / "out")
    train = dataset.scan("train").collect()
    with gzip.open(path, "rt") as file:
        rows = [line.split() for line in file]
    texts = [None, None, *dataset.encoders.vocabularies["features"].values.to_list()]
    assert [[texts[id_] for id_ in ids] for ids in train["features"].head(500).to_list()] == [
        [entry.removesuffix(":1") for entry in row[1:]] for row in rows[:500]
    ]
    assert train["label"].to_list() == [float(row[0] == "+1") for row in rows]
    assert isinstance(dataset.schema.features[0], MultiCategorical)


def test_libfm_in_its_csv_layout(tmp_path: Path) -> None:
    path = tmp_path / "movielens.csv"
    path.write_text("label,user_id,item_id,tag_id\n1,5,6,7\n-1,5,8,9\n")
    dataset = bring("libfm", path, tmp_path / "out")
    assert dataset.schema.keys.user_id == "user_id"
    assert dataset.scan("train").collect()["label"].to_list() == [1.0, 0.0]


def test_a_schema_may_name_fewer_columns(shared_data: Path, tmp_path: Path) -> None:
    schema = Schema(features=(Categorical(name="C14", role="item"),), labels=(Label(name="click"),))
    path = shared_data / "avazu-sample" / "avazu.csv.gz"
    dataset = import_dataset("avazu", path, tmp_path / "out", schema=schema, split=SplitSpec(kind="none"))
    assert dataset.scan("train").collect_schema().names() == ["C14", "click"]
    wrong = Schema(features=(Categorical(name="C99"),), labels=(Label(name="click"),))
    with pytest.raises(ValueError, match='column "C99" of Avazu\'s format is missing'):
        import_dataset("avazu", path, tmp_path / "no", schema=wrong)
