"""A funnel, or one ranker, on disk: a directory that training writes and serving opens. Opening it runs no code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fullrank.data import atomic
from fullrank.data.encoders import Encoders
from fullrank.data.loader import partial_batch
from fullrank.data.tallies import hash_column, hashed_features
from fullrank.funnel.canary import CANARY, canary_text
from fullrank.funnel.catalogue import ACTIVE, BID, Catalogue
from fullrank.funnel.deadline import check_deadlines
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.mapped import MappedArrays, modules_of
from fullrank.funnel.requests import Request
from fullrank.funnel.scorer import Scorer
from fullrank.funnel.searcher import Searcher
from fullrank.funnel.slate import SlateConfig
from fullrank.funnel.stages import FINAL, RETRIEVAL, StageSizes, check_names
from fullrank.funnel.totals import CounterState
from fullrank.models import Ranker
from fullrank.retrieval import RETRIEVERS, Retriever
from fullrank.schema import Role, Schema, describe_errors
from fullrank.training.manifest import MANIFEST, Manifest, Stage, read_manifest, write_manifest
from fullrank.training.saving import (
    WEIGHTS,
    last_line,
    load_ranker,
    require_files,
    save_model,
    stage_of,
    write_weights,
)

# The sums that counters go on from, apart from what a stage may be called.
COUNTERS = "counters/sums.safetensors"


def save_bundle(
    content: Funnel | Scorer, path: Path, *, about: dict[str, Any] | None = None, overwrite: bool = False
) -> None:
    """Write a bundle directory; it appears whole or not at all.

    The bundle of a single ranker is also what `fullrank.training.load_model` reads. That of a funnel has the weights of
    each ranker in a file of the name of its stage.

    Args:
        about: where it comes from, for people: data, seed, metrics.

    Raises:
        ValueError: if `path` exists and `overwrite` is not set, or a part could not be loaded again, because its class
            is not registered.
    """
    if isinstance(content, Scorer):
        value = content.value.text
        save_model(content.model, path, content.encoders, value=value, about=about, overwrite=overwrite)
        return
    rankers = [stage_of(name, ranker) for name, ranker in content.rankers.items()]
    stages = [_retrieval_stage(content.retriever), *rankers]
    with atomic.new_directory(path, overwrite=overwrite) as partial:
        _write_retrieval(content, partial)
        for name, ranker in content.rankers.items():
            write_weights(ranker, partial / f"{name}.safetensors")
        atomic.write_text(partial / CANARY, canary_text(content))
        sizes, slate = content.sizes.model_dump(mode="json"), content.slate.model_dump(mode="json")
        if content.counters is not None:
            (partial / COUNTERS).parent.mkdir()
            save_file(content.counters.state.tensors, partial / COUNTERS)
        write_manifest(
            partial,
            stages,
            value=content.value.text,
            sizes=sizes,
            slate=slate,
            deadlines=content.deadlines or None,
            until=content.until,
            about=about,
        )


def write_sizes(path: Path, sizes: StageSizes) -> None:
    """Make the bundle of a funnel hand on other numbers of candidates: its manifest is replaced, whole or not at all.

    Raises:
        ValueError: as `read_manifest`, or if they are not as many as the funnel has stages.
    """
    manifest = read_manifest(path)
    sizes.keeps(len(manifest.stages) - 2)
    changed = manifest.model_copy(update={"sizes": sizes.model_dump(mode="json")})
    atomic.write_text(path / MANIFEST, changed.model_dump_json(indent=2) + "\n")


def _retrieval_stage(retriever: Retriever) -> Stage:
    kind, name = type(retriever), retriever.name
    if name not in RETRIEVERS or RETRIEVERS[name] is not kind:
        taken = f'another class is registered as "{name}"' if name in RETRIEVERS else "it is not registered"
        raise ValueError(
            f"{kind.__module__}.{kind.__qualname__} could not be loaded again, {taken}: give it a name of its own and "
            "register it with fullrank.retrieval.register"
        )
    config = retriever.config.model_dump(mode="json")
    return Stage(stage=RETRIEVAL, kind=name, config=config, defined_in=kind.__module__)


def _write_retrieval(content: Funnel | Searcher, directory: Path) -> None:
    """All files but the weights of rankers and the manifest."""
    atomic.write_text(directory / "schema.json", content.encoders.schema.to_json())
    content.encoders.save(directory / "encoders")
    content.items.frame.write_parquet(directory / "items.parquet", compression="zstd")
    if content.users is not None:
        content.users.frame.write_parquet(directory / "users.parquet", compression="zstd")
    content.context.write_parquet(directory / "context.parquet")
    content.retriever.save(directory / RETRIEVAL)


def save_searcher(
    content: Searcher, path: Path, *, about: dict[str, Any] | None = None, overwrite: bool = False
) -> None:
    """Write the bundle of a retriever alone; `load_searcher` reads it.

    Raises:
        ValueError: as `save_bundle`.
    """
    stage = _retrieval_stage(content.retriever)
    with atomic.new_directory(path, overwrite=overwrite) as partial:
        _write_retrieval(content, partial)
        write_manifest(partial, [stage], about=about)


def load_searcher(path: Path) -> Searcher:
    """Open the bundle of a retriever, or of a funnel, of which only retrieval is read.

    Raises:
        ValueError: as `load_bundle`, or if it has no retrieval.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if manifest.stages[0].stage != RETRIEVAL:
        raise ValueError(f"{path} is the bundle of a ranker: it has no {RETRIEVAL}")
    require_files(path, manifest, ["schema.json", "items.parquet", "context.parquet"])
    schema, encoders = _encoders(path)
    has_users = "users.parquet" in manifest.files
    return Searcher(
        encoders=encoders,
        items=_catalogue(path / "items.parquet", schema, "item"),
        users=_catalogue(path / "users.parquet", schema, "user") if has_users else None,
        context=_context(path / "context.parquet", schema),
        retriever=_retriever(path, manifest.stages[0], schema),
    )


