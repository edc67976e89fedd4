"""TCP connections that cost little when nobody finishes a sentence: time limits and a bound on their number."""

from __future__ import annotations

import asyncio
import resource
import socket
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

# Files that the process may need beside its connections: the bundle, libraries, the log, event loop.
RESERVED_FILES = 64
MOST_CONNECTIONS = 4096

_TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class Listener(socket.socket):
    """A listening socket that hangs up on whoever comes while as many connections are open as there is room for.

    Without a bound, clients that keep connections open take all files that the process may open, and `accept` itself
    fails, over and over.

    Args:
        in_turn: whether other processes accept from the same socket: after each connection it is another's turn.
    """

    def __init__(self, *, fileno: int, in_turn: bool = False) -> None:
        super().__init__(fileno=fileno)
        self._in_turn, self._had_turn = in_turn, False
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        free = files - RESERVED_FILES if files >= 0 else MOST_CONNECTIONS
        self.most = max(1, min(MOST_CONNECTIONS, free))
        self.open = 0

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection for which there is room.

        Raises:
            BlockingIOError: if nobody else waits, or another process shall have its turn.
        """
        if self._in_turn:
            self._had_turn = not self._had_turn
            if not self._had_turn:
                raise BlockingIOError
        while True:
            connection, address = super().accept()
            if self.open < self.most:
                self.open += 1
                return connection, address
            with connection, suppress(OSError):
                connection.setblocking(False)
                connection.send(_FULL)


def protocol(listener: Listener, *, header_seconds: float, write_seconds: float) -> type[asyncio.Protocol]:
    """The protocol class of connections of a listener, for uvicorn's `http`.

    Args:
        header_seconds: for the line and the headers of a request, from its first byte, or from the start of the
            connection.
        write_seconds: that a client may leave an answer unread while more is to be sent.
    """

    class Connection(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _write: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)  # type: ignore[arg-type]
            self._head = self.loop.call_later(header_seconds, self._too_slow)

        def data_received(self, data: bytes) -> None:
            if self._head is None and self._waits():
                self._head = self.loop.call_later(header_seconds, self._too_slow)
            super().data_received(data)
            if self._head is not None and not self._waits():
                self._head.cancel()
                self._head = None

        def connection_lost(self, exc: Exception | None) -> None:
            listener.open -= 1
            for timer in (self._head, self._write):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write = self.loop.call_later(write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._write is not None:
                self._write.cancel()
                self._write = None

        def _waits(self) -> bool:
            """Whether the next thing to come is the head of a request."""
            return self.cycle is None or self.cycle.response_complete

        def _too_slow(self) -> None:
            self._head = None
            if not self.transport.is_closing():
                self.transport.write(_TIMED_OUT)
                self.transport.close()

    return Connection
