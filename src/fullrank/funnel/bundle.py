"""A funnel, or one ranker, on disk: a directory that training writes and serving opens. Opening it runs no code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from fullrank.data import atomic
from fullrank.data.encoders import Encoders
from fullrank.data.loader import partial_batch
from fullrank.funnel.catalogue import ACTIVE, BID, Catalogue
from fullrank.funnel.funnel import Funnel, StageSizes
from fullrank.funnel.requests import Request
from fullrank.funnel.scorer import Scorer
from fullrank.models.early_stage import EarlyStageRanker
from fullrank.retrieval import RETRIEVERS, Retriever
from fullrank.schema import Role, Schema, describe_errors
from fullrank.training.manifest import MANIFEST, Stage, read_manifest, write_manifest
from fullrank.training.saving import (
    WEIGHTS,
    last_line,
    load_ranker,
    require_files,
    save_model,
    stage_of,
    write_weights,
)

RANKER_FILES = {"early": "early.safetensors", "final": "final.safetensors"}


def save_bundle(
    content: Funnel | Scorer, path: Path, *, about: dict[str, Any] | None = None, overwrite: bool = False
) -> None:
    """Write a bundle directory; it appears whole or not at all.

    The bundle of a single ranker is also what `fullrank.training.load_model` reads.

    Args:
        about: where it comes from, for people: data, seed, metrics.

    Raises:
        ValueError: if `path` exists and `overwrite` is not set.
    """
    if isinstance(content, Scorer):
        value = content.value.text
        save_model(content.model, path, content.encoders, value=value, about=about, overwrite=overwrite)
        return
    rankers = [stage_of("early", content.early), stage_of("final", content.final)]
    with atomic.new_directory(path, overwrite=overwrite) as partial:
        stages = [_write_funnel(content, partial), *rankers]
        write_manifest(partial, stages, value=content.value.text, sizes=content.sizes.model_dump(), about=about)


def _write_funnel(funnel: Funnel, directory: Path) -> Stage:
    """All files but the manifest; the description of the retriever."""
    atomic.write_text(directory / "schema.json", funnel.schema.to_json())
    funnel.encoders.save(directory / "encoders")
    funnel.items.frame.write_parquet(directory / "items.parquet", compression="zstd")
    if funnel.users is not None:
        funnel.users.frame.write_parquet(directory / "users.parquet", compression="zstd")
    funnel.context.write_parquet(directory / "context.parquet")
    funnel.retriever.save(directory / "retrieval")
    for stage, model in (("early", funnel.early), ("final", funnel.final)):
        write_weights(model, directory / RANKER_FILES[stage])
    config = json.loads((directory / "retrieval" / "retriever.json").read_text(encoding="utf-8"))["config"]
    return Stage(stage="retrieval", kind=funnel.retriever.name, config=config)


def load_bundle(path: Path) -> Funnel | Scorer:
    """Open a bundle: check every file, then build the funnel, or the scorer if it has a final stage only.

    Raises:
        ValueError: as `read_manifest`, or if the parts do not fit together.
    """
    path = Path(path)
    manifest = read_manifest(path)
    stages = {stage.stage: stage for stage in manifest.stages}
    single = set(stages) == {"final"}
    needed = [WEIGHTS] if single else ["items.parquet", "context.parquet", *RANKER_FILES.values()]
    require_files(path, manifest, ["schema.json", *needed])
    absent = set() if single else {"retrieval", "early", "final"} - set(stages)
    if absent:
        raise ValueError(f"{path / MANIFEST}: no stage {min(absent)}")
    schema = Schema.read(path / "schema.json")
    encoders = Encoders.load(path / "encoders")
    if encoders.schema != schema:
        raise ValueError(f"{path}: schema.json and encoders differ")
    if single:
        model = load_ranker(path, stages["final"], schema, path / WEIGHTS)
        return Scorer(encoders, model, manifest.value)
    early = load_ranker(path, stages["early"], schema, path / RANKER_FILES["early"])
    if not isinstance(early, EarlyStageRanker):
        raise ValueError(f"{path / MANIFEST}: stage early: expected {EarlyStageRanker.name}, got {early.name}")
    try:
        sizes = StageSizes.model_validate(manifest.sizes or {})
    except ValidationError as error:
        raise ValueError(describe_errors(error, f"{path / MANIFEST}: sizes").splitlines()[0]) from None
    has_users = "users.parquet" in manifest.files
    funnel = Funnel(
        encoders=encoders,
        items=_catalogue(path / "items.parquet", schema, "item"),
        users=_catalogue(path / "users.parquet", schema, "user") if has_users else None,
        context=_context(path / "context.parquet", schema),
        retriever=_retriever(path, stages["retrieval"], schema),
        early=early,
        final=load_ranker(path, stages["final"], schema, path / RANKER_FILES["final"]),
        value=manifest.value,
        sizes=sizes,
    )
    found = funnel.retriever.search(funnel.encode([Request()]), len(funnel.items)).item_keys_BK
    if not found.numel():
        raise ValueError(f"{path / 'retrieval'}: the index holds no item")
    if not bool(torch.isin(found, funnel.items.keys_I).all()):
        raise ValueError(f"{path / 'retrieval'}: the index holds an item that items.parquet has not")
    return funnel


def _retriever(path: Path, stage: Stage, schema: Schema) -> Retriever:
    if stage.kind not in RETRIEVERS:
        raise ValueError(f'{path / MANIFEST}: retriever "{stage.kind}" is unknown; known: {", ".join(RETRIEVERS)}')
    place = path / "retrieval"
    try:
        return RETRIEVERS[stage.kind].load(place, schema)
    except ValidationError as error:
        raise ValueError(describe_errors(error, f"{place / 'retriever.json'}: config").splitlines()[0]) from None
    except (ValueError, RuntimeError, SafetensorError) as error:  # RecursionError is a RuntimeError
        text = last_line(error)
        raise ValueError(text if text.startswith(str(place)) else f"{place} is damaged: {text}") from None


def _catalogue(path: Path, schema: Schema, role: Role) -> Catalogue:
    frame = _frame(path)
    _check_columns(path, frame, schema.select({role}))
    if role == "item" and schema.keys.bid is not None and not frame.schema.get(BID, pl.String()).is_numeric():
        raise ValueError(f'{path}: column "{BID}" is {frame.schema.get(BID, "missing")}, expected numbers')
    if frame.schema.get(ACTIVE, pl.Boolean()) != pl.Boolean():
        raise ValueError(f'{path}: column "{ACTIVE}" is {frame.schema[ACTIVE]}, expected Boolean')
    try:
        return Catalogue.of(frame, schema)
    except (ValueError, pl.exceptions.PolarsError) as error:
        raise ValueError(f"{path} does not fit the schema: {last_line(error)}") from None


def _context(path: Path, schema: Schema) -> pl.DataFrame:
    frame = _frame(path)
    expected = schema.select({"context"})
    columns = [*expected.numeric_columns, *(feature.name for feature in expected.categorical)]
    if sorted(frame.columns) != sorted(columns) or (columns and frame.height != 1):
        raise ValueError(f"{path}: expected one row with the columns {', '.join(columns) or '(none)'}")
    try:
        partial_batch(frame if columns else pl.DataFrame({"_": [0]}), schema)
    except ValueError as error:
        raise ValueError(f"{path} does not fit the schema: {last_line(error)}") from None
    return frame


def _check_columns(path: Path, frame: pl.DataFrame, schema: Schema) -> None:
    for name in (*schema.numeric_columns, *schema.embedded(), *schema.event_number_keys):
        if name not in frame.columns:
            raise ValueError(f'{path}: column "{name}" of the schema is missing')


def _frame(path: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(path, glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {last_line(error)}") from None
