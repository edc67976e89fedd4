"""`manifest.json`: what a bundle is made of, and what each of its files has to be."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import fullrank
from fullrank.data import atomic
from fullrank.schema import describe_errors

VERSION = 2
# The first had no module of a class, and in a funnel one early stage.
READABLE = (1, VERSION)
MANIFEST = "manifest.json"
# A manifest is a few kilobytes; nobody waits for one that fills the memory.
LARGEST_MANIFEST = 16 << 20


class File(BaseModel):
    """What a file must be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Stage(BaseModel):
    """One model of a bundle.

    Attributes:
        stage: its name among the stages.
        kind: name of the registered retriever or ranker.
        config: fields of its `Config`.
        defined_in: the module of its class, for the message where `kind` is not known; never imported.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: str = Field(min_length=1)
    kind: str
    config: dict[str, Any]
    defined_in: str | None = None


class Manifest(BaseModel):
    """The content of `manifest.json`. Any file that it does not list, or that differs from its hash, is refused.

    Attributes:
        stages: of a single ranker one, named `final`.
        value: the value formula.
        sizes: how many candidates pass the stages of a funnel.
        slate: how a funnel makes a list of values; None, as before there was a choice, the largest first.
        deadlines: milliseconds by stage of a funnel that it may take.
        until: time of the last row of the log that a funnel's catalogues are of, in seconds since 1970, if it is known.
        about: where the bundle comes from, for people.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["fullrank-bundle"]
    version: int
    made_by: str
    stages: tuple[Stage, ...]
    value: str | None = None
    sizes: dict[str, Any] | None = None
    slate: dict[str, Any] | None = None
    deadlines: dict[str, float] | None = None
    until: int | None = None
    about: dict[str, Any] = {}
    files: dict[str, File]


def write_manifest(
    directory: Path,
    stages: Sequence[Stage],
    *,
    value: str | None = None,
    sizes: dict[str, Any] | None = None,
    slate: dict[str, Any] | None = None,
    deadlines: dict[str, float] | None = None,
    until: int | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Write the manifest of all files below `directory`."""
    manifest = Manifest(
        format="fullrank-bundle",
        version=VERSION,
        made_by=f"fullrank {fullrank.__version__}",
        stages=tuple(stages),
        value=value,
        sizes=sizes,
        slate=slate,
        deadlines=deadlines,
        until=until,
        about=about or {},
        files={name: describe_file(directory / name) for name in _listing(directory)},
    )
    atomic.write_text(directory / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


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
    if version not in READABLE:
        maker = f" (made by {values['made_by']})" if isinstance(values.get("made_by"), str) else ""
        readable = " and ".join(map(str, READABLE))
        raise ValueError(f"{manifest_path}: version is {version!r}{maker[:80]}, this release reads {readable}")
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        raise ValueError(describe_errors(error, str(manifest_path)).splitlines()[0]) from None
    names = [stage.stage for stage in manifest.stages]
    if len(set(names)) < len(names):
        raise ValueError(f"{manifest_path}: a stage occurs twice")
    root = path.resolve()
    for name, expected in manifest.files.items():
        pure = PurePosixPath(name)
        odd = pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name
        try:
            if odd or not (path / name).resolve().is_relative_to(root):
                raise ValueError(f'{manifest_path}: file "{name}" lies outside the bundle')
            if not (path / name).is_file():
                raise ValueError(f"{path / name} is missing from the bundle")
            if describe_file(path / name) != expected:
                raise ValueError(f"{path / name} does not match its hash in {MANIFEST}: it was changed or damaged")
        except (OSError, UnicodeEncodeError) as error:
            shown = repr(name) if len(repr(name)) <= 40 else f"{repr(name)[:37]}..."
            raise ValueError(f"{manifest_path}: file {shown} cannot be read: {error}") from None
    for name in _listing(path):
        if name not in manifest.files and name != MANIFEST:
            raise ValueError(f"{path / name} is not listed in {MANIFEST}: remove it from the bundle")
    return manifest


def describe_file(path: Path) -> File:
    """Hash and size of a file that may be large."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return File(sha256=digest, bytes=path.stat().st_size)


def _listing(root: Path) -> list[str]:
    """Every file below `root`, links included, as a relative path with forward slashes."""
    names = []
    for parent, directories, files in os.walk(root):
        links = [name for name in directories if os.path.islink(os.path.join(parent, name))]
        names += [(Path(parent) / name).relative_to(root).as_posix() for name in (*files, *links)]
    return sorted(names)
