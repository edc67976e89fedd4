"""What requests and answers hold, and how an answer is written."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Self

from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fullrank.funnel import requests as funnel_requests
from fullrank.funnel.explaining import Explained
from fullrank.funnel.ranking import RankedItem
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


class SessionEvent(Strict):
    """Something that happened in a session, not long ago."""

    item_id: Id
    labels: dict[str, Number] = Field(default_factory=dict, max_length=100)
    seconds_ago: int = Field(default=1, ge=1, le=2**40)


class Seen(Strict):
    """Leave out items that the user has events with.

    Attributes:
        types: labels that are 1 in the event, or `impression` for any event; default any.
        seconds: how far back; default as far as is known.
        max: items, the latest first.
    """

    types: list[str] | None = Field(default=None, min_length=1, max_length=100)
    seconds: int | None = Field(default=None, gt=0)
    max: int = Field(default=1000, ge=1, le=1000)


# From the first to the second, both included; null is no bound.
Bounds = Annotated[list[Number | None], Field(min_length=2, max_length=2)]


class Filter(Strict):
    """Conditions on the items' columns, all of which have to hold; see `ItemFilter`."""

    any: dict[str, list[Scalar]] = Field(default_factory=dict, max_length=100)
    all: dict[str, list[Scalar]] = Field(default_factory=dict, max_length=100)
    none: dict[str, list[Scalar]] = Field(default_factory=dict, max_length=100)
    range: dict[str, Bounds] = Field(default_factory=dict, max_length=100)


class RecommendRequest(Asker):
    """Ask for the best `k` items.

    Attributes:
        exclude_ids: items that are not recommended: one's own, or what is on the screen already.
        exclude_seen: likewise, items that the user has events with.
        filter: what recommended items have to be.
        session: what somebody did who is not known, or did only now, oldest first; it comes after what is known.
        shown: impressions that frequency caps count, beside those that the server knows.
        deadline_ms: milliseconds after which no more work is begun, waiting for a worker counted; the answer then has
            what the stages have come to.
        explain: tell what each stage thought of each candidate.
        experiment: an arm to be answered by, `none` for the control; neither is counted.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"user_id": 7, "k": 5}, {"k": 5, "filter": {"any": {"category": [3]}}}]},
    )

    k: int = Field(default=10, ge=1, le=2**31 - 1)
    exclude_ids: list[Id] = Field(default_factory=list, max_length=10_000)
    exclude_seen: Seen | None = None
    filter: Filter | None = None
    session: list[SessionEvent] = Field(default_factory=list, max_length=1000)
    shown: list[Impression] = Field(default_factory=list, max_length=10_000)
    deadline_ms: Number | None = Field(default=None, gt=0)
    explain: bool = False
    experiment: str | None = Field(default=None, max_length=100)


class ScoreRequest(Asker):
    """Ask for predictions: of named items for someone who asks, or of whole rows.

    Attributes:
        item_ids: items of the catalogue, or new ones.
        rows: instead of all else: raw values of user, item and context features by column name, as in the log. What
            is left out is missing.
        experiment: an arm to be answered by, or `none` for the control; default the user's arm, for rows the control.
    """

    item_ids: list[Id] | None = Field(default=None, min_length=1, max_length=10_000)
    rows: list[dict[str, Scalar | list[Scalar]]] | None = Field(default=None, min_length=1, max_length=10_000)
    experiment: str | None = Field(default=None, max_length=100)

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


class ExplainedItem(Strict):
    """A candidate on its way through the stages.

    Attributes:
        values: by stage: the score of retrieval, then values. Every stage is asked about every candidate.
        ranks: by stage, among what it was handed.
        predictions: by stage after retrieval, by task.
        fell_out: the stage that dropped it; null for what the stages would put into the list.
        reason: why, in words.
    """

    item_id: Id
    values: dict[str, float | None]
    ranks: dict[str, int]
    predictions: dict[str, dict[str, float | None]]
    fell_out: str | None
    reason: str | None


class RecommendResponse(Strict):
    """A ranked list.

    Attributes:
        items: best first. One that a late final stage did not come to has a null value and no predictions, and stands
            behind the others.
        candidates: how many each stage was handed.
        degraded: stages that were late or failed; `store` if what the user did could not be read.
        request_id: as in the header; feedback on the list names it as `impression_id`.
        model_version: of the bundle.
        index_version: number of changes to its items since it was opened.
        arm: of the experiment; null if there is none, or the request takes no part.
        timings: milliseconds of each stage.
        explained: where it was asked for.
    """

    items: list[RecommendedItem]
    candidates: dict[str, int]
    degraded: list[str]
    request_id: str
    model_version: str
    index_version: int
    arm: str | None
    timings: dict[str, float]
    explained: list[ExplainedItem] | None = None


class ScoreResponse(Strict):
    """Attributes:
    items: or rows, in the order of the request.
    degraded: `store` if what the user did could not be read.
    model_version: of the bundle.
    arm: of the experiment; null if there is none, or the request takes no part.
    """

    items: list[Item]
    degraded: list[str]
    model_version: str
    arm: str | None


class Problem(Strict):
    """Why a request was not served.

    Attributes:
        detail: one line.
        request_id: as in the header `X-Request-Id` of the answer, and in the server's log.
    """

    detail: str
    request_id: str


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


def explained_json(item: Explained) -> dict[str, Any]:
    """An `ExplainedItem`, as JSON has it."""

    def finite(number: float | None) -> float | None:
        return number if number is not None and math.isfinite(number) else None

    return {
        **vars(item),
        "predictions": {
            stage: {task: finite(number) for task, number in tasks.items()} for stage, tasks in item.predictions.items()
        },
    }


def encoded(value: Any) -> bytes:
    """Compact JSON."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def answer(content: bytes, status: int = 200) -> Response:
    """Encoded JSON as it is: FastAPI would first validate every item of it again."""
    return Response(content, status_code=status, media_type="application/json")


def problem_answer(request_id: str, status: int, detail: str) -> Response:
    """A `Problem` as an answer."""
    response = answer(encoded({"detail": detail, "request_id": request_id}), status)
    if status == 503:
        # It has to do with this moment, or with this process.
        response.headers["Retry-After"] = "1"
    return response
