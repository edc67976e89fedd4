"""A funnel, or one ranker, on disk: a directory that training writes and serving opens. Opening it runs no code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import polars as pl
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

import fullrank
from fullrank.data import atomic
from fullrank.data.encoders import Encoders
from fullrank.funnel.catalogue import ACTIVE, BID, Catalogue
from fullrank.funnel.funnel import Funnel, StageSizes
from fullrank.funnel.raw_values import shown
from fullrank.funnel.requests import Request
from fullrank.funnel.scorer import Scorer
from fullrank.models import MODELS, Ranker
from fullrank.models.early_stage import EarlyStageRanker
from fullrank.retrieval import RETRIEVERS, Retriever
from fullrank.retrieval.rows import partial_batch
from fullrank.schema import Role, Schema, describe_errors
from fullrank.training.saving import write_model

VERSION = 1
MANIFEST = "manifest.json"
# A manifest is a few kilobytes; nobody waits for one that fills the memory.
LARGEST_MANIFEST = 16 << 20
_RANKERS = ("early.safetensors", "final.safetensors")


class File(BaseModel):
    """What a file must be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Stage(BaseModel):
    """One model of the funnel.

    Attributes:
        kind: name of the retriever or ranker class.
        config: fields of its `Config`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: Literal["retrieval", "early", "final"]
    kind: str
    config: dict[str, Any]


class Manifest(BaseModel):
    """`manifest.json`. Any file of the bundle that it does not list, or that differs from its hash, is refused.

    A funnel has the stages retrieval, early and final, a single ranker only the last.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["fullrank-bundle"]
    version: int
    made_by: str
    stages: tuple[Stage, ...]
    value: str
    sizes: StageSizes | None = None
    about: dict[str, Any] = {}
    files: dict[str, File]


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
    with atomic.new_directory(path, overwrite=overwrite) as partial:
        if isinstance(content, Funnel):
            stages = _write_funnel(content, partial)
        else:
            write_model(content.model, partial, content.encoders)
            stages = [_stage("final", content.model)]
        manifest = Manifest(
            format="fullrank-bundle",
            version=VERSION,
            made_by=f"fullrank {fullrank.__version__}",
            stages=tuple(stages),
            value=content.value.text,
            sizes=content.sizes if isinstance(content, Funnel) else None,
            about=about or {},
            files={name: _file(partial / name) for name in _listing(partial)},
        )
        atomic.write_text(partial / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def _write_funnel(funnel: Funnel, directory: Path) -> list[Stage]:
    atomic.write_text(directory / "schema.json", funnel.schema.to_json())
    funnel.encoders.save(directory / "encoders")
    funnel.items.frame.write_parquet(directory / "items.parquet", compression="zstd")
    if funnel.users is not None:
        funnel.users.frame.write_parquet(directory / "users.parquet", compression="zstd")
    funnel.context.write_parquet(directory / "context.parquet")
    funnel.retriever.save(directory / "retrieval")
    for stage, model in (("early", funnel.early), ("final", funnel.final)):
        state = {name: value.detach().contiguous().clone() for name, value in model.state_dict().items()}
        atomic.write_bytes(directory / f"{stage}.safetensors", to_safetensors(state))
    config = _retriever_config(directory / "retrieval")
    retrieval = Stage(stage="retrieval", kind=funnel.retriever.name, config=config)
    return [retrieval, _stage("early", funnel.early), _stage("final", funnel.final)]


def _stage(stage: Literal["early", "final"], model: Ranker) -> Stage:
    return Stage(stage=stage, kind=model.name, config=model.config.model_dump(mode="json"))


def _retriever_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "retriever.json").read_text(encoding="utf-8"))["config"]
    return config


