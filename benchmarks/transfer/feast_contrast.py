"""What Feast's historical join knows of late events, and what the last 50 events of a key cost there and here.

    python -m benchmarks.transfer.feast_contrast --feast VENV/bin/python

200,000 events of 2,000 keys in 30 days, codes of 32 numbers in 4 bits. Four fifths can be read a minute after they
happened, the others late, by a day on average; a twentieth is written again, later and with another code; a second
version embeds the last twenty days. Both are asked the same of the last ten days: at random times, and at the times
of events of the key, as training examples are.

Late events: a Parquet file of each version with a row for each writing, `available_at` as the source's
`created_timestamp_column`, and the join with and without `filter_by_created_timestamp`, an argument of
`get_historical_features`. An answer names the row that it is from. What is right is a loop over the log, and ours is
held against it before anything is printed.

The last 50: Feast joins the last *row* of a key, so a pipeline has to write a row whenever an event arrives, with the
50 codes that are known then as one value. Its time is that of the arrival: at the event's own time, a late event would
be in no list of a newer one. Fifty as-of joins, each before what the last one found, would lose what arrived in
between, because Feast holds both times of a row against the same one. The pipeline here is our own lookup, and not
timed. Every list is compared with ours. In turn, the median of `--repeat`, one thread, files read anew each time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import IO, Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import table, write
from fullrank.transfer.embedding_log import DAY, SECOND, EmbeddingLog
from fullrank.transfer.lookup import HistorySequence

PEER = Path(__file__).parents[1] / "peers" / "feast_peer.py"
KEYS, EVENTS, DAYS, LENGTH, DIM = 2_000, 200_000, 30, 50, 32
START = 1_750_000_000 * SECOND // DAY * DAY
CUTOFFS = {"v1": START, "v2": START + 10 * DAY}
MOMENT = pa.timestamp("us", tz="UTC")

Ints = np.ndarray[Any, np.dtype[np.int64]]


class Log(NamedTuple):
    """Rows as they were written, in the order of the events' time."""

    key: Ints
    event_id: Ints
    event_time: Ints
    available_at: Ints
    code: np.ndarray[Any, np.dtype[np.uint8]]

    def take(self, rows: Any) -> Log:
        return Log(*(column[rows] for column in self))


