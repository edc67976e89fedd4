"""Text files as people have them: separators, quotes, line ends, encodings, containers; read, or refused."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from fullrank.data.dataset import Dataset
from fullrank.data.formats import lines
from fullrank.data.formats.csv_log import Csv
from fullrank.data.formats.delimited import delimited_chunks
from fullrank.data.formats.layout import text_layout
from fullrank.data.formats.options import ReadOptions
from fullrank.data.importing import import_dataset
from fullrank.data.splits import SplitSpec

TEXT = "user_id,city,click\nu1,São Paulo,0\nu2,Málaga,1\nu3,Oslo,0\n"


def texts(path: Path, content: str | bytes, **options: Any) -> list[tuple[str, ...]]:
    """Rows of a file, as text."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return Csv(ReadOptions.of(**options)).sample(path).rows()


def bring(path: Path, out: Path, **options: Any) -> Dataset:
    return import_dataset("csv", path, out, split=SplitSpec(kind="none"), **options)


@pytest.mark.parametrize(
    "content",
    [
        "user_id,click\nu1,0\nu2,1\n",
        "user_id,click\ru1,0\ru2,1\r",
        "user_id,click\ru1,0\nu2,1\n",
        "user_id,click\r\nu1,0\r\nu2,1",
        "user_id\tclick\nu1\t0\nu2\t1\n",
        "user_id click\nu1 0\nu2 1\n",
        "user_id::click\nu1::0\nu2::1\n",
        "user_id\x01click\nu1\x010\nu2\x011\n",
        "user_id, click\nu1, 0\nu2, 1\n",
        'user_id, click\n"u1", 0\nu2, 1\n',
        "sep=;\nuser_id;click\nu1;0\nu2;1\n",
        "# made by hand\nuser_id,click\nu1,0\n# half way\nu2,1\n",
        "# user_id click\nu1 0\nu2 1\n",
        "user_id,click,\nu1,0,\nu2,1,\n",
        "user_id,click\nu1,0,\nu2,1,\n",
        "user_id  click\nu1       0\n  u2     1\n",
        "\ufeffuser_id|click\nu1|0\nu2|1\n",
    ],
)
def test_one_table_in_many_spellings(tmp_path: Path, content: str) -> None:
    rows = texts(tmp_path / "log.csv", content)
    assert [row[:2] for row in rows] == [("u1", "0"), ("u2", "1")]
    assert text_layout(tmp_path / "log.csv").named == ("user_id", "click")


def test_tabs_in_every_line_win_over_commas_in_names(tmp_path: Path) -> None:
    assert texts(tmp_path / "a", "user (a,b,c)\tcity (x,y)\nu1\ta\n") == [("u1", "a")]


def test_a_column_without_a_name_is_left_out_and_said(tmp_path: Path) -> None:
    assert texts(tmp_path / "a", ",user_id,click\n0,u1,1\n1,u2,0\n")[0] == ("u1", "1")
    assert "column 1 has no name and is left out" in Csv().notes(tmp_path / "a")


