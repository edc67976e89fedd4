"""Wall seconds, CPU seconds and memory of a program together with every process that it starts.

The tree is read from `/proc` twenty times a second. CPU seconds are the user and system time of each process when it
was last seen, summed over all processes ever seen. The program itself, and processes that it leaves behind, are read
once more between their end and their burial, so only a short-lived child can lose up to a twentieth of a second.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import tempfile
import time
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path

INTERVAL_S = 0.05
# Reading a process's proportional memory walks its page tables, so it is read less often than its clocks.
MEMORY_INTERVAL_S = 0.25
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Usage:
    """What a program took.

    Attributes:
        wall_s: from its start to its end.
        cpu_s: of all processes.
        peak_mib_largest: highest resident memory that one process had at one time.
        peak_mib_all: highest sum of the proportional memory (PSS: shared pages count once) of all processes.
        processes: how many there were.
        output: standard output.
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_mib_largest: float = 0.0
    peak_mib_all: float = 0.0
    processes: int = 0
    output: str = ""
    _times: list[float] = field(default_factory=list, repr=False)
    _cpu: list[float] = field(default_factory=list, repr=False)

    def cpu_until(self, moment: float) -> float:
        """CPU seconds that all processes together had taken at a time of `time.monotonic()`, any process's."""
        place = bisect_right(self._times, moment)
        return self._cpu[min(place, len(self._cpu) - 1)]


def run(command: list[str], environment: dict[str, str] | None = None) -> Usage:
    """Run a program to its end.

    Raises:
        RuntimeError: if it fails; the message has the end of what it wrote on standard error.
    """
    # Daemons whose parent ends become children of this process instead of getting out of sight.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    usage, seen = Usage(), {}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        began = time.monotonic()
        program = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        last_memory = 0.0
        while True:
            ended = os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            now = time.monotonic()
            tree = descendants(os.getpid())
            for process in tree:
                seen[process.key] = process.cpu_s
            usage._times.append(now)
            usage._cpu.append(sum(seen.values()))
            if ended is not None:
                break
            if now - last_memory >= MEMORY_INTERVAL_S:
                last_memory = now
                usage.peak_mib_all = max(usage.peak_mib_all, sum(proportional_mib(process.pid) for process in tree))
                usage.peak_mib_largest = max(usage.peak_mib_largest, *(_peak_mib(process.pid) for process in tree), 0.0)
            time.sleep(INTERVAL_S)
        usage.wall_s = now - began
        _, status, own = os.wait4(program.pid, 0)
        program.returncode = os.waitstatus_to_exitcode(status)
        for left in _end_the_rest(os.getpid()):
            seen[left.key] = left.cpu_s
        usage.cpu_s = sum(seen.values())
        usage.peak_mib_largest = max(usage.peak_mib_largest, own.ru_maxrss / 1024)
        usage.peak_mib_all = max(usage.peak_mib_all, usage.peak_mib_largest if len(seen) == 1 else 0.0)
        usage.processes = len(seen)
        output.seek(0)
        errors.seek(0)
        usage.output = output.read()
        if program.returncode:
            raise RuntimeError(f"{' '.join(command)}\nexit code {program.returncode}\n{errors.read()[-3000:]}")
    return usage


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int
    started: int
    cpu_s: float

    @property
    def key(self) -> tuple[int, int]:
        return self.pid, self.started


def _read(pid: int) -> _Process | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return _Process(pid, int(fields[1]), int(fields[19]), (int(fields[11]) + int(fields[12])) / _TICKS_PER_S)


def descendants(root: int) -> list[_Process]:
    """All processes that a process and they have started."""
    children: dict[int, list[_Process]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (process := _read(int(entry))) is not None:
            children.setdefault(process.parent, []).append(process)
    found: list[_Process] = []
    todo = [root]
    while todo:
        mine = children.get(todo.pop(), [])
        found += mine
        todo += [process.pid for process in mine]
    return found


def _end_the_rest(root: int, patience_s: float = 10.0) -> list[_Process]:
    """Let the processes that the program left behind end, by force after a while; their last readings."""
    readings: dict[tuple[int, int], _Process] = {}
    deadline = time.monotonic() + patience_s
    while left := descendants(root):
        readings.update((process.key, process) for process in left)
        for process in left:
            if process.parent == root and os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                os.waitpid(process.pid, 0)
            elif time.monotonic() > deadline:
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(INTERVAL_S)
    return list(readings.values())


def proportional_mib(pid: int) -> float:
    """Its PSS, 0 once it has ended."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    except OSError:  # it has ended since
        pass
    return 0.0


def _peak_mib(pid: int) -> float:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0
