"""A few requests and their answers, kept in a bundle: who opens it can see that it still answers as it did."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from fullrank.funnel.funnel import Funnel
from fullrank.funnel.requests import Request
from fullrank.funnel.scorer import ScoredItem, Scorer
from fullrank.funnel.stages import FINAL
from fullrank.schema import describe_errors

CANARY = "canary.json"
USERS, ITEMS = 8, 10
# What a probability or a value may differ by, absolutely or in proportion: processors round differently.
DISTANCE = 0.01


class Answer(BaseModel):
    """A request and the list that it got.

    Attributes:
        user_id: None for someone who says nothing of themselves.
        items: ids, best first.
        predictions: of each item, by task.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    user_id: int | str | None
    items: list[int | str]
    predictions: list[dict[str, float]]


class Canary(BaseModel):
    """What `canary.json` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    answers: list[Answer]

    @classmethod
    def read(cls, path: Path) -> Canary:
        """Raises:
        ValueError: if the file is not one.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ValueError(describe_errors(error, str(path)).splitlines()[0]) from None


def canary_text(funnel: Funnel) -> str:
    """`canary.json` of a funnel: a stranger, and users from all over its catalogue."""
    requests = _requests(funnel)
    found = funnel.recommend(requests, ITEMS)
    answers = [
        Answer(
            user_id=request.user_id,
            items=[item.item_id for item in each.items if item.item_id is not None],
            predictions=[item.predictions for item in each.items],
        )
        for request, each in zip(requests, found, strict=True)
    ]
    if any(_fault(each.items) for each in found):
        answers = []  # No good example; and JSON has no NaN.
    return json.dumps(Canary(answers=answers).model_dump(mode="json"), allow_nan=False) + "\n"


def check_answers(content: Funnel | Scorer, bundle: Path | None = None) -> None:
    """Ask for a few answers: they have to be there and be numbers, and be those that the bundle was saved with.

    Raises:
        ValueError: if one is not.
    """
    name = "the bundle" if bundle is None else str(bundle)
    if isinstance(content, Scorer):
        bid = content.schema.keys.bid
        if fault := _fault(content.score([{} if bid is None else {bid: 1.0}])):
            raise ValueError(f"{name} cannot be served: for a row without any feature {fault}")
        return
    requests = _requests(content)
    found = content.recommend(requests, ITEMS)
    for request, each in zip(requests, found, strict=True):
        fault = _fault(each.items)
        if not each.items and each.candidates[FINAL]:
            fault = "no prediction gives a value that is a number"
        if fault:
            raise ValueError(f"{name} cannot be served: for {_who(request.user_id)} {fault}")
    if not any(each.items for each in found):
        raise ValueError(
            f"{name} cannot be served: retrieval finds nothing, neither for users that it knows nor others"
        )
    if bundle is None or not (bundle / CANARY).is_file():
        return
    for answer in Canary.read(bundle / CANARY).answers:
        scored = content.score(Request(answer.user_id), answer.items)
        for item, predictions in zip(scored, answer.predictions, strict=False):
            for task, number in predictions.items():
                now = item.predictions.get(task, math.nan)
                if not abs(now - number) <= DISTANCE * max(1.0, abs(number)):
                    raise ValueError(
                        f"{name} cannot be served: for {_who(answer.user_id)} it predicts a {task} of {now:.4g} for "
                        f"item {item.item_id}, and predicted {number:.4g} when it was saved"
                    )


def _requests(funnel: Funnel) -> list[Request]:
    users = funnel.users
    if users is None:
        return [Request()]
    rows = torch.arange(0, len(users), max(1, len(users) // USERS))[:USERS]
    return [Request(), *(Request(user) for user in users.ids_of(rows))]


def _fault(items: Sequence[ScoredItem]) -> str | None:
    """What is wrong with the items of an answer."""
    for item in items:
        for task, number in item.predictions.items():
            if not math.isfinite(number):
                return f"the predicted {task} is {number}"
        if item.value is None:
            return "the value formula gives no number"
    return None


def _who(user: int | str | None) -> str:
    return "someone unknown" if user is None else f"user {user}"
