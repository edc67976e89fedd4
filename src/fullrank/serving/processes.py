"""Processes that do the same work, and the one that starts, watches, replaces and ends them."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from prometheus_client import Counter

from fullrank.serving.shared import Shared

# Seconds after which a process that ends was no failure to start; pauses before those that fail are started again.
STEADY, PAUSES = 10.0, (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
_WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


@dataclass
class _Process:
    begun: float
    is_ready: bool = False


class Processes:
    """A number of forks of this process. It must not have begun to compute: threads of others do not survive a fork.

    The first has to be ready before the others are started. One that ends is replaced, at once if it had run for a
    while, else after a pause that grows.

    Args:
        count: of processes.
        work: of each, ended by SIGTERM. It is given what it calls once it is ready, and returns an exit code.
        listening: what they accept connections from; closed once they are to end.
        ready: called once all are.
        grace: seconds that a process has to end after SIGTERM, before it is killed.
        shared: what they have in common.
    """

    def __init__(
        self,
        count: int,
        work: Callable[[Callable[[], None]], int],
        listening: socket.socket,
        ready: Callable[[], None],
        *,
        grace: float,
        shared: Shared,
    ) -> None:
        self.count, self._work, self._listening, self._ready = count, work, listening, ready
        self._grace, self._shared = grace, shared
        self._running: dict[int, _Process] = {}
        self._failures, self._next_start = 0, 0.0
        self._was_ready = False
        self._kill_at: float | None = None
        self._code = 0
        self._replaced = Counter(
            "fullrank_processes_replaced",
            "Processes that ended unasked, for each of which another began.",
            registry=None,
        )

    def run(self) -> int:
        """Run until a signal ends it, SIGTERM or SIGINT, or the first process fails to start; the exit code."""
        # PyTorch imports another 60 MB to open a bundle; here they are shared.
        torch.zeros(1, device="meta").mul(1.0)
        # What is there already is not looked through for garbage by the forks: pages that are not touched stay shared.
        gc.collect()
        gc.freeze()
        signals, signalled = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._told, self._tell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # Its other end closes with this process, however that ends.
        self._lifeline, self._held = os.pipe2(os.O_CLOEXEC)
        before = {number: signal.signal(number, lambda *_: None) for number in _WATCHED}
        signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
        try:
            while self._kill_at is None or self._running:
                self._start()
                select.select([signals, self._told], [], [], self._pause())
                with suppress(BlockingIOError):
                    for number in os.read(signals, 4096):
                        self._signalled(number)
                self._hear()
                self._bury()
                if self._kill_at is not None and time.monotonic() > self._kill_at:
                    self._send(signal.SIGKILL)
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            for end in (signals, signalled, self._told, self._tell, self._lifeline, self._held):
                os.close(end)
        return self._code

    def _start(self) -> None:
        wanted = self.count if self._was_ready or any(each.is_ready for each in self._running.values()) else 1
        while self._kill_at is None and len(self._running) < wanted and time.monotonic() >= self._next_start:
            sys.stdout.flush()
            sys.stderr.flush()
            # A signal that came between would be taken for one to this process.
            signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of libraries whose threads have not been started yet
                process = os.fork()
            if not process:
                self._become()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
            self._running[process] = _Process(time.monotonic())

    def _become(self) -> None:
        """What the fork does; it does not return."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in _WATCHED:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
            os.close(self._held)
            threading.Thread(target=self._end_with_parent, name="lifeline", daemon=True).start()
            code = self._work(self._tell_ready)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _tell_ready(self) -> None:
        os.write(self._tell, os.getpid().to_bytes(8, "big"))

    def _end_with_parent(self) -> None:
        os.read(self._lifeline, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    def _pause(self) -> float | None:
        """Seconds until there is something to do that nobody tells of."""
        if self._kill_at is not None:
            return max(0.0, self._kill_at - time.monotonic()) + 0.01
        missing = len(self._running) < (self.count if self._was_ready else 1)
        return max(0.0, self._next_start - time.monotonic()) if missing else None

    def _signalled(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self._end(0 if number == signal.SIGTERM else 130)
        elif number == signal.SIGHUP:
            # The others follow.
            ready = next((process for process, each in self._running.items() if each.is_ready), None)
            if ready is not None:
                os.kill(ready, signal.SIGHUP)

    def _hear(self) -> None:
        with suppress(BlockingIOError):
            told = os.read(self._told, 8 * 512)
            for place in range(0, len(told), 8):
                process = self._running.get(int.from_bytes(told[place : place + 8], "big"))
                if process is not None:
                    process.is_ready = True
        if not self._was_ready and sum(each.is_ready for each in self._running.values()) == self.count:
            self._was_ready = True
            self._ready()

    def _bury(self) -> None:
        for process in list(self._running):
            ended, status = os.waitpid(process, os.WNOHANG)
            if not ended:
                continue
            self._hear()
            each = self._running.pop(process)
            self._shared.forget(process)
            if self._kill_at is not None:
                continue
            if not self._was_ready:
                self._end(max(1, os.waitstatus_to_exitcode(status)))
                continue
            self._replaced.inc()
            lived = time.monotonic() - each.begun
            self._failures = 0 if lived > STEADY else self._failures + 1
            self._next_start = time.monotonic() + PAUSES[min(max(0, self._failures - 1), len(PAUSES) - 1)]
            code = os.waitstatus_to_exitcode(status)
            how = f"signal {-code}" if code < 0 else f"code {code}"
            print(f"fullrank: process {process} ended by {how}; another begins", file=sys.stderr, flush=True)

    def _end(self, code: int) -> None:
        if self._kill_at is None:
            self._kill_at, self._code = time.monotonic() + self._grace, code
            self._listening.close()
            self._send(signal.SIGTERM)

    def _send(self, number: int) -> None:
        for process in self._running:
            with suppress(ProcessLookupError):
                os.kill(process, number)
