"""The last state of each item that was changed while it was served, in a Redis that several hosts share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from fullrank.funnel.item_changes import ItemState
from fullrank.serving.redis_server import PREFIX, Server

# An item's state with its number before it, and the items by the number of their state.
_STATES, _NUMBERS = f"{PREFIX}items", f"{PREFIX}items_by_number"
# Others may change items at the same time; then it is tried again.
TRIES = 100


class RedisItemStore:
    """What `ItemStore` does, for servers of several hosts.

    Args:
        url: see `Server`.

    Raises:
        ValueError: see `Server`.
    """

    def __init__(self, url: str) -> None:
        self._server = Server(url)

    def change(self, names: Iterable[str], of: Callable[[Mapping[str, ItemState]], Mapping[str, ItemState]]) -> int:
        """Replace states by what `of` makes of the present ones, at once.

        Returns:
            the number of the last state there is.

        Raises:
            OSError: if Redis does not answer.
        """
        wanted = list(names)
        for _ in range(TRIES):
            last = self._server.write(lambda: self._changed(wanted, of))
            if last is not None:
                return last
        raise OSError(f"{self._server.place}: items are changed by others all the time")

    def since(self, number: int) -> tuple[int, dict[str, ItemState]]:
        """States that came after the one of a number, in their order, and the number of the last.

        Raises:
            OSError: if Redis does not answer.
        """
        found = self._server.write(
            lambda: self._server.writes.zrangebyscore(_NUMBERS, f"({number}", "+inf", withscores=True)
        )
        last = int(found[-1][1]) if found else number
        return last, self.of(name for name, _ in found)

    def of(self, names: Iterable[str]) -> dict[str, ItemState]:
        """The states of some items, of those that have one.

        Raises:
            OSError: if Redis does not answer.
        """
        wanted = list(names)
        texts = self._server.write(lambda: self._server.writes.hmget(_STATES, wanted)) if wanted else []
        return _states(wanted, texts)

    def close(self) -> None:
        self._server.close()

    def _changed(
        self, names: list[str], of: Callable[[Mapping[str, ItemState]], Mapping[str, ItemState]]
    ) -> int | None:
        """The last number; None if another one wrote meanwhile, and nothing was."""
        from redis import WatchError

        with self._server.writes.pipeline() as pipe:
            try:
                pipe.watch(_NUMBERS)
                newest = pipe.zrange(_NUMBERS, -1, -1, withscores=True)
                last = int(newest[0][1]) if newest else 0
                changed = of(_states(names, pipe.hmget(_STATES, names)))
                pipe.multi()
                for name, state in changed.items():
                    last += 1
                    pipe.hset(_STATES, name, state.model_dump_json())
                    pipe.zadd(_NUMBERS, {name: last})
                pipe.execute()
            except WatchError:
                return None
        return last


def _states(names: Iterable[str], texts: Iterable[str | None]) -> dict[str, ItemState]:
    found = zip(names, texts, strict=True)
    return {name: ItemState.model_validate_json(text) for name, text in found if text is not None}
