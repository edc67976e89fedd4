"""Formats by name; a format's module is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fullrank.data.formats.base import Format
from fullrank.registry import Registry

FORMATS: Registry[Callable[[], Format]] = Registry(
    "format",
    "fullrank.formats",
    {
        "amazon": "fullrank.data.formats.amazon:Amazon",
        "avazu": "fullrank.data.formats.avazu:Avazu",
        "criteo": "fullrank.data.formats.criteo:Criteo",
        "csv": "fullrank.data.formats.delimited:Csv",
        "ipinyou": "fullrank.data.formats.ipinyou:IPinYou",
        "kuaivideo": "fullrank.data.formats.kuaivideo:KuaiVideo",
        "libfm": "fullrank.data.formats.libfm:LibFM",
        "movielens": "fullrank.data.formats.movielens:MovieLens",
        "parquet": "fullrank.data.formats.parquet:ParquetLog",
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


def open_format(name: str) -> Format:
    """The format called `name`.

    Raises:
        ValueError: if there is none; the message lists the names.
    """
    return FORMATS.find(name)()


def usual_format(path: Path) -> str:
    """Name of the format that a path is in when nobody says: Parquet by its ending, else CSV."""
    return "parquet" if path.suffix == ".parquet" or (path / "train.parquet").is_file() else "csv"
