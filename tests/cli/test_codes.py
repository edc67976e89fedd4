"""From a file of items to codes, a trained table, a bundle that needs no file, and a server that knows new items."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from fullrank.cli.main import app
from fullrank.data.dataset import Dataset
from fullrank.embeddings.semantic_id import ItemCodes, load_quantizer
from fullrank.embeddings.semantic_id.content import Content, NgramVectors, as_lists
from fullrank.extras import MissingExtra
from fullrank.serving import create_app
from fullrank.training import load_model

TOPICS = ("western cowboys horses", "space robots lasers", "romance paris wedding", "haunted house ghosts")


def done(*words: object) -> dict[str, Any]:
    finished = CliRunner().invoke(app, [*(str(word) for word in words), "--json"])
    assert finished.exit_code == 0, finished.output
    printed: dict[str, Any] = json.loads(finished.stdout)
    return printed


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clicks on 40 of 48 items, whose titles say which of four topics they are of; one topic is liked."""
    place = tmp_path_factory.mktemp("codes")
    titles = [f"The {TOPICS[item % 4]} part {item}" for item in range(48)]
    pl.DataFrame({"movie": range(48), "title": titles, "note": [None] * 48}).write_csv(place / "items.csv")
    random = np.random.default_rng(0)
    item = random.integers(40, size=4000)
    click = random.random(4000) < np.where(item % 4 == 1, 0.8, 0.2)
    log = {"user": random.integers(9, size=4000), "movie": item, "click": click.astype(int), "time": np.arange(4000)}
    pl.DataFrame(log).write_csv(place / "log.csv")
    (place / "schema.json").write_text(
        json.dumps(
            {
                "features": [
                    {"kind": "categorical", "name": "user", "role": "user"},
                    {"kind": "categorical", "name": "movie", "role": "item"},
                    {"kind": "sequence", "name": "history", "of": ["movie"], "where": "click", "length": 5},
                ],
                "labels": [{"name": "click"}],
                "keys": {"user_id": "user", "item_id": "movie", "timestamp": "time"},
            }
        )
    )
    done("data", "import", "csv", place / "log.csv", place / "data", "--schema", place / "schema.json")
    common = (place / "items.csv", "--id", "movie", "--text", "title", "--levels", 2, "--codebook-size", 4)
    done("codes", "make", *common, "--data", place / "data", "--out", place / "codes")
    done("codes", "make", *common, "--seed", 5, "--out", place / "others")
    recipe = {
        "data": {"dataset": str(place / "data")},
        "model": {
            "name": "din",
            "hidden": [8],
            "embedding_dim": 4,
            "embedding_init": 0.05,
            "tables": {"movie": {"kind": "prefix", "codes": str(place / "codes")}},
        },
        "training": {"batch_size": 64, "epochs": 2, "learning_rate": 0.02},
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    done("train", place / "recipe.yaml", "--out", place / "run")
    return place


def test_codes_are_fitted_to_known_items_and_made_for_all(work: Path) -> None:
    codes = ItemCodes.read(work / "codes")
    assert codes.values.to_list() == [str(number) for number in range(48)]
    topics = [codes.codes_IL[topic::4, 0].unique().tolist() for topic in range(4)]
    assert sorted(map(len, topics)) == [1, 1, 1, 1] and len({code for (code,) in topics}) == 4
    again = done(
        "codes", "make", work / "items.csv", "--id", "movie", "--like", work / "codes", "--out", work / "again"
    )
    assert again["version"] == codes.header.version == load_quantizer(work / "codes").version
    assert torch.equal(ItemCodes.read(work / "again").codes_IL, codes.codes_IL)


def test_a_bundle_carries_the_codes_and_serves_without_their_file(work: Path, tmp_path: Path) -> None:
    bundle = work / "run" / "model"
    manifest = (bundle / "manifest.json").read_text()
    assert str(work) not in json.dumps(json.loads(manifest)["stages"])
    shutil.copytree(bundle, tmp_path / "model")
    shutil.move(work / "codes", work / "away")
    try:
        table = load_model(tmp_path / "model").embeddings.kinds["movie"]  # type: ignore[union-attr,index]
        rows = [{"user": 1, "movie": movie} for movie in (1, 5, 2, 45, 46)]
        with TestClient(create_app(tmp_path / "model")) as client:
            scores = [
                row["predictions"]["click"] for row in client.post("/v1/score", json={"rows": rows}).json()["items"]
            ]
    finally:
        shutil.move(work / "away", work / "codes")
    assert int((table.codes_RL[:2] < 0).sum()) == 4 and int(table.codes_RL[2:].min()) >= 0  # type: ignore[union-attr,operator,index]
    assert min(scores[:2]) > 0.5 > scores[2] and scores[3] == scores[4]  # what it does not know is all the same to it


def test_admitted_items_are_scored_as_their_kind_is(work: Path) -> None:
    bundle, admitted = work / "run" / "model", work / "admitted"
    report = done("codes", "admit", bundle, work / "codes", "--out", admitted, "--overwrite")
    assert report == {"bundle": str(admitted), "table": "movie", "new_items": 8}
    rows = [{"user": 1, "movie": movie} for movie in (1, 45, 46)]
    with TestClient(create_app(admitted)) as client:
        known, liked, other = [
            row["predictions"]["click"] for row in client.post("/v1/score", json={"rows": rows}).json()["items"]
        ]
    assert min(known, liked) > 0.5 > other
    again = done("codes", "admit", admitted, work / "codes", "--out", work / "twice", "--overwrite")
    assert again["new_items"] == 0


def test_the_day_after_gives_new_items_their_codes_and_trains_on(work: Path) -> None:
    day = pl.read_csv(work / "log.csv").with_columns(pl.col("movie") + 8, pl.col("time") + 10_000)
    day.write_csv(work / "log2.csv")
    bundle = work / "run" / "model"
    done("data", "import", "csv", work / "log2.csv", work / "day2", "--like", bundle, "--extend", "--split", "none")
    shutil.copytree(work / "codes", work / "copy")  # another file of the same version, and a recipe that names it
    changed = (f"data.dataset={work / 'day2'}", f"model.tables.movie.codes={work / 'copy'}")
    words = [word for change in changed for word in ("--set", change)]
    done("train", work / "recipe.yaml", *words, "--from", bundle, "--out", work / "run2")
    table = load_model(work / "run2" / "model").embeddings.kinds["movie"]  # type: ignore[union-attr,index]
    values = Dataset.open(work / "day2").encoders.vocabularies["movie"].values
    assert set(values[40:]) == {str(number) for number in range(40, 48)}
    assert torch.equal(table.codes_RL[2:].long(), ItemCodes.read(work / "codes").of_values(values))  # type: ignore[operator,index,union-attr]


def test_codes_of_another_quantiser_and_other_mistakes_are_one_line(work: Path) -> None:
    bundle, items, out = work / "run" / "model", work / "items.csv", work / "never"
    train = ("train", work / "recipe.yaml", "--out", work / "cut", "--overwrite")
    make = ("codes", "make", items, "--out", out)
    text = ("--id", "movie", "--text", "title")
    for words, message in (
        (("codes", "admit", bundle, work / "others", "--out", out), "has learnt codes of version"),
        (
            ("codes", "admit", bundle, work / "codes", "--table", "user", "--out", out),
            'table "user" is no prefix table',
        ),
        (
            (*train, "--from", bundle, "--set", f"model.tables.movie.codes={work / 'others'}"),
            "has learnt codes of version",
        ),
        ((*train, "--set", "model.tables.movie.codes=nowhere"), "model.tables.movie: nowhere does not exist"),
        ((*train, "--set", "model.tables.movie.levels=3"), "made for codes of sizes [32, 32, 32]"),
        ((*make, "--text", "title"), 'there is no column "item_id"; expected one of movie, title, note'),
        ((*make, "--id", "movie"), "expected either columns of numbers or columns of text"),
        (
            (*make, "--id", "movie", "--vector", "title"),
            'column "title" has "The western cowboys horses part 0" in row 1',
        ),
        ((*make, *text), "48 content vectors are too few for 256 codes a level: take a codebook_size of at most 48"),
        ((*make, "--id", "note", "--text", "title", "--codebook-size", 4), 'column "note" has no value in row 1'),
        ((*make, *text, "--like", work / "codes"), "--like takes columns and quantiser"),
        ((*make, "--id", "movie", "--like", work), "holds no codes: content.json is missing"),
    ):
        finished = CliRunner().invoke(app, [str(word) for word in words])
        assert message in str(finished.exception), (words, finished.exception, finished.output)
        assert isinstance(finished.exception, ValueError) and "\n" not in str(finished.exception)
        assert not out.exists() and not (work / "cut" / "model").exists()


def test_vectors_of_a_file_are_read_in_every_form(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    frame = pl.DataFrame({"item": range(20), "vector": numbers.tolist()})
    wide = frame.select("item", *(pl.col("vector").list.get(place).alias(f"v{place}") for place in range(3)))
    text = frame.with_columns(pl.format("[{}]", pl.col("vector").cast(pl.List(pl.String)).list.join(", ")))
    expected = torch.from_numpy(numbers)
    assert torch.equal(Content(("vector",))(frame), expected)
    assert torch.equal(Content(("v0", "v1", "v2"))(wide), expected)
    torch.testing.assert_close(Content(("vector",))(as_lists(text, "vector")), expected)
    fixed = frame.with_columns(pl.col("vector").list.to_array(3))
    assert torch.equal(Content(("vector",))(fixed), expected)
    gap = frame.with_columns(pl.when(pl.col("item") != 4).then("vector"))
    assert bool(Content(("vector",))(gap)[4].isnan().all())
    ragged = pl.DataFrame({"vector": [[1.0], [1.0, 2.0]]})
    with pytest.raises(ValueError, match='column "vector" has lists of 1 to 2 numbers'):
        Content(("vector",))(ragged)
    frame.write_parquet(tmp_path / "items.parquet")
    out = tmp_path / "codes"
    words = ("codes", "make", tmp_path / "items.parquet", "--id", "item", "--vector", "vector", "--codebook-size", 4)
    assert done(*words, "--out", out)["unique_ratio"] > 0.5
    vae = done(*words, "--out", tmp_path / "vae", "--method", "rq_vae", "--steps", 3)
    assert vae["version"] == load_quantizer(tmp_path / "vae").version != load_quantizer(out).version


def test_texts_are_near_when_they_share_rare_words_and_nothing_without_words() -> None:
    texts = pl.Series([f"The {topic} part {number}" for topic in TOPICS for number in range(10)])
    fitted = NgramVectors.fit(texts)
    near = fitted(texts) @ fitted(texts).T
    same = torch.arange(40)[:, None] // 10 == torch.arange(40)[None, :] // 10
    assert float(near[same].min()) > 0.5 > 0.3 > float(near[~same].max())
    (stem,) = fitted(pl.Series(["Western COWBOY, horse!"])) @ fitted(texts).T
    assert float(stem[:10].min()) > float(stem[10:].max())
    assert bool(fitted(pl.Series(["!?", "", None])).isnan().all())


def test_a_text_model_that_is_not_installed_is_one_line(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wordllama", None)
    words = ("codes", "make", work / "items.csv", "--id", "movie", "--text", "title", "--text-model", "wordllama")
    finished = CliRunner().invoke(app, [str(word) for word in (*words, "--out", tmp_path / "codes")])
    assert isinstance(finished.exception, MissingExtra) and not (tmp_path / "codes").exists()
    assert str(finished.exception).endswith("the text model wordllama needs wordllama: pip install 'fullrank[text]'")
