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


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = one_million(tmp_path / "ml")
    (path / "users.dat").write_text("1::F::25\n")
    with pytest.raises(ValueError, match="users.dat line 1: expected 5 fields"):
        open_format("movielens").default_schema(path)


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
