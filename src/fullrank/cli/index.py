"""`fullrank index`: an index of vectors, built, changed, asked and audited."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from fullrank.retrieval.filters import ItemFilter
    from fullrank.retrieval.saved_index import SavedIndex
    from fullrank.retrieval.vectors import VectorIndex, VectorIndexSpec

app = typer.Typer(help="An index of vectors: the largest inner products with a query.", no_args_is_help=True)

VectorsArgument = Annotated[
    Path, typer.Argument(metavar="VECTORS", help="Parquet file of ids and vectors, or a .npy matrix (ids: rows).")
]
IndexArgument = Annotated[Path, typer.Argument(metavar="INDEX", help="The directory of the index.")]
IdOption = Annotated[str, typer.Option("--id", metavar="COLUMN", help="The column of ids.")]
VectorOption = Annotated[str, typer.Option("--vector", metavar="COLUMN", help="The column of vectors.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@app.command("build")
def build(
    vectors: VectorsArgument,
    out: Annotated[Path, typer.Argument(metavar="INDEX", help="The directory to write.")],
    index: Annotated[
        str, typer.Option("--index", metavar="KIND", help="A kind, or a mapping: '{name: faiss_ivf_sq8, probes: 96}'.")
    ] = "auto",
    item_id: IdOption = "item_id",
    vector: VectorOption = "vector",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier index.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Build an index of items' vectors.

    Example: fullrank index build items.parquet index --index auto
    """
    from fullrank.retrieval.saved_index import SavedIndex, read_vectors

    begin = time.perf_counter()
    spec = _spec(index)
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already: pass --overwrite to replace it")
    items, matrix = read_vectors(vectors, item_id, vector)
    with _named(vectors):
        saved = SavedIndex.build(items, matrix, spec)
    saved.save(out, overwrite=overwrite)
    _tell(saved, out, {"seconds": time.perf_counter() - begin}, as_json)


