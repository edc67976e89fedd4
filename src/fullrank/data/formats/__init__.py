"""Formats by name; a format's module is imported when it is asked for."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fullrank.data.formats.base import Format, TakesOptions
from fullrank.data.formats.lines import bare_name
from fullrank.data.formats.options import ReadOptions
from fullrank.registry import Registry

FORMATS: Registry[Callable[[], Format]] = Registry(
    "format",
    "fullrank.formats",
    {
        "amazon": "fullrank.data.formats.amazon:Amazon",
        "avazu": "fullrank.data.formats.avazu:Avazu",
        "criteo": "fullrank.data.formats.criteo:Criteo",
        "csv": "fullrank.data.formats.csv_log:Csv",
        "interactions": "fullrank.data.formats.interactions:Interactions",
        "ipinyou": "fullrank.data.formats.ipinyou:IPinYou",
        "jsonl": "fullrank.data.formats.json_log:JsonLog",
        "kuaivideo": "fullrank.data.formats.kuaivideo:KuaiVideo",
        "libfm": "fullrank.data.formats.libfm:LibFM",
        "letor": "fullrank.data.formats.letor:Letor",
        "mind": "fullrank.data.formats.mind:Mind",
        "movielens": "fullrank.data.formats.movielens:MovieLens",
        "parquet": "fullrank.data.formats.parquet:ParquetLog",
        "recbole": "fullrank.data.formats.recbole:RecBole",
        "sessions": "fullrank.data.formats.sessions:Sessions",
        "taobao-ad": "fullrank.data.formats.taobao_ad:TaobaoAd",
    },
)

Opener = TypeVar("Opener", bound=Callable[[], Format])


def register(opener: Opener) -> Opener:
    """List a format of one's own under its `name`: a class, also as its decorator, or a function that gives a format.

    Raises:
        ValueError: if another format has the name.
    """
    FORMATS.register(getattr(opener, "name", None) or opener().name, opener)
    return opener


def open_format(name: str, options: ReadOptions | None = None) -> Format:
    """The format called `name`.

    Args:
        options: how its text is laid out, where that is not to be guessed.

    Raises:
        ValueError: if there is none (the message lists the names), or it takes no such options.
    """
    found = FORMATS.find(name)()
    if options is None or options == ReadOptions():
        return found
    if not isinstance(found, TakesOptions):
        given = ", ".join(f"--{option}" for option in sorted(options.model_fields_set))
        raise ValueError(f'the format "{name}" takes no {given}: it knows how its files are laid out')
    return found.with_options(options)


_USUAL = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".inter": "recbole",
}


def usual_format(path: Path) -> str:
    """Name of the format that a path is in when nobody says: by its ending, or that of its first files; else CSV."""
    files = sorted(itertools.islice(path.rglob("*.*"), 100)) if path.is_dir() else [path]
    names = [bare_name(file) for file in files if not file.name.startswith((".", "_"))]
    return next((_USUAL[ending] for name in names for ending in _USUAL if name.endswith(ending)), "csv")
