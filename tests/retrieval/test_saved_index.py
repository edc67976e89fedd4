"""An index in a directory, from Python and from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from typer.testing import CliRunner

from fullrank.cli.main import app
from fullrank.retrieval.saved_index import SavedIndex, read_vectors
from fullrank.retrieval.vectors import VectorIndexSpec

WIDTH, ITEMS = 6, 300
RANDOM = np.random.default_rng(0)
VECTORS = RANDOM.normal(size=(ITEMS, WIDTH)).astype(np.float32)
QUERIES = RANDOM.normal(size=(9, WIDTH)).astype(np.float32)


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def parquet(path: Path, ids: list[str] | list[int], vectors: np.ndarray) -> Path:
    pl.DataFrame({"item_id": ids, "vector": vectors.tolist()}).write_parquet(path)
    return path


def expected(ids: list[str], vectors: np.ndarray, k: int) -> list[list[str]]:
    scores = QUERIES @ vectors.T
    return [[ids[i] for i in np.argsort(-row)[:k]] for row in scores]


@pytest.mark.parametrize("kind", ["exact", "auto", "{name: ivf, exact_below: 100, cells: 8, probes: 8}"])
def test_the_commands_are_a_dictionary_of_vectors(tmp_path: Path, kind: str) -> None:
    ids = [f"item {n}" for n in range(ITEMS)]
    index, queries = tmp_path / "index", tmp_path / "queries.npy"
    np.save(queries, QUERIES)
    told = json.loads(run("index", "build", parquet(tmp_path / "a.parquet", ids[:200], VECTORS[:200]), index,
                          "--index", kind, "--json"))  # fmt: skip
    assert told["items"] == 200 and told["kind"] in ("exact", "auto", "ivf")
    run("index", "add", index, parquet(tmp_path / "b.parquet", ids[200:], VECTORS[200:]))
    changed = -VECTORS
    both = parquet(tmp_path / "c.parquet", [*ids[150:250], "new"], np.concatenate([changed[150:250], changed[:1]]))
    told = json.loads(run("index", "add", index, both, "--update", "--json"))
    assert (told["added"], told["updated"], told["items"]) == (1, 100, ITEMS + 1)
    run("index", "remove", index, "item 7", "item 160", "new")
    kept = [n for n in range(ITEMS) if n not in (7, 160)]
    now = VECTORS.copy()
    now[150:250] = changed[150:250]
    run("index", "search", index, queries, "-k", 5, "--out", tmp_path / "found.parquet")
    found = pl.read_parquet(tmp_path / "found.parquet")
    lists = found.group_by("query", maintain_order=True).agg("item_id")["item_id"].to_list()
    assert lists == expected([ids[n] for n in kept], now[kept], 5)
    assert found["rank"].to_list() == [1, 2, 3, 4, 5] * 9
    line = run("index", "search", index, queries, "-k", 1).splitlines()
    assert line[0] == "query,rank,item_id,score" and line[1].startswith(f"0,1,{lists[0][0]},")
    audit = json.loads(run("index", "audit", index, "--queries", queries, "-k", 10, "--json"))
    assert audit["recall"] == 1.0 and audit["items"] == len(kept) and audit["queries"] == 9
    assert "of the 10 best items found" in run("index", "audit", index, "-k", 10)


def test_numbers_stay_numbers_and_rows_of_a_matrix_are_ids(tmp_path: Path) -> None:
    saved = SavedIndex.build(
        pl.DataFrame({"item_id": [10**15, 3, 2**40]}), torch.from_numpy(VECTORS[:3]), VectorIndexSpec.of("exact")
    )
    saved.save(tmp_path / "index")
    found = SavedIndex.load(tmp_path / "index").search(torch.from_numpy(VECTORS[1:2]), 3)
    assert found["item_id"].dtype == pl.Int64 and set(found["item_id"]) == {3, 10**15, 2**40}
    np.save(tmp_path / "m.npy", VECTORS)
    items, vectors = read_vectors(tmp_path / "m.npy")
    assert items["item_id"].to_list() == list(range(ITEMS)) and torch.equal(vectors, torch.from_numpy(VECTORS))
    wide = pl.DataFrame(
        {"item_id": [1], "vector": VECTORS[:1]}, schema_overrides={"vector": pl.Array(pl.Float32, WIDTH)}
    )
    wide.write_parquet(tmp_path / "array.parquet")
    assert torch.equal(read_vectors(tmp_path / "array.parquet")[1], torch.from_numpy(VECTORS[:1]))


def test_what_does_not_fit_is_refused_and_the_index_stays(tmp_path: Path) -> None:
    index = tmp_path / "index"
    items = parquet(tmp_path / "a.parquet", ["a", "b", "c"], VECTORS[:3])
    run("index", "build", items, index, "--index", "exact")
    before = {path.name: path.read_bytes() for path in index.iterdir()}
    bad_vectors = VECTORS[:2].copy()
    bad_vectors[1, 2] = np.nan
    refused = {
        "item b is in the index already": ("add", index, parquet(tmp_path / "1.parquet", ["d", "b"], VECTORS[:2])),
        "item d is given twice": ("add", index, parquet(tmp_path / "2.parquet", ["d", "d"], VECTORS[:2])),
        "NaN or infinite": ("add", index, parquet(tmp_path / "3.parquet", ["d", "e"], bad_vectors)),
        r"expected \(2, 6\)": ("add", index, parquet(tmp_path / "4.parquet", ["d", "e"], VECTORS[:2, :5])),
        "those of the index String": ("add", index, parquet(tmp_path / "5.parquet", [1, 2], VECTORS[:2])),
        "item x is not in the index": ("remove", index, "x"),
        "exists already: pass --overwrite": ("build", items, index),
        'there is no column "v"': ("build", items, tmp_path / "new", "--vector", "v"),
        'vector index "bogus" is unknown': ("build", items, tmp_path / "new", "--index", "bogus"),
        "expected a matrix|No such file": ("build", tmp_path / "nothing.npy", tmp_path / "new"),
        "is not an index": ("audit", tmp_path),
        "queries have 5 numbers": ("search", index, parquet(tmp_path / "6.parquet", [1], VECTORS[:1, :5])),
    }  # fmt: skip
    for said, arguments in refused.items():
        with pytest.raises((ValueError, OSError), match=said):
            run("index", *arguments)
    assert {path.name: path.read_bytes() for path in index.iterdir()} == before
    assert not (tmp_path / "new").exists()
    (index / "vectors.safetensors").write_bytes(before["vectors.safetensors"][:50])
    with pytest.raises(ValueError, match="is damaged"):
        SavedIndex.load(index)


def test_a_search_with_a_filter_returns_k_of_what_may_be(tmp_path: Path) -> None:
    genres = [[["Drama"], ["Drama", "War"], [], ["Comedy", "War"]][n % 4] for n in range(ITEMS)]
    years: list[float | None] = [None if n % 7 == 0 else 1900 + n % 100 for n in range(ITEMS)]
    frame = pl.DataFrame({"movie": [f"m{n}" for n in range(ITEMS)], "vector": VECTORS.tolist(), "genre": genres,
                          "year": years, "shop": [n % 3 for n in range(ITEMS)]})  # fmt: skip
    frame.write_parquet(tmp_path / "items.parquet")
    np.save(tmp_path / "queries.npy", QUERIES)
    run("index", "build", tmp_path / "items.parquet", tmp_path / "index", "--id", "movie", "--index", "exact")
    text = "{any: {genre: [War, Comedy]}, all: {shop: 1}, none: {genre: Comedy}, range: {year: [1920, 1980.5]}}"
    out = tmp_path / "found.parquet"
    run("index", "search", tmp_path / "index", tmp_path / "queries.npy", "-k", 8, "--filter", text, "--out", out)
    may = [
        n for n in range(ITEMS)
        if "War" in genres[n] and "Comedy" not in genres[n] and n % 3 == 1 and 1920 <= (years[n] or 0) <= 1980.5
    ]  # fmt: skip
    assert len(may) > 8
    lists = pl.read_parquet(out).group_by("query", maintain_order=True).agg("item_id")["item_id"].to_list()
    assert lists == expected([f"m{n}" for n in may], VECTORS[may], 8)
    with pytest.raises(ValueError, match='filter: there is no column "gnre"; there are item_id, genre, year, shop'):
        run("index", "search", tmp_path / "index", tmp_path / "queries.npy", "--filter", "{any: {gnre: [War]}}")
    with pytest.raises(ValueError, match="--filter: of: unknown key"):
        run("index", "search", tmp_path / "index", tmp_path / "queries.npy", "--filter", "{of: {genre: [War]}}")
