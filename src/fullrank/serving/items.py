"""Items that come, change and go while they are served: `/v1/items`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import fastapi
from fastapi import FastAPI, Response
from pydantic import Field

from fullrank.funnel.funnel import Funnel
from fullrank.funnel.item_changes import ItemEncoder, ItemState
from fullrank.serving.bodies import Id, Number, Scalar, Strict, answer, encoded
from fullrank.serving.errors import NoCatalogue, NoItem, refusals
from fullrank.serving.live import Live

# What may be in a batch.
MOST_ITEMS = 1000
LARGEST_BID = 3e38
# Seconds in which other processes should have applied a change.
PATIENCE = 5.0

Features = Annotated[dict[str, Scalar | list[Scalar]], Field(max_length=1000)]


class ItemBody(Strict):
    """An item as it is from now on, whether it was there or not.

    Attributes:
        item_id: as in the log.
        features: raw values by column name; what is left out is missing.
        bid: where the items of the bundle have bids.
        hidden: it is there to be scored, and never recommended.
        expires_at: seconds since 1970 from which it is hidden.
    """

    item_id: Id
    features: Features = Field(default_factory=dict)
    bid: Number | None = None
    hidden: bool = False
    expires_at: Number | None = None


class ItemPatch(Strict):
    """What changes of an item; the rest stays as it is, also of the features."""

    features: Features = Field(default_factory=dict)
    bid: Number = 0.0
    hidden: bool = False
    expires_at: Number | None = None


class ItemsRequest(Strict):
    """Items in any order; good ones are taken though others are wrong."""

    items: list[ItemBody] = Field(min_length=1, max_length=MOST_ITEMS)


class ItemStatus(Strict):
    """What became of an item: 201 it is new, 200 it was there, 422 refused, with the reason."""

    item_id: Id
    status: int
    detail: str | None = None


class ItemsResponse(Strict):
    """One status for each item, in their order."""

    items: list[ItemStatus]


def add_items(
    app: FastAPI,
    live: Live,
    others: Sequence[Live] = (),
    everywhere: Callable[[int], bool] | None = None,
) -> None:
    """Routes that change what may be recommended. An answer comes when the next request sees the change.

    Args:
        live: whose items are meant; it decides what they may be.
        others: bundles that are served beside it, with the same store of items.
        everywhere: whether other processes have applied the states up to a number, which is waited for, though not for
            long.
    """

    def ready() -> tuple[Funnel, ItemEncoder]:
        content, encoder = live.served.content, live.encoder
        if not isinstance(content, Funnel) or encoder is None:
            raise NoCatalogue
        return content, encoder

    def is_there(funnel: Funnel, name: str, state: ItemState | None) -> bool:
        return funnel.items.row(name) is not None if state is None else not state.removed

    async def changed(names: list[str], of: Callable[[Mapping[str, ItemState]], Mapping[str, ItemState]]) -> None:
        number = await asyncio.get_running_loop().run_in_executor(None, live.store.change, names, of)
        await asyncio.gather(*(asyncio.wrap_future(each.applied(number)) for each in (live, *others)))
        end = time.monotonic() + PATIENCE
        while everywhere is not None and not everywhere(number) and time.monotonic() < end:
            await asyncio.sleep(0.01)

    @app.post(
        "/v1/items",
        response_model=ItemsResponse,
        tags=["items"],
        status_code=201,
        responses={
            207: {"model": ItemsResponse, "description": "Some items were refused; the others are there."},
            **refusals(400, 404, 408, 413, 415, 422, 500, 503),
        },
    )
    async def add(body: ItemsRequest, asked: fastapi.Request) -> Response:
        """Add items, or replace them. Once this is answered they can be found."""
        funnel, encoder = ready()
        asked.state.said = {"items": len(body.items)}
        faults = await asyncio.get_running_loop().run_in_executor(None, _faults, body.items, encoder)
        good = {
            str(item.item_id): _state(item) for item, fault in zip(body.items, faults, strict=True) if fault is None
        }
        known: dict[str, bool] = {}

        def replaced(states: Mapping[str, ItemState]) -> Mapping[str, ItemState]:
            known.update((name, is_there(funnel, name, states.get(name))) for name in good)
            return good

        if good:
            await changed(list(good), replaced)
        results = [
            {
                "item_id": item.item_id,
                "status": 422 if fault else 200 if known[str(item.item_id)] else 201,
                "detail": fault,
            }
            for item, fault in zip(body.items, faults, strict=True)
        ]
        return answer(encoded({"items": results}), 207 if any(faults) else 201)

    @app.patch(
        "/v1/items/{item_id:path}",
        response_model=ItemStatus,
        tags=["items"],
        responses=refusals(400, 404, 408, 413, 415, 422, 500, 503),
    )
    async def patch(item_id: str, body: ItemPatch) -> Response:
        """Change some of what is known of an item."""
        funnel, encoder = ready()
        given = body.model_dump(include=set(body.model_fields_set))
        if "bid" in given and (fault := _bid_fault(body.bid)):
            raise ValueError(fault)
        encoder.check(item_id, ItemState(features=body.features, whole=False, bid=given.get("bid")))

        def patched(states: Mapping[str, ItemState]) -> Mapping[str, ItemState]:
            if not is_there(funnel, item_id, states.get(item_id)):
                raise NoItem
            return {item_id: states.get(item_id, ItemState(whole=False)).patched(given)}

        await changed([item_id], patched)
        return answer(encoded({"item_id": item_id, "status": 200, "detail": None}))

    @app.delete(
        "/v1/items/{item_id:path}",
        response_model=ItemStatus,
        tags=["items"],
        responses=refusals(404, 422, 500, 503),
    )
    async def remove(item_id: str) -> Response:
        """Forget an item: once this is answered it is not recommended any more."""
        funnel, _ = ready()

        def removed(states: Mapping[str, ItemState]) -> Mapping[str, ItemState]:
            if not is_there(funnel, item_id, states.get(item_id)):
                raise NoItem
            return {item_id: ItemState(removed=True)}

        await changed([item_id], removed)
        return answer(encoded({"item_id": item_id, "status": 200, "detail": None}))


def _faults(items: list[ItemBody], encoder: ItemEncoder) -> list[str | None]:
    """What is wrong with each item."""
    faults: list[str | None] = []
    seen: set[str] = set()
    for item in items:
        name = str(item.item_id)
        fault = None if item.bid is None else _bid_fault(item.bid)
        if "\0" in name or not 0 < len(name) <= 1000:
            fault = "item_id: expected 1 to 1000 characters, none of them NUL"
        elif name in seen:
            fault = "item_id: is in this request already"
        faults.append(fault)
        seen.add(name)
    named = [(str(item.item_id), item, fault) for item, fault in zip(items, faults, strict=True)]
    found = encoder.faults({name: _state(item) for name, item, fault in named if fault is None})
    return [fault or found.get(name) for name, _, fault in named]


def _state(item: ItemBody) -> ItemState:
    return ItemState(**item.model_dump(exclude={"item_id"}))


def _bid_fault(bid: float) -> str | None:
    return None if 0 <= bid <= LARGEST_BID else f"bid is {bid:g}, expected a number from 0 to {LARGEST_BID:g}"