def load_bundle(path: Path, mapped: Path | None = None) -> Funnel | Scorer:
    """Open a bundle: check every file, then build the funnel, or the scorer if it has a final stage only.

    Args:
        mapped: directory that `write_arrays` has written of this bundle: large arrays are mapped from there.

    Raises:
        ValueError: as `read_manifest`, or if the parts do not fit together.
    """
    path = Path(path)
    manifest = read_manifest(path)
    arrays = None if mapped is None else MappedArrays(mapped)
    names = [stage.stage for stage in manifest.stages]
    if names == [RETRIEVAL]:
        raise ValueError(f"{path} is the bundle of a retriever alone: ask it with `fullrank retrieve`")
    if names == [FINAL]:
        require_files(path, manifest, ["schema.json", WEIGHTS])
        schema, encoders = _encoders(path, arrays)
        ranker = load_ranker(path, manifest.stages[0], schema, path / WEIGHTS)
        if arrays is not None:
            arrays.hold({FINAL: ranker})
        return Scorer(encoders, ranker, manifest.value)
    for place, name in ((0, RETRIEVAL), (-1, FINAL)):
        if name not in names:
            raise ValueError(f"{path / MANIFEST}: no stage {name}")
        if names[place] != name:
            raise ValueError(f"{path / MANIFEST}: stage {name} is not the {'last' if place else 'first'}")
    early = names[1:-1]
    try:
        check_names(early)
        sizes = StageSizes.model_validate(manifest.sizes or {})
        sizes.keeps(len(early))
        deadlines = check_deadlines(manifest.deadlines or {}, names)
    except ValidationError as error:
        raise ValueError(describe_errors(error, f"{path / MANIFEST}: sizes").splitlines()[0]) from None
    except ValueError as error:
        raise ValueError(f"{path / MANIFEST}: {error}") from None
    try:
        slate = SlateConfig.model_validate(manifest.slate or {})
    except ValidationError as error:
        raise ValueError(describe_errors(error, f"{path / MANIFEST}: slate").splitlines()[0]) from None
    weights = {name: f"{name}.safetensors" for name in names[1:]}
    require_files(path, manifest, ["schema.json", "items.parquet", "context.parquet", *weights.values()])
    for name in manifest.files:
        if "/" not in name and name.endswith(".safetensors") and name not in weights.values():
            raise ValueError(f"{path / name} belongs to no stage of {MANIFEST}")
    schema, encoders = _encoders(path, arrays)
    rankers: dict[str, Ranker] = {}
    for stage in manifest.stages[1:]:
        rankers[stage.stage] = load_ranker(path, stage, schema, path / weights[stage.stage])
        if arrays is not None:
            arrays.hold({stage.stage: rankers[stage.stage]})
    retriever = _retriever(path, manifest.stages[0], schema, None if arrays is None else arrays.retriever)
    if arrays is not None:
        arrays.hold(modules_of(retriever))
    has_users = "users.parquet" in manifest.files
    items = _catalogue(path / "items.parquet", schema, "item", arrays)
    users = _catalogue(path / "users.parquet", schema, "user", arrays) if has_users else None
    funnel = Funnel(
        encoders=encoders,
        items=items,
        users=users,
        context=_context(path / "context.parquet", schema),
        retriever=retriever,
        early={name: rankers[name] for name in early},
        final=rankers[FINAL],
        value=manifest.value,
        sizes=sizes,
        slate=slate,
        deadlines=deadlines,
        item_vectors=None if arrays is None else arrays.item_vectors,
        until=manifest.until,
        counters=_counters(path, manifest, schema, {"item": items, "user": users}, arrays),
    )
    found = funnel.retriever.search(funnel.encode([Request()]), len(funnel.items))
    found_keys = found.item_keys_BK[found.found_BK]
    if not found_keys.numel() and not funnel.retriever.cost():
        raise ValueError(f"{path / RETRIEVAL}: the index holds no item")
    if not bool(torch.isin(found_keys, funnel.items.keys_I).all()):
        raise ValueError(f"{path / RETRIEVAL}: the index holds an item that items.parquet has not")
    return funnel


