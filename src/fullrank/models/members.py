"""Rankers inside rankers, named in a configuration."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from fullrank.models.base import Ranker
from fullrank.schema import Schema, describe_errors


def inherited(config: Ranker.Config) -> dict[str, Any]:
    """What members take from the outer configuration: width and kinds of tables, and their start if it is set there."""
    start = {"embedding_init": config.embedding_init} if "embedding_init" in config.model_fields_set else {}
    return {"embedding_dim": config.embedding_dim, "tables": config.tables, **start}


def member(schema: Schema, values: dict[str, Any], place: str) -> Ranker:
    """Build a ranker from its `name` and configuration.

    Raises:
        ValueError: if the name is unknown or a field is wrong; names `place`.
    """
    from fullrank.models import MODELS  # the registry imports this file

    name = values.get("name")
    if name not in MODELS:
        raise ValueError(f"{place}: expected a name among {', '.join(MODELS)}, got {name!r}")
    kind = MODELS[str(name)]
    try:
        config = kind.Config.model_validate({key: value for key, value in values.items() if key != "name"})
    except ValidationError as error:
        raise ValueError(describe_errors(error, f"{place} ({name})")) from None
    return kind.from_config(schema, config)