def read_manifest(path: Path) -> Manifest:
    """The checked manifest of a bundle.

    Raises:
        ValueError: if `path` is no bundle, is of another version, or holds a file that is missing, changed, not listed
            or outside the directory; names the file.
    """
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        nested = [path / name for name in ("bundle", "model") if (path / name / MANIFEST).is_file()]
        hint = f"; did you mean {nested[0]}?" if nested else ""
        raise ValueError(f"{path} is not a bundle: it has no {MANIFEST}{hint}")
    if manifest_path.stat().st_size > LARGEST_MANIFEST:
        raise ValueError(f"{manifest_path} is larger than {LARGEST_MANIFEST:,} bytes: this is no manifest")
    try:
        values = json.loads(manifest_path.read_text(encoding="utf-8"))
        version = values["version"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{manifest_path} is damaged: {error!r}") from None
    if version != VERSION:
        maker = f" (made by {values['made_by']})" if isinstance(values.get("made_by"), str) else ""
        raise ValueError(f"{manifest_path}: version is {version!r}{maker[:80]}, this release reads {VERSION}")
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        raise ValueError(describe_errors(error, str(manifest_path)).splitlines()[0]) from None
    root = path.resolve()
    for name, expected in manifest.files.items():
        pure = PurePosixPath(name)
        odd = pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name
        try:
            if odd or not (path / name).resolve().is_relative_to(root):
                raise ValueError(f'{manifest_path}: file "{name}" lies outside the bundle')
            if not (path / name).is_file():
                raise ValueError(f"{path / name} is missing from the bundle")
            if _file(path / name) != expected:
                raise ValueError(f"{path / name} does not match its hash in {MANIFEST}: it was changed or damaged")
        except (OSError, UnicodeEncodeError) as error:
            raise ValueError(f"{manifest_path}: file {shown(name)} cannot be read: {error}") from None
    for name in _listing(path):
        if name not in manifest.files and name != MANIFEST:
            raise ValueError(f"{path / name} is not listed in {MANIFEST}: remove it from the bundle")
    return manifest


def load_bundle(path: Path) -> Funnel | Scorer:
    """Open a bundle: check every file, then build the funnel, or the scorer if it has a final stage only.

    Raises:
        ValueError: as `read_manifest`, or if the parts do not fit together.
    """
    path = Path(path)
    manifest = read_manifest(path)
    stages = {stage.stage: stage for stage in manifest.stages}
    if len(stages) < len(manifest.stages):
        raise ValueError(f"{path / MANIFEST}: a stage occurs twice")
    single = set(stages) == {"final"}
    needed = ["weights.safetensors"] if single else ["items.parquet", "context.parquet", *_RANKERS]
    for name in ("schema.json", *needed):
        if name not in manifest.files:
            raise ValueError(f"{path / MANIFEST}: no file {name}")
    absent = set() if single else {"retrieval", "early", "final"} - set(stages)
    if absent:
        raise ValueError(f"{path / MANIFEST}: no stage {min(absent)}")
    schema = Schema.read(path / "schema.json")
    encoders = Encoders.load(path / "encoders")
    if encoders.schema != schema:
        raise ValueError(f"{path}: schema.json and encoders differ")
    if single:
        model = _model(path, stages["final"], MODELS, schema, path / "weights.safetensors")
        return Scorer(encoders, model, manifest.value)
    early_kinds = {EarlyStageRanker.name: EarlyStageRanker}
    early = _model(path, stages["early"], early_kinds, schema, path / "early.safetensors")
    assert isinstance(early, EarlyStageRanker)
    has_users = "users.parquet" in manifest.files
    funnel = Funnel(
        encoders=encoders,
        items=_catalogue(path / "items.parquet", schema, "item"),
        users=_catalogue(path / "users.parquet", schema, "user") if has_users else None,
        context=_context(path / "context.parquet", schema),
        retriever=_retriever(path, stages["retrieval"], schema),
        early=early,
        final=_model(path, stages["final"], MODELS, schema, path / "final.safetensors"),
        value=manifest.value,
        sizes=manifest.sizes,
    )
    found = funnel.retriever.search(funnel.encode([Request()]), len(funnel.items)).item_keys_BK
    if not found.numel():
        raise ValueError(f"{path / 'retrieval'}: the index holds no item")
    if not bool(torch.isin(found, funnel.items.keys_I).all()):
        raise ValueError(f"{path / 'retrieval'}: the index holds an item that items.parquet has not")
    return funnel


def _model(path: Path, stage: Stage, kinds: Mapping[str, type[Any]], schema: Schema, weights: Path) -> Ranker:
    place = f"{path / MANIFEST}: stage {stage.stage}"
    if stage.kind not in kinds:
        raise ValueError(f'{place}: model "{stage.kind}" is unknown; known: {", ".join(kinds)}')
    misfit = f"{weights} does not fit the {stage.kind} of the manifest"
    try:
        # Built without memory first: a schema that promises a table of a terabyte is found out by the weights' sizes.
        try:
            with torch.device("meta"):
                blank: Ranker = kinds[stage.kind].from_config(schema, stage.config)
        except ValidationError as error:
            raise ValueError(describe_errors(error, place).splitlines()[0]) from None
        except ValueError as error:
            raise ValueError(f"{place}: {_last(error)}") from None
        expected = {name: list(tensor.shape) for name, tensor in blank.state_dict().items()}
        with safe_open(weights, framework="pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ValueError(f"{misfit}: {name} has shape {found.get(name)}, expected {expected.get(name)}")
        with torch.random.fork_rng(devices=[]):
            model: Ranker = kinds[stage.kind].from_config(schema, stage.config)
        state = load_file(weights)
        for name, tensor in state.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{weights}: {name} has a NaN or infinite number")
        model.load_state_dict(state)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{misfit}: {_last(error)}") from None
    return model.eval()


def _retriever(path: Path, stage: Stage, schema: Schema) -> Retriever:
    if stage.kind not in RETRIEVERS:
        raise ValueError(f'{path / MANIFEST}: retriever "{stage.kind}" is unknown; known: {", ".join(RETRIEVERS)}')
    place = path / "retrieval"
    try:
        return RETRIEVERS[stage.kind].load(place, schema)
    except ValidationError as error:
        raise ValueError(describe_errors(error, f"{place / 'retriever.json'}: config").splitlines()[0]) from None
    except (ValueError, RuntimeError, SafetensorError) as error:  # RecursionError is a RuntimeError
        text = _last(error)
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
        raise ValueError(f"{path} does not fit the schema: {_last(error)}") from None


def _context(path: Path, schema: Schema) -> pl.DataFrame:
    frame = _frame(path)
    expected = schema.select({"context"})
    columns = [*expected.numeric_columns, *(feature.name for feature in expected.categorical)]
    if sorted(frame.columns) != sorted(columns) or (columns and frame.height != 1):
        raise ValueError(f"{path}: expected one row with the columns {', '.join(columns) or '(none)'}")
    try:
        partial_batch(frame if columns else pl.DataFrame({"_": [0]}), schema)
    except ValueError as error:
        raise ValueError(f"{path} does not fit the schema: {_last(error)}") from None
    return frame


def _check_columns(path: Path, frame: pl.DataFrame, schema: Schema) -> None:
    for name in (*schema.numeric_columns, *schema.embedded(), *schema.event_number_keys):
        if name not in frame.columns:
            raise ValueError(f'{path}: column "{name}" of the schema is missing')


def _frame(path: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(path, glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {_last(error)}") from None


def _last(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _file(path: Path) -> File:
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return File(sha256=digest.hexdigest(), bytes=size)


def _listing(root: Path) -> list[str]:
    """Every file below `root`, links included, as a relative path with forward slashes."""
    names = []
    for parent, directories, files in os.walk(root):
        links = [name for name in directories if os.path.islink(os.path.join(parent, name))]
        names += [(Path(parent) / name).relative_to(root).as_posix() for name in (*files, *links)]
    return sorted(names)
