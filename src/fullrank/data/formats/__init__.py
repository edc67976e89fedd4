"""Formats by name; a format's module is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from fullrank.data.formats.base import Format

_CLASSES = {
    "amazon": "amazon:Amazon",
    "avazu": "avazu:Avazu",
    "criteo": "criteo:Criteo",
    "csv": "delimited:Csv",
    "ipinyou": "ipinyou:IPinYou",
    "kuaivideo": "kuaivideo:KuaiVideo",
    "libfm": "libfm:LibFM",
    "movielens": "movielens:MovieLens",
    "parquet": "parquet:ParquetLog",
    "taobao-ad": "taobao_ad:TaobaoAd",
}


def _opener(place: str) -> Callable[[], Format]:
    def open_format() -> Format:
        module, name = place.split(":")
        format_: Format = getattr(importlib.import_module(f"fullrank.data.formats.{module}"), name)()
        return format_

    return open_format


FORMATS: dict[str, Callable[[], Format]] = {name: _opener(place) for name, place in _CLASSES.items()}


def open_format(name: str) -> Format:
    """The format called `name`.

    Raises:
        ValueError: if there is none; the message lists the names.
    """
    if name not in FORMATS:
        raise ValueError(f'unknown format "{name}"; expected one of {", ".join(FORMATS)}')
    return FORMATS[name]()
