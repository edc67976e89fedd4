"""What requests and answers hold, and how an answer is written."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Annotated, Any, Self

from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fullrank.funnel import requests as funnel_requests
from fullrank.funnel.funnel import RankedItem
from fullrank.funnel.scorer import ScoredItem

Id = int | str
Number = Annotated[float, Field(allow_inf_nan=False)]
Scalar = int | Number | str | None


class Strict(BaseModel):
    """Base of request and response bodies: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Asker(Strict):
    """Who asks, and where.

    Attributes:
        user_id: as in the log. Unknown users are served.
        features: raw values of user features that are newer than what the bundle knows, by column name; events of a
            sequence are lists named `<sequence>.<field>`, oldest first.
        context: raw values of context features.
    """

    user_id: Id | None = None
    features: dict[str, Scalar | list[Scalar]] = Field(default_factory=dict, max_length=1000)
    context: dict[str, Scalar | list[Scalar]] = Field(default_factory=dict, max_length=1000)

    def request(self) -> funnel_requests.Request:
        return funnel_requests.Request(self.user_id, {**self.features, **self.context})


class Impression(Strict):
    """An item that was shown to the user, and how long ago."""

    item_id: Id
    seconds_ago: Number = 0.0


class RecommendRequest(Asker):
    """Ask for the best `k` items; `shown` is what frequency caps count."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"user_id": 7, "k": 5}, {"k": 5}]}
    )

    k: int = Field(default=10, ge=1, le=2**31 - 1)
    shown: list[Impression] = Field(default_factory=list, max_length=10_000)

    def request(self) -> funnel_requests.Request:
        shown = [funnel_requests.Shown(item.item_id, item.seconds_ago) for item in self.shown]
        return replace(super().request(), shown=shown)


class ScoreRequest(Asker):
    """Ask for predictions: of named items for someone who asks, or of whole rows.

    Attributes:
        item_ids: items of the catalogue, or new ones.
        rows: instead of all else: raw values of user, item and context features by column name, as in the log. What
            is left out is missing.
    """

    item_ids: list[Id] | None = Field(default=None, min_length=1, max_length=10_000)
    rows: list[dict[str, Scalar | list[Scalar]]] | None = Field(default=None, min_length=1, max_length=10_000)

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.item_ids is None) == (self.rows is None):
            raise ValueError(f"expected either item_ids or rows, got {'neither' if self.rows is None else 'both'}")
        beside = {"user_id", "features", "context"} & self.model_fields_set
        if self.rows is not None and beside:
            raise ValueError(f"rows hold all features of each row; {min(beside)} belongs to item_ids")
        return self


class Item(Strict):
    """An item, or a row, with its value and the prediction of each task."""

    item_id: Id | None
    value: float | None
    predictions: dict[str, float | None]


class RecommendedItem(Item):
    """An item of a list.

    Attributes:
        propensity: probability that it was drawn with, given the items above.
        payment: for one unit of what the bid is for; null without an auction.
    """

    propensity: float
    payment: float | None


class RecommendResponse(Strict):
    """A ranked list, and the number of candidates that each stage scored."""

    items: list[RecommendedItem]
    candidates: dict[str, int]


class ScoreResponse(Strict):
    """Items, or rows, in the order of the request."""

    items: list[Item]


class Status(Strict):
    """State of the server."""

    status: str


def item_json(item: ScoredItem) -> dict[str, Any]:
    """An `Item`, as JSON has it."""
    # JSON has no infinite numbers; a regression may overflow to one.
    predictions = {task: number if math.isfinite(number) else None for task, number in item.predictions.items()}
    return {"item_id": item.item_id, "value": item.value, "predictions": predictions}


def recommended_json(item: RankedItem) -> dict[str, Any]:
    """A `RecommendedItem`, as JSON has it."""
    return {**item_json(item), "propensity": item.propensity, "payment": item.payment}


def encoded(value: Any) -> bytes:
    """Compact JSON."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def answer(content: bytes, status: int = 200) -> Response:
    """Encoded JSON as it is: FastAPI would first validate every item of it again."""
    return Response(content, status_code=status, media_type="application/json")
