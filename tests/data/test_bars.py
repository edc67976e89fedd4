"""Files of the public leaderboard's benchmarks: recognised by columns and md5, whatever their line ends."""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from fullrank.cli.main import main
from fullrank.data.dataset import Dataset
from fullrank.data.formats import open_format, published
from fullrank.data.formats.published import PUBLISHED, fingerprints
from fullrank.data.importing import import_dataset
from fullrank.data.splits import SplitSpec
from fullrank.schema import Categorical, Numeric

FRAPPE = next(each for each in PUBLISHED if each.name == "Frappe_x1")


def rows(seed: int, count: int = 30) -> list[str]:
    return [f"{n % 2}," + ",".join(str(10 * field + (seed + n) % 4) for field in range(10)) for n in range(count)]


def as_csv(lines: list[str], line_end: str) -> bytes:
    return "".join(line + line_end for line in (",".join(FRAPPE.columns), *lines)).encode()


def as_libfm(lines: list[str]) -> bytes:
    cut = [line.split(",") for line in lines]
    return "".join(" ".join([label, *(f"{value}:1" for value in values)]) + "\n" for label, *values in cut).encode()


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the files of `rows` were the published ones, which have the line ends of DOS."""
    md5 = {
        part: hashlib.md5(as_csv(rows(seed), "\r\n")).hexdigest()
        for seed, part in enumerate(("train", "valid", "test"))
    }
    monkeypatch.setattr(published, "PUBLISHED", (replace(FRAPPE, md5=md5),))


def write(path: Path, files: dict[str, bytes]) -> list[Path]:
    path.mkdir(exist_ok=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return [path / name for name in files]


def parts(files: list[Path]) -> dict[str, str | None]:
    return {name: found.part for name, found in fingerprints(files).items()}


@pytest.mark.usefixtures("known")
def test_the_same_rows_are_recognised_in_every_layout(tmp_path: Path) -> None:
    files = {
        "dos.csv": as_csv(rows(0), "\r\n"),
        "unix.csv": as_csv(rows(0), "\n"),
        "packed.csv.gz": gzip.compress(as_csv(rows(0), "\n")),
        "frappe.libfm": as_libfm(rows(0)),
        "no_last_line_end.libfm": as_libfm(rows(0))[:-1],
    }
    assert parts(write(tmp_path, files)) == dict.fromkeys(files, "train")


@pytest.mark.usefixtures("known")
def test_another_row_is_another_file(tmp_path: Path) -> None:
    changed = rows(1)
    changed[7] = "1" + changed[7][1:] if changed[7][0] == "0" else "0" + changed[7][1:]
    files = write(
        tmp_path, {"a.csv": as_csv(changed, "\r\n"), "b.libfm": as_libfm(changed), "c.csv": as_csv(rows(1), "\n")}
    )
    assert parts(files) == {"a.csv": None, "b.libfm": None, "c.csv": "valid"}
    digest = hashlib.md5(as_csv(changed, "\r\n")).hexdigest()
    assert {found.md5 for found in fingerprints(files[:2]).values()} == {digest}


@pytest.mark.usefixtures("known")
def test_blocks_do_not_change_the_md5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(tmp_path, {"a.csv": as_csv(rows(0), "\r\n"), "b.libfm": as_libfm(rows(0))})
    monkeypatch.setattr(published.read_blocks, "__defaults__", (37,))
    assert parts(files) == {"a.csv": "train", "b.libfm": "train"}


def test_files_of_another_layout_are_not_read_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "read_blocks", lambda path: pytest.fail(f"{path} was read"))
    header = ",".join(FRAPPE.columns)
    files = {
        "more.csv": f"{header},weight\n1\n".encode(),
        "fewer.csv": b"label,user,item\n1,2,3\n",
        "five.libfm": b"1 1:1 2:1 3:1 4:1 5:1\n",
        "weighted.libfm": b"1 1:1 2:0.5 3:1\n",
        "latin.csv": b"\xff\n",
        "empty.csv": b"",
        "log.parquet": b"PAR1",
    }
    assert fingerprints([*write(tmp_path, files), tmp_path, tmp_path / "none.csv"]) == {}


def test_each_benchmark_is_found_by_its_own_columns(tmp_path: Path) -> None:
    files = write(tmp_path, {f"{each.name}.csv": ",".join(each.columns).encode() + b"\n" for each in PUBLISHED})
    found = fingerprints(files)
    assert {name.removesuffix(".csv"): each.benchmark for name, each in found.items()} == {
        p.name: p.name for p in PUBLISHED
    }
    assert all(each.part is None for each in found.values())
    digests = [md5 for each in PUBLISHED for md5 in each.md5.values()]
    assert len(digests) == len(set(digests)) == 6 * 3 + 3 * 2


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("format_", ["libfm", "csv"])
def test_an_import_says_what_its_files_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, format_: str
) -> None:
    files = {"train.csv": as_csv(rows(0), "\n"), "valid.csv": as_csv(rows(2), "\n"), "test.csv": as_csv(rows(3), "\n")}
    write(tmp_path / "log", files)
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["fullrank", "data", "import", format_, str(tmp_path / "log"), str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    printed = " ".join(capsys.readouterr().out.split())
    assert "train.csv is the published train part of Frappe_x1" in printed
    assert "valid.csv is the published test part of Frappe_x1" in printed  # it was put under the wrong name
    assert "test.csv has the layout of Frappe_x1 but is none of its published files (md5 " in printed
    stored = json.loads((out / "dataset.json").read_text())["published"]
    assert stored == Dataset.open(out).published
    assert [each["part"] for each in stored.values()] == ["train", "test", None]
    assert Dataset.open(out).rows("test") == 30  # imported all the same


def test_criteo_x1_has_scaled_counts_and_all_categories(tmp_path: Path) -> None:
    columns = next(each.columns for each in PUBLISHED if each.name == "Criteo_x1")
    lines = [",".join(["1", *[f"{n / 64}"] * 13, *[str(n)] * 26]) for n in range(20)]
    write(
        tmp_path / "log",
        {f"{part}.csv": "\n".join([",".join(columns), *lines, ""]).encode() for part in ("train", "test")},
    )
    dataset = import_dataset("criteo", tmp_path / "log", tmp_path / "out")
    assert [type(feature) for feature in dataset.schema.features] == [Numeric] * 13 + [Categorical] * 26
    train = dataset.scan("train").collect()
    assert train["I7"].to_list() == [n / 64 for n in range(20)]
    assert dataset.schema.tables()["C1"] == 2 + 20  # each is seen once, and kept
    assert dataset.published["train.csv"]["benchmark"] == "Criteo_x1"
    write(
        tmp_path / "x4",
        {"train.csv": "\n".join(["L" + ",".join(columns)[1:], *(line.replace(".", "") for line in lines)]).encode()},
    )
    x4 = open_format("criteo").default_schema(tmp_path / "x4")
    assert {feature.encoding for feature in x4.categorical} == {"log2_bucket", "vocabulary"}


def test_avazu_x1_is_read_field_by_field(tmp_path: Path) -> None:
    columns = next(each.columns for each in PUBLISHED if each.name == "Avazu_x1")
    write(
        tmp_path / "log",
        {
            f"{part}.csv": f"{','.join(columns)}\n0{',7' * 22}\n1{',8' * 22}\n".encode()
            for part in ("train", "valid", "test")
        },
    )
    dataset = import_dataset("avazu", tmp_path / "log", tmp_path / "out")
    assert dataset.schema.labels[0].name == "label"
    assert dataset.scan("valid").select(columns).collect().rows() == [(0.0, *[2] * 22), (1.0, *[3] * 22)]
    (tmp_path / "log" / "train.csv").write_text("label,feat_1\n1,2\n")
    with pytest.raises(ValueError, match='column "feat_2" of Avazu'):
        import_dataset("avazu", tmp_path / "log", tmp_path / "no")


def test_avazu_x4_knows_the_weekend(tmp_path: Path) -> None:
    columns = next(each.columns for each in PUBLISHED if each.name == "Avazu_x4")
    days = {"14102400": "0", "14102523": "1", "14102612": "1", "14102700": "0"}  # Friday to Monday
    lines = [",".join([str(n), "1", day, *["3"] * 21]) for n, day in enumerate(list(days) * 2)]
    write(tmp_path / "log", {"train.csv": "\n".join([",".join(columns), *lines]).encode()})
    dataset = import_dataset("avazu", tmp_path / "log", tmp_path / "out")
    names = [None, None, *dataset.encoders.vocabularies["is_weekend"].values.to_list()]
    found = dataset.scan("train").collect()["is_weekend"]
    assert [names[id_] for id_ in found.to_list()] == list(days.values()) * 2


def test_shares_of_validation_rows_are_for_formats_that_say_how(tmp_path: Path) -> None:
    lines = pl.DataFrame({"label": [0, 1] * 50, "user": range(100)})
    write(tmp_path / "log", {f"{part}.csv": lines.write_csv().encode() for part in ("train", "test")})
    dataset = import_dataset("csv", tmp_path / "log", tmp_path / "out")
    assert dataset.splits == ("train", "test") and dataset.validation == "none"
    bars = import_dataset("csv", tmp_path / "log", tmp_path / "bars", split=SplitSpec(protocol="bars"))
    assert bars.rows("valid") == 100