def made(rng: np.random.Generator) -> Log:
    times = START + np.sort(rng.integers(0, DAYS * DAY, EVENTS))
    late = rng.random(EVENTS) < 0.2
    delay = 60 * SECOND + np.where(late, rng.exponential(DAY, EVENTS), 0).astype(np.int64)
    codes = rng.integers(0, 256, (2, EVENTS, DIM // 2), dtype=np.uint8)
    once = Log(rng.integers(0, KEYS, EVENTS), np.arange(EVENTS), times, times + delay, codes[0])
    again = np.flatnonzero(rng.random(EVENTS) < 0.05)
    later = once.available_at + 1 + rng.exponential(DAY, EVENTS).astype(np.int64)
    twice = once._replace(available_at=later, code=codes[1]).take(again)
    both = Log(*(np.concatenate(pair) for pair in zip(once, twice, strict=True)))
    return both.take(np.argsort(both.event_time, kind="stable"))


def stored(path: Path, key: Ints, event_time: Ints, available_at: Ints, **features: pa.Array) -> int:
    """Write a view of Feast, sorted by key and time; the bytes of its file."""
    times = {"event_time": event_time, "available_at": available_at}
    columns = {"key": pa.array(key), **{name: pa.array(each).cast(MOMENT) for name, each in times.items()}, **features}
    order = np.lexsort((available_at, event_time, key))
    pq.write_table(pa.table(columns).take(order), path, compression="zstd", use_dictionary=False)
    return path.stat().st_size


def expected(log: Log, key: Ints, as_of: Ints, limit: int) -> list[Ints]:
    """The definition: rows of the last events before each time that had arrived, as each first arrived."""
    rows_of = [np.flatnonzero(log.key == each) for each in range(KEYS)]
    found = []
    for each, now in zip(key, as_of, strict=True):
        rows = rows_of[each]
        rows = rows[(log.event_time[rows] < now) & (log.available_at[rows] <= now)]
        rows = rows[np.lexsort((log.available_at[rows], log.event_id[rows], log.event_time[rows]))]
        rows = rows[np.unique(log.event_id[rows], return_index=True)[1]]  # ids are in the order of time
        found.append(rows[max(0, len(rows) - limit) :])
    return found


def as_bytes(codes: Any, offsets: Ints) -> pa.Array:
    """The codes of each query as one value."""
    ends = pa.array(offsets * (DIM // 2)).cast(pa.int32())
    return pa.Array.from_buffers(pa.binary(), len(offsets) - 1, [None, ends.buffers()[1], pa.py_buffer(codes)])


class Feast:
    def __init__(self, python: Path, folder: Path) -> None:
        command = [str(python), str(PEER), str(folder)]
        self.folder, pipe = folder, subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        self.versions = self._said()

    def _said(self) -> dict[str, Any]:
        answer: IO[str] | None = self._process.stdout
        line = "" if answer is None else answer.readline()
        if not line:
            raise SystemExit(f"{PEER.name} ended: run it by hand to see why")
        said: dict[str, Any] = json.loads(line)
        return said

    def join(self, view: str, questions: str, known: bool) -> tuple[pl.DataFrame, dict[str, float]]:
        """Rows in the order of the questions, and seconds."""
        assert self._process.stdin is not None
        print(json.dumps({"view": view, "questions": questions, "known": known}), file=self._process.stdin, flush=True)
        took = self._said()
        queries = pl.read_parquet(self.folder / questions, columns=["query"])
        return queries.join(pl.read_parquet(self.folder / "answer.parquet"), on="query", how="left"), took

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def verdict(rows: Ints, log: Log, as_of: Ints, right: Ints) -> dict[str, int]:
    """What a join found, of each query the row of the log or -1, by the row that is right."""
    there = rows >= 0
    leaks = there & (log.available_at[rows] > as_of)
    same = ~leaks & ((rows == right) | (there & (right >= 0) & (log.event_id[rows] == log.event_id[right])))
    last_writing = np.zeros(EVENTS, np.int64)
    last_writing[log.event_id] = np.arange(len(log.key))
    last_writing = last_writing[log.event_id[right]]
    again = same & (last_writing != right) & (log.available_at[last_writing] <= as_of)
    return {
        "queries": len(rows),
        "not yet available": int(leaks.sum()),
        "of it the asking event": int((leaks & (log.event_time[rows] == as_of)).sum()),
        "the right event": int(same.sum()),
        "of it rewritten by then": int(again.sum()),
        "read as first written": int((again & (rows == right)).sum()),
        "another, or none": int((~leaks & ~same).sum()),
    }


def looked_up(place: Path, key: Ints, as_of: Ints, limit: int) -> tuple[HistorySequence, dict[str, float]]:
    cpu, wall = time.process_time(), time.perf_counter()
    found = EmbeddingLog(place).lookup(key, as_of, limit, fm_version="v1")
    return found, {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - wall}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--feast", type=Path, required=True, help="the Python of an environment with Feast")
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--repeat", type=int, default=3)
    asked = parser.parse_args()
    rng, count = np.random.default_rng(0), asked.queries
    log = made(rng)
    with tempfile.TemporaryDirectory() as scratch:
        folder, place = Path(scratch), Path(scratch) / "log"
        (folder / "views").mkdir()
        ours, on_disk = EmbeddingLog(place, DIM), 0
        for version, cutoff in CUTOFFS.items():
            part = np.flatnonzero(log.event_time >= cutoff)
            rows = log.take(part)
            ours.append(rows.key, rows.event_id, rows.event_time, rows.code, rows.available_at, version, cutoff)
            features = {"row": pa.array(part), "code": as_bytes(rows.code, np.arange(len(part) + 1))}
            on_disk += stored(
                folder / "views" / f"{version}.parquet", rows.key, rows.event_time, rows.available_at, **features
            )
        disk = {"fullrank": ours.nbytes / len(ours), "Feast, a row of each writing": on_disk / len(ours)}

        first = log.take(np.sort(np.unique(log.event_id, return_index=True)[1]))
        lists, _ = looked_up(place, first.key, first.available_at, LENGTH)
        features = {"codes": as_bytes(lists.codes, lists.offsets)}
        size = stored(folder / "views" / "lists.parquet", first.key, first.available_at, first.available_at, **features)
        disk[f"Feast, the last {LENGTH} in each row"] = size / len(first.key)

        recent = np.flatnonzero(first.event_time >= START + 20 * DAY)
        examples = np.sort(rng.choice(recent, count, replace=False))
        questions = {
            "at random times": (rng.integers(0, KEYS, count), START + 20 * DAY + rng.integers(0, 10 * DAY, count)),
            "at an event's time": (first.key[examples], first.event_time[examples]),
        }
        for name, (key, as_of) in questions.items():
            frame = pl.DataFrame({"query": np.arange(count), "key": key, "event_timestamp": as_of})
            frame = frame.with_columns(pl.col("event_timestamp").cast(pl.Datetime("us", "UTC")))
            frame.write_parquet(folder / f"{name}.parquet")

        feast = Feast(asked.feast, folder)
        late: list[dict[str, Any]] = []
        for name, (key, as_of) in questions.items():
            right = expected(log, key, as_of, LENGTH)
            found, _ = looked_up(place, key, as_of, LENGTH)
            wanted = np.concatenate(right)
            if not np.array_equal(found.codes, log.code[wanted]) or list(found.lengths) != list(map(len, right)):
                raise SystemExit("a lookup is not what a loop over the log finds")
            last = np.array([rows[-1] if len(rows) else -1 for rows in right])
            late.append({"store": "fullrank", "asked": name, **verdict(last, log, as_of, last)})
            for known in (False, True):
                answer, _ = feast.join("v1", f"{name}.parquet", known)
                rows = answer["row"].cast(pl.Float64).fill_nan(-1).fill_null(-1).cast(pl.Int64).to_numpy()
                store = "Feast, filter_by_created_timestamp" if known else "Feast"
                late.append({"store": store, "asked": name, **verdict(rows, log, as_of, last)})

        name, (key, as_of) = next(iter(questions.items()))
        runs: dict[str, list[dict[str, float]]] = {}
        for _ in range(asked.repeat):
            for limit, view in ((1, "v1"), (LENGTH, "lists")):
                found, took = looked_up(place, key, as_of, limit)
                runs.setdefault(f"fullrank, the last {limit}", []).append(took)
                answer, took = feast.join(view, f"{name}.parquet", known=view == "v1")
                what = "the last row" if limit == 1 else f"the last {limit} as one row"
                runs.setdefault(f"Feast, {what}", []).append(took)
            if answer["codes"].fill_null(b"").to_list() != as_bytes(found.codes, found.offsets).to_pylist():
                raise SystemExit("the lists of the two stores differ")
        feast.close()
    rows = []
    for what, each in runs.items():
        cpu = median(run["cpu_seconds"] for run in each)
        rows.append({"what": what, "queries": count, "cpu_seconds": cpu, "queries_per_cpu_second": count / cpu})
    table(late, list(late[0]))
    table(rows, list(rows[0]))
    table([{"store": store, "bytes an event": each} for store, each in disk.items()], ["store", "bytes an event"])
    write(
        "transfer_feast",
        {**feast.versions, "events": EVENTS, "rows": len(ours), "keys": KEYS, "length": LENGTH,
         "found": len(found.codes), "late": late, "table": rows, "runs": runs, "bytes_per_event": disk},
    )  # fmt: skip


if __name__ == "__main__":
    main()