@app.command("add")
def add(
    index: IndexArgument,
    vectors: VectorsArgument,
    item_id: IdOption = "item_id",
    vector: VectorOption = "vector",
    update: Annotated[bool, typer.Option("--update", help="Items that are there get their new vectors.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Add items to an index.

    Example: fullrank index add index new.parquet --update
    """
    from fullrank.retrieval.saved_index import SavedIndex, read_vectors

    saved = SavedIndex.load(index)
    items, matrix = read_vectors(vectors, item_id, vector)
    with _named(vectors):
        updated = saved.add(items, matrix, update=update)
    saved.save(index, overwrite=True)
    _tell(saved, index, {"added": len(items) - updated, "updated": updated}, as_json)


@app.command("remove")
def remove(
    index: IndexArgument,
    items: Annotated[list[str], typer.Argument(help="Ids of items.")],
    as_json: JsonOption = False,
) -> None:
    """Remove items from an index.

    Example: fullrank index remove index 1193 661
    """
    import polars as pl

    from fullrank.retrieval.saved_index import SavedIndex

    saved = SavedIndex.load(index)
    try:
        saved.remove(pl.Series(list(dict.fromkeys(items))))
    except KeyError as error:
        raise ValueError(f"{index}: {error.args[0]}") from None
    saved.save(index, overwrite=True)
    _tell(saved, index, {"removed": len(set(items))}, as_json)


@app.command("search")
def search(
    index: IndexArgument,
    queries: Annotated[Path, typer.Argument(metavar="QUERIES", help="Parquet file of vectors, or a .npy matrix.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Items for each query.")] = 10,
    where: Annotated[
        str | None,
        typer.Option("--filter", metavar="YAML", help="'{any: {genre: [Drama, War]}, range: {year: [1990, null]}}'"),
    ] = None,
    vector: VectorOption = "vector",
    out: Annotated[Path | None, typer.Option(help="Parquet file to write; default a table on stdout.")] = None,
) -> None:
    """The items with the largest inner products: columns query (its row), rank, item_id, score.

    Example: fullrank index search index queries.npy -k 10
    """
    import io

    from fullrank.data import atomic
    from fullrank.retrieval.saved_index import SavedIndex, check_queries

    chosen = None if where is None else _filter(where)
    saved = SavedIndex.load(index)
    matrix = _queries(queries, vector)
    with _named(queries):
        check_queries(matrix, saved.index.width)
    found = saved.search(matrix, k, chosen)
    if out is None:
        print(found.write_csv(), end="")
        return
    written = io.BytesIO()
    found.write_parquet(written)
    atomic.write_bytes(out, written.getvalue())


@app.command("audit")
def audit(
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="The directory of an index, or of a funnel's bundle.")],
    queries: Annotated[
        Path | None, typer.Option(help="Vectors as they will be asked; default those of random items, or users.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Best items to be found.")] = 100,
    sample: Annotated[int, typer.Option(min=1, help="Queries to draw.")] = 200,
    vector: VectorOption = "vector",
    as_json: JsonOption = False,
) -> None:
    """What an index finds of the best items, scores for it, and takes; what of a graph can be reached.

    Example: fullrank index audit runs/demo/bundle
    """
    from fullrank.retrieval.exact import ExactIndex
    from fullrank.retrieval.saved_index import check_queries
    from fullrank.retrieval.vectors.audit import audit as hold

    vectors, typical = _audited(index, sample)
    matrix = typical if queries is None else _queries(queries, vector)[:sample]
    with _named(queries or index):
        check_queries(matrix, vectors.width)
        found = hold(vectors, matrix, k=k, sample=sample)
    exact = ExactIndex(vectors.width)
    keys_I, vectors_ID = vectors.contents()
    exact.add(keys_I, vectors_ID)
    norms = vectors_ID.norm(dim=1)
    facts = {
        "kind": vectors.name,
        "items": len(vectors),
        "queries": len(matrix),
        "k": k,
        **found._asdict(),
        "milliseconds": _milliseconds(vectors, matrix, k),
        "exact_milliseconds": _milliseconds(exact, matrix, k),
        "norms": [float(norms.min()), float(norms.median()), float(norms.max())],
    }
    if as_json:
        print(json.dumps(facts))
        return
    _print_audit(facts)


def _milliseconds(index: VectorIndex, queries_QD: Tensor, k: int) -> float:
    """Of process time, for one query on its own."""
    alone = queries_QD[:20]
    begin = time.process_time()
    for row in range(len(alone)):
        index.search(alone[row : row + 1], k)
    return 1e3 * (time.process_time() - begin) / len(alone)


def _audited(path: Path, sample: int) -> tuple[VectorIndex, Tensor]:
    """The index of a directory, and typical queries."""
    import torch

    from fullrank.retrieval.saved_index import SavedIndex
    from fullrank.retrieval.vector_retriever import VectorRetriever
    from fullrank.training.manifest import MANIFEST

    generator = torch.Generator().manual_seed(0)
    if not (path / MANIFEST).is_file():
        index = SavedIndex.load(path).index
        _, vectors_ID = index.contents()
        return index, vectors_ID[torch.randperm(len(vectors_ID), generator=generator)[:sample]]
    from fullrank.funnel.bundle import load_bundle
    from fullrank.funnel.funnel import Funnel

    funnel = load_bundle(path)
    if not isinstance(funnel, Funnel) or not isinstance(funnel.retriever, VectorRetriever):
        raise ValueError(f"{path}: expected a funnel whose retriever searches vectors")
    if funnel.users is None:
        raise ValueError(f"{path}: the bundle knows no users: give --queries")
    rows = funnel.users.rows.batch
    chosen = torch.randperm(len(rows), generator=generator)[:sample]
    return funnel.retriever.vectors, funnel.retriever.user_vectors(funnel.users.rows.take(chosen))


def _spec(text: str) -> VectorIndexSpec:
    import yaml
    from pydantic import ValidationError

    from fullrank.retrieval.vectors import VectorIndexSpec
    from fullrank.schema import describe_errors

    try:
        return VectorIndexSpec.of(yaml.safe_load(text))
    except yaml.YAMLError:
        raise ValueError(f"--index: expected a kind or a mapping, got {text!r}") from None
    except ValidationError as error:
        raise ValueError(describe_errors(error, "--index").splitlines()[0]) from None


def _filter(text: str) -> ItemFilter:
    import yaml

    from fullrank.retrieval.filters import ItemFilter

    try:
        return ItemFilter.of(yaml.safe_load(text), "--filter")
    except yaml.YAMLError:
        raise ValueError(f"--filter: expected a mapping, got {text!r}") from None


def _queries(path: Path, vector: str) -> Tensor:
    import polars as pl

    from fullrank.retrieval.saved_index import read_vectors

    if path.suffix == ".npy":
        return read_vectors(path)[1]
    try:
        first = next(name for name in pl.read_parquet_schema(path) if name != vector)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from None
    except StopIteration:
        first = vector
    return read_vectors(path, first, vector)[1]


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Puts a path before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _tell(saved: SavedIndex, path: Path, facts: dict[str, Any], as_json: bool) -> None:
    kind = saved.spec.name
    if as_json:
        print(json.dumps({"index": str(path), "kind": kind, "items": len(saved), **facts}))
        return
    said = ", ".join(
        f"{name} {value:.1f}" if isinstance(value, float) else f"{name} {value:,}" for name, value in facts.items()
    )
    print(f"{path}: {len(saved):,} items of width {saved.index.width}, {kind}; {said}")


def _print_audit(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    low, middle, high = facts["norms"]
    table.add_row("index", f"{facts['kind']}, {facts['items']:,} items")
    table.add_row(f"of the {facts['k']} best items found", f"{facts['recall']:.4f}")
    table.add_row("items that their own vector finds", f"{facts['own']:.4f}")
    table.add_row("items scored by a search", f"{facts['cost']:,}")
    table.add_row("a query, CPU ms", f"{facts['milliseconds']:.2f}; scoring all {facts['exact_milliseconds']:.2f}")
    table.add_row("norms of vectors", f"{low:.3g} to {high:.3g}, median {middle:.3g}")
    if facts["reachable"] is not None:
        table.add_row("items that links lead to", f"{facts['reachable']:.2%}")
    Console(markup=False).print(table)
