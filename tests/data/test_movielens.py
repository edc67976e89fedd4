from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from fullrank.data.formats import open_format
from fullrank.data.importing import import_dataset
from fullrank.data.splits import SplitSpec

RATINGS = [  # user, item, stars, time
    (1, 10, 5, 100),
    (1, 11, 3, 110),
    (1, 12, 1, 120),
    (1, 13, 4, 120),
    (1, 10, 2, 130),
    (2, 12, 4, 105),
    (2, 13, 2, 140),
]


def one_million(path: Path) -> Path:
    path.mkdir()
    (path / "ratings.dat").write_text("".join(f"{u}::{i}::{r}::{t}\n" for u, i, r, t in RATINGS))
    (path / "users.dat").write_text("1::F::25::3::12345\n2::M::1::10::00501\n")
    movies = "10::Caf\u00e9 (1999)::Drama|Comedy\n11::B (1980)::War\n12::C (1999)::War\n13::D::Drama\n"
    (path / "movies.dat").write_text(movies, encoding="latin-1")
    return path


def latest(path: Path) -> Path:
    path.mkdir()
    rows = "".join(f"{u},{i},{r}.0,{t}\n" for u, i, r, t in RATINGS)
    (path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + rows)
    movies = "10,Caf\u00e9 (1999),Drama|Comedy\n11,B (1980),War\n12,C (1999),War\n13,D,Drama\n"
    (path / "movies.csv").write_text("movieId,title,genres\n" + movies)
    return path


@pytest.mark.parametrize("layout", [one_million, latest])
def test_likes_and_dislikes_with_the_likes_before_them(tmp_path: Path, layout: object) -> None:
    path = layout(tmp_path / "ml")  # type: ignore[operator]
    source = open_format("movielens")
    frame = pl.concat([chunk.frame for chunk in source.chunks(path, source.default_schema(path))])
    assert frame["label"].to_list() == [1, 0, 1, 0, 1, 0]  # three stars left out
    assert frame["history.item"].to_list() == [[], [10], [10], [10, 13], [], [12]]
    assert frame["history.age"].to_list()[3] == [30, 10]
    assert frame["year"].to_list() == ["1999", "1999", None, "1999", "1999", None]
    assert frame["genres"].to_list()[0] == "Drama|Comedy"
    assert ("zip_code" in frame.columns) == (layout is one_million)
    if layout is one_million:
        assert frame["zip_code"].to_list()[-1] == "00501"


def test_an_import_by_time(tmp_path: Path) -> None:
    dataset = import_dataset("movielens", latest(tmp_path / "ml"), tmp_path / "out", split=SplitSpec(kind="none"))
    assert dataset.rows("train") == 6
    assert dataset.schema.tables()["item_id"] == 2 + 3  # 10, 12, 13, and the two reserved rows


def test_a_broken_line_is_set_aside_by_name(tmp_path: Path) -> None:
    path = one_million(tmp_path / "ml")
    (path / "users.dat").write_text("1::F::25\n2::M::1::10::00501\n")
    none = SplitSpec(kind="none")
    dataset = import_dataset("movielens", path, tmp_path / "out", split=none, max_bad=0.5)
    rejected = pl.read_csv(dataset.path / "rejected.tsv", separator="\t")
    assert rejected.rows() == [(1, "(users.dat)", "3 fields, expected 5", "1::F::25")]


FAULTS = {
    "good": ("", "", None),
    "rating": ("1,2,good,2000\n", "", (9, "rating", "not a number", "good")),
    "user": ("u1,2,5.0,2000\n", "", (9, "user_id", "not an integer", "u1")),
    "time": ("1,2,5.0,2001-01-01\n", "", (9, "timestamp", "not an integer", "2001-01-01")),
    "short": ("1,2,5.0\n", "", (9, "", "3 fields, expected 4", "1,2,5.0")),
    "empty": ("1,2,,2000\n", "", (9, "rating", "missing", "")),
    "movie twice": ("", "10,Again (2001),War\n", None),
    "movie without id": ("", "x,Again (2001),War\n", (6, "item_id (movies.csv)", "not an integer", "x")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_bad_line_is_counted_and_the_others_are_kept(tmp_path: Path, fault: str) -> None:
    ratings, movies, expected = FAULTS[fault]
    path = latest(tmp_path / "ml")
    with (path / "ratings.csv").open("a") as file:
        file.write(ratings)
    with (path / "movies.csv").open("a") as file:
        file.write(movies)
    dataset = import_dataset("movielens", path, tmp_path / "out", split=SplitSpec(kind="none"), max_bad=0.5)
    assert dataset.rows("train") == 6
    listed = dataset.path / "rejected.tsv"
    assert (pl.read_csv(listed, separator="\t").rows() if listed.exists() else []) == ([expected] if expected else [])


def test_what_is_no_release_is_one_line(tmp_path: Path) -> None:
    path = latest(tmp_path / "ml")
    (path / "movies.csv").write_text("movieId,title,genres\n10,Caf\u00e9 (1999),War\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"movies\.csv line 2: not UTF-8"):
        import_dataset("movielens", path, tmp_path / "out", split=SplitSpec(kind="none"))
    (path / "ratings.csv").write_text("userId,movie,rating\n1,2,3\n")
    with pytest.raises(ValueError, match='ratings.csv: column "item_id" is missing'):
        import_dataset("movielens", path, tmp_path / "out", split=SplitSpec(kind="none"))


def test_the_published_fold_gives_the_comparison_table(tmp_path: Path, shared_data: Path) -> None:
    dataset = import_dataset(
        "movielens", shared_data / "movielens-1m", tmp_path / "out", split=SplitSpec(kind="given", column="split")
    )
    assert {split: dataset.rows(split) for split in dataset.splits} == {
        "train": 591_397,
        "valid": 73_087,
        "test": 74_528,
    }
    tables = {"user_id": 6042, "item_id": 3638, "age": 9, "occupation": 23, "zip_code": 3441, "genres": 20}
    assert {name: dataset.schema.tables()[name] for name in tables} == tables
    rate = dataset.scan("test").select(pl.col("label").mean()).collect().item()
    assert rate == pytest.approx(0.7828, abs=1e-4)
