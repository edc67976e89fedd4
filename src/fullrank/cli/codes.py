"""`fullrank codes`: codes of items from their content, for prefix tables."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import polars as pl

    from fullrank.embeddings.semantic_id.quantizer import Quantizer

app = typer.Typer(help="Codes of items from their content, for prefix tables.", no_args_is_help=True)


class Method(StrEnum):
    RQ_KMEANS = "rq_kmeans"
    RQ_VAE = "rq_vae"


class Text(StrEnum):
    NGRAMS = "ngrams"
    WORDLLAMA = "wordllama"


@app.command("make")
def make(
    items: Annotated[Path, typer.Argument(help="Parquet or CSV file with a row for each item.")],
    out: Annotated[Path, typer.Option(help="Directory to write, for `codes` of a prefix table.")],
    item_id: Annotated[str, typer.Option("--id", metavar="COLUMN", help="Its column of item ids.")] = "item_id",
    vector: Annotated[
        str | None, typer.Option(metavar="COLUMNS", help="A column of lists of numbers, or several of numbers: a,b,c")
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="COLUMNS", help="Or columns of text: title,genres")] = None,
    text_model: Annotated[Text, typer.Option(help="What makes vectors of text.")] = Text.NGRAMS,
    method: Annotated[Method, typer.Option(help="The quantiser.")] = Method.RQ_KMEANS,
    levels: Annotated[int, typer.Option(min=1, help="Codes of an item.")] = 3,
    codebook_size: Annotated[int, typer.Option(min=2, help="Different codes of a level.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of rq_vae.")] = 20_000,
    data: Annotated[
        Path | None, typer.Option(help="Fit to items of this dataset's vocabulary only: those of its training rows.")
    ] = None,
    table: Annotated[str | None, typer.Option(help="The vocabulary; default that of the dataset's item id.")] = None,
    like: Annotated[
        Path | None, typer.Option(metavar="CODES", help="Take the quantiser and the columns of earlier codes.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Fit a quantiser to the content of items, and write the codes of all of them.

    Example: fullrank codes make movies.csv --id movieId --text title,genres --data data/ratings --out codes
    """
    from rich.console import Console

    from fullrank.data import atomic
    from fullrank.embeddings.semantic_id.codes import CODES, ItemCodes
    from fullrank.embeddings.semantic_id.content import Content, as_lists, read_items
    from fullrank.embeddings.semantic_id.loading import load_quantizer

    with Console(stderr=True, markup=False).status(f"codes of {items}"):
        frame = read_items(items)
        if item_id not in frame.columns:
            raise ValueError(f'{items}: there is no column "{item_id}"; expected one of {", ".join(frame.columns)}')
        if like is not None:
            if vector or text or data:
                raise ValueError(
                    "--like takes columns and quantiser of earlier codes: drop --vector, --text and --data"
                )
            content, quantizer = Content.load(like), load_quantizer(like)
        else:
            names = [tuple(given.split(",")) if given else () for given in (vector, text)]
            content, quantizer = Content(*names, text_model=text_model.value), None
        for name in content.vector:
            frame = as_lists(frame, name) if len(content.vector) == 1 else frame
        if not frame.height:
            raise ValueError(f"{items} has no rows")
        try:
            known = frame if data is None else _known(frame, item_id, data, table)
            if quantizer is None:
                content.fit(known)
                quantizer = _fitted(content, known, method, levels, codebook_size, steps, seed)
            codes = ItemCodes.of(frame[item_id], quantizer.encode(content(frame)), quantizer)
        except ValueError as error:
            raise type(error)(f"{items}: {error}") from None
        with atomic.new_directory(out, overwrite=overwrite) as partial:
            quantizer.save(partial)
            content.save(partial)
            codes.write(partial / CODES)
    vectors = content(known)
    report: dict[str, Any] = {
        "codes": str(out),
        "version": quantizer.version,
        "items": frame.height,
        "fitted_to": known.height if like is None else 0,
        "without_content": int((codes.codes_IL[:, 0] < 0).sum()),
        **quantizer.report(vectors[vectors.isfinite().all(1)]),
    }
    if as_json:
        print(json.dumps(report, allow_nan=False))
        return
    _print(report)


