"""Where the server keeps what users did and how items changed: files of a directory, or a Redis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from fullrank.data.forgotten import is_url
from fullrank.funnel.item_changes import ItemState
from fullrank.funnel.recent_events import Event
from fullrank.serving.item_store import ItemStore
from fullrank.serving.store import RECENT, Deleted, EventStore, Feedback, Impression


class UserEvents(Protocol):
    """What `EventStore` and `RedisStore` do; each call raises `OSError` if the store cannot be read or written."""

    def append(self, rows: Sequence[Feedback] | Sequence[Impression]) -> Future[list[bool]]: ...
    def recent(self, user: int | str, since: int | None = None, limit: int = RECENT) -> list[Event]: ...
    def deletions(self) -> int: ...
    def after(self, number: int, since: int) -> tuple[int, Iterator[tuple[str, Event]]] | None: ...
    def forget(self, user: int | str) -> Deleted: ...
    def close(self) -> None: ...


class ItemStates(Protocol):
    """What `ItemStore` and `RedisItemStore` do, likewise."""

    def change(self, names: Iterable[str], of: Callable[[Mapping[str, ItemState]], Mapping[str, ItemState]]) -> int: ...
    def since(self, number: int) -> tuple[int, dict[str, ItemState]]: ...
    def of(self, names: Iterable[str]) -> dict[str, ItemState]: ...
    def close(self) -> None: ...


def opened_events(place: Path | str) -> UserEvents:
    """The store of a directory, or of a URL `redis://host:port/database`.

    Raises:
        ValueError: if it cannot be used.
    """
    if not is_url(place):
        return EventStore(Path(place))
    from fullrank.serving.redis_store import RedisStore

    store = RedisStore(str(place))
    store.server.warn_if_forgetful()
    return store


def opened_items(place: Path | str | None) -> ItemStates:
    """Likewise, of items; without a place they are kept in memory.

    Raises:
        ValueError: if it cannot be used.
    """
    if place is None or not is_url(place):
        return ItemStore(None if place is None else Path(place))
    from fullrank.serving.redis_item_store import RedisItemStore

    return RedisItemStore(str(place))