def _encoders(path: Path, arrays: MappedArrays | None = None) -> tuple[Schema, Encoders]:
    schema = Schema.read(path / "schema.json")
    encoders = Encoders.load(path / "encoders", None if arrays is None else arrays.vocabularies())
    if encoders.schema != schema:
        raise ValueError(f"{path}: schema.json and encoders differ")
    return schema, encoders


def _retriever(path: Path, stage: Stage, schema: Schema, arrays: Path | None = None) -> Retriever:
    place = path / RETRIEVAL
    try:
        kind = RETRIEVERS.find(stage.kind, stage.defined_in)
    except ValueError as error:
        raise ValueError(f"{path / MANIFEST}: {error}") from None
    try:
        retriever = kind.load(place, schema, arrays=arrays)
        same = kind.Config.model_validate(stage.config) == retriever.config
    except ValidationError as error:
        raise ValueError(describe_errors(error, f"{place / 'retriever.json'}: config").splitlines()[0]) from None
    except (ValueError, RuntimeError, SafetensorError) as error:  # RecursionError is a RuntimeError
        text = last_line(error)
        raise ValueError(text if text.startswith(str(place)) else f"{place} is damaged: {text}") from None
    if not same:
        raise ValueError(f"{place / 'retriever.json'} and {MANIFEST} differ in the configuration")
    return retriever


def _catalogue(path: Path, schema: Schema, role: Role, arrays: MappedArrays | None = None) -> Catalogue:
    if arrays is not None:
        return arrays.catalogue(path.stem, schema)
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


def _counters(
    path: Path,
    manifest: Manifest,
    schema: Schema,
    catalogues: Mapping[Role, Catalogue | None],
    arrays: MappedArrays | None,
) -> CounterState | None:
    if COUNTERS not in manifest.files:
        return None
    place = path / COUNTERS
    if not schema.counters or manifest.until is None:
        raise ValueError(f"{place} needs counters in the schema, and {MANIFEST} to say until when they are")
    for name, role in hashed_features(schema).items():
        catalogue = catalogues.get(role)
        if catalogue is not None and catalogue.frame.schema.get(hash_column(name)) != pl.UInt64():
            raise ValueError(f'{path / f"{role}s.parquet"}: the column "{hash_column(name)}" of hashes is missing')
    try:
        return CounterState(schema, load_file(place) if arrays is None else arrays.counters(), manifest.until)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{place} is damaged: {last_line(error)}") from None


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