def test_rows_that_r_named(tmp_path: Path) -> None:
    content = '"user" "item" "click"\n"1" "u1" "i 1" 0\n"2" "u2" "i2" 1\n"3" "u1" "i2" 1\n'
    assert texts(tmp_path / "log.txt", content)[0] == ("u1", "i 1", "0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("196\t242\t3\t881250949\n186\t302\t3\t891717742\n", "is the header line missing?.*--no-header --columns"),
        ("u1,i1,3\nu2,i1,4\nu1,i2,5\n", "is the header line missing?"),
        ("user:item:click\nu1:i1:0\n", "no separator found .*: pass --separator"),
        ('{"user_id": "u1", "click": 0}\n', "holds JSON lines: use the format jsonl"),
        ('user_id,"' + "x" * 140_000 + '",click\nu1,a,0\n', "longer than 131,072 characters: a quote"),
        ("item_id:token\trating:float\n1\t2\n", "use the format recbole"),
    ],
)
def test_what_cannot_be_guessed_is_called_what_it_is(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        texts(tmp_path / "log.csv", content)
    assert "\n" not in str(caught.value)


def test_options_say_what_a_guess_cannot(tmp_path: Path) -> None:
    named = ("user_id", "city", "click")
    path = tmp_path / "log"
    assert texts(path, "u1~a~1\nu1~b~0\n", separator="~", header=False, columns=named)[1] == ("u1", "b", "0")
    assert texts(path, "x,y,z\nu1,a,1\n", columns=named) == [("u1", "a", "1")]
    assert Csv(ReadOptions.of(columns=named)).sample(path).columns == list(named)
    assert texts(path, "user_id,city\n'u,1',a\n", quote="'") == [("u,1", "a")]
    assert texts(path, 'user_id,city\n"u1,a"\n', quote="none") == [('"u1', 'a"')]
    assert texts(path, TEXT.encode("latin-1"), encoding="latin-1")[0][1] == "São Paulo"
    for wrong in ({"separator": ""}, {"encoding": "latin-99"}, {"quote": "''"}, {"columns": ("a", "a")}):
        with pytest.raises(ValueError, match=f"^--{next(iter(wrong))}: ") as caught:
            ReadOptions.of(**wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match='the format "parquet" takes no --separator'):
        import_dataset("parquet", path, tmp_path / "out", options=ReadOptions(separator=";"))


def zipped(*names: str) -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for name in names:
            archive.writestr(name, TEXT)
    return whole.getvalue()


def test_containers_and_encodings_give_the_same_rows(tmp_path: Path) -> None:
    expected = texts(tmp_path / "log.csv", TEXT)
    for name, content in {
        "gz.csv.GZ": gzip.compress(TEXT.encode()),
        "bz.csv.bz2": bz2.compress(TEXT.encode()),
        "xz.csv.xz": lzma.compress(TEXT.encode()),
        "zst.csv.zst": pa.compress(TEXT.encode(), "zstd", asbytes=True),
        "zip.csv.zip": zipped("log.csv"),
        "named.like.text.csv": gzip.compress(TEXT.encode()),
        "wide.csv": TEXT.encode("utf-16"),
        "wider.csv": TEXT.encode("utf-32"),
    }.items():
        assert texts(tmp_path / name, content) == expected, name
        cut = content[: len(content) * 2 // 3] if "wide" not in name else content[:-1]
        with pytest.raises(ValueError, match=f"{name}.*(damaged|cut short|not utf)"):
            texts(tmp_path / name, cut)
    with pytest.raises(ValueError, match="is a zip file of 2 files, expected one: unpack it"):
        texts(tmp_path / "two.zip", zipped("a", "b"))
    with pytest.raises(ValueError, match="UTF-16 without a byte order mark: pass --encoding"):
        texts(tmp_path / "bare.csv", TEXT.encode("utf-16-le"))
    (tmp_path / "latin.csv").write_bytes(TEXT.encode("latin-1"))
    with pytest.raises(ValueError, match="2 of 3 rows are bad .*not UTF-8.*pass --encoding, such as latin-1"):
        bring(tmp_path / "latin.csv", tmp_path / "out")


def test_ragged_lines_that_are_no_text_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # The parser has to show a ragged line to whoever asks for it, and cannot if it is no text.
    assert texts(tmp_path / "log.csv", b"a,b\n1,2\n\xb1,2,3\n4,5\n") == [("1", "2"), ("4", "5")]
    assert capfd.readouterr().err == ""


def test_a_line_end_of_two_characters_may_fall_between_two_reads(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for end in (b"\r\n", b"\r"):
        path.write_bytes(b"abc" + end + b"defg" + end + b"h" * 4094 + end + b"x" + end)
        for size in (4096, 4097, 4098, 4099, 5000):
            data = b"".join(lines.read_blocks(path, size))
            assert data.replace(b"\r\n", b"\n") == b"abc\ndefg\n" + b"h" * 4094 + b"\nx\n"


@pytest.mark.parametrize("separator", ["\t", ",", "|"])
def test_stray_quotes_never_merge_lines_silently(tmp_path: Path, separator: str) -> None:
    rows = ['u1,"Best of,0', "u2,b,1", "u3,c,0", 'u4,the rest",1', 'u5,5" pipe,0', 'u6,"last,1']
    path = tmp_path / "log"
    path.write_text("\n".join(["user,title,click", *rows, ""]).replace(",", separator))
    layout = text_layout(path)
    (chunk,) = delimited_chunks(path, layout, ["user", "click"])
    kept = dict(chunk.frame.select("user", "click").iter_rows())
    assert {user: click for user, click in kept.items()} == {
        row.split(",")[0]: row[-1] for row in rows if row.split(",")[0] in kept
    }
    assert chunk.frame.height + chunk.rejected.height == 6
    # Where texts are usually quoted, the two lines are set aside; elsewhere the quote is a character.
    assert chunk.rejected["line"].to_list() == ([2, 7] if separator == "," else [])


def test_every_line_of_a_record_of_wrong_width_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text('a,b,c\n1,"two\nlines",3,4\n5,6,7\n')
    (chunk,) = delimited_chunks(path, text_layout(path), ["a"])
    assert chunk.rejected["line"].to_list() == [2, 3]
    assert chunk.frame["a"].to_list() == ["5"]


def test_ragged_rows_are_counted_by_inspect(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("a,b\n1,2\n3\n4,5\n")
    assert Csv().notes(path) == [
        "separator comma, 2 columns",
        "1 of 3 rows would be rejected: line 3: 1 fields, expected 2: 3",
    ]


def test_a_directory_of_parts_and_its_partitions(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for day, user in (("1", "u1"), ("2", "u2")):
        (log / f"day={day}").mkdir(parents=True)
        (log / f"day={day}" / "part-0.csv").write_text(f"user_id,click\n{user},1\n{user},0\nshort\n")
    (log / "_SUCCESS").touch()
    dataset = bring(log, tmp_path / "out", max_bad=0.5)
    rows = dataset.scan("train").collect()
    days = dataset.encoders.vocabularies["day"].values.to_list()
    assert [days[place - 2] for place in rows["day"]] == ["1", "1", "2", "2"]
    rejected = pl.read_csv(dataset.path / "rejected.tsv", separator="\t")
    assert rejected["column"].to_list() == ["(day=1/part-0.csv)", "(day=2/part-0.csv)"]
    # A file cut in pieces has its header in the first alone.
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "a.csv").write_text("user_id,age,click\nu1,30,1\nu2,31,0\n")
    (cut / "b.csv").write_text("u1,30,0\nu1,30,1\n")
    assert bring(cut, tmp_path / "cut-out").rows("train") == 4