@app.command("admit")
def admit(
    bundle: Annotated[Path, typer.Argument(help="Bundle of one ranker that has a prefix table.")],
    codes: Annotated[Path, typer.Argument(help="What `fullrank codes make` wrote.")],
    out: Annotated[Path, typer.Option(help="Bundle to write.")],
    table: Annotated[str | None, typer.Option(help="The prefix table; default that of the item id.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Let a trained ranker know new items by their codes, without training: each is scored like those near it.

    Example: fullrank codes admit runs/day1/model codes/day2 --out runs/day2/model
    """
    from fullrank.data.encoders import Encoders
    from fullrank.embeddings.semantic_id.codes import ItemCodes
    from fullrank.training.codes import admitted
    from fullrank.training.manifest import read_manifest
    from fullrank.training.saving import load_model, save_model

    model, encoders = load_model(bundle), Encoders.load(bundle / "encoders")
    name = table or _item_table(encoders.schema, bundle)
    larger, longer = admitted(model, encoders, name, ItemCodes.read(codes))
    manifest = read_manifest(bundle)
    save_model(larger, out, longer, value=manifest.value, about=manifest.about, overwrite=overwrite)
    new = longer.schema.tables()[name] - encoders.schema.tables()[name]
    report = {"bundle": str(out), "table": name, "new_items": new}
    print(json.dumps(report) if as_json else f"{out}: {new:,} new items in table {name}")


def _item_table(schema: Any, place: Path) -> str:
    item = schema.keys.item_id
    features = schema.embedded()
    if item is None or item not in features:
        raise ValueError(f"{place}: the schema names no item id that is a feature: say which table with --table")
    name: str = features[item].table_name
    return name


def _known(frame: pl.DataFrame, item_id: str, data: Path, table: str | None) -> pl.DataFrame:
    """The items that are in the dataset's vocabulary."""
    from fullrank.data.dataset import Dataset
    from fullrank.data.spelling import as_text

    encoders = Dataset.open(data).encoders
    name = table or _item_table(encoders.schema, data)
    if name not in encoders.vocabularies:
        raise ValueError(f'{data} has no vocabulary of a table "{name}"')
    known = frame.filter(as_text(frame[item_id]).is_in(encoders.vocabularies[name].values.implode()))
    if not known.height:
        raise ValueError(f'no item of column "{item_id}" is in the vocabulary of table "{name}" of {data}')
    return known


def _fitted(
    content: Any, known: pl.DataFrame, method: Method, levels: int, codebook_size: int, steps: int, seed: int
) -> Quantizer:
    from fullrank.embeddings.semantic_id import RQKMeans

    vectors = content(known)
    vectors = vectors[~vectors.isnan().all(1)]
    if method is Method.RQ_KMEANS:
        return RQKMeans(levels, codebook_size, seed=seed).fit(vectors)
    from fullrank.embeddings.semantic_id import RQVAE

    return RQVAE(vectors.shape[1], levels, codebook_size, seed=seed).fit(vectors, steps)


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name in ("items", "fitted_to", "without_content", "max_collisions"):
        table.add_row(name.replace("_", " "), f"{report[name]:,}")
    table.add_row("items with codes of their own", f"{report['unique_ratio']:.1%}")
    for name, label in (("rel_mse", "error left after each level"), ("usage", "codes in use at each level")):
        table.add_row(label, ", ".join(f"{value:.1%}" for value in report[name]))
    table.add_row("version", report["version"])
    console = Console(markup=False)
    console.print(f"{report['codes']}", highlight=False, soft_wrap=True)
    console.print(table)
