"""Rankers, one file per architecture."""

from __future__ import annotations

from typing import Any

from fullrank.models.base import ParameterCount, Ranker, RankerOutput
from fullrank.models.registry import RANKERS, RankerSpec, register

MODELS = RANKERS


def __getattr__(name: str) -> Any:
    for key, place in RANKERS.places.items():
        if place.endswith(f":{name}"):
            return RANKERS[key]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["MODELS", "RANKERS", "ParameterCount", "Ranker", "RankerOutput", "RankerSpec", "register"]
