"""Point-in-time lookups of coded embeddings: ours, and as-of joins written in polars and in DuckDB.

    python -m benchmarks.transfer.lookups --duckdb PYTHON

Ten million events of 100,000 keys over 30 days, codes of 32 numbers in 4 bits, an hour between an event and the time at
which it can be read; a million queries at random times of the last ten days. Polars' `join_asof` gives the last event
of a query, which is what a feature store joins; DuckDB the last 50 as lists, in a lateral join, of a tenth of the
queries. PYTHON is that of a virtual environment with DuckDB, which fullrank's own need not have.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.machine import table, write
from fullrank.transfer.embedding_log import DAY, SECOND, EmbeddingLog

KEYS, DAYS, LENGTH, DIM, LATE = 100_000, 30, 50, 32, 3600 * SECOND
START = 1_750_000_000 * SECOND // DAY * DAY
AT_ONCE = 100_000

# What DuckDB is asked: of each query the last events that had arrived, as one list.
LISTS = """
SELECT q.n, list(l.code), list(l.event_time) FROM read_parquet('{queries}') q, LATERAL (
  SELECT code, event_time FROM events e
  WHERE e.key = q.key AND e.event_time < q.as_of AND e.available_at <= q.as_of
  ORDER BY event_time DESC, event_id DESC LIMIT {length}) l GROUP BY q.n
"""
DUCKDB = """
import duckdb, json, resource, sys, time
events, sql = sys.argv[1:]
connection = duckdb.connect()
connection.execute("SET threads TO 1; SET enable_progress_bar = false")
began = time.process_time()
connection.execute(f"CREATE VIEW events AS SELECT * FROM read_parquet('{events}', hive_partitioning=false)")
rows = len(connection.execute(sql).fetchall())
print(json.dumps({"rows": rows, "cpu_seconds": time.process_time() - began,
                  "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
"""


def events_of(day: int, rows: int, rng: np.random.Generator) -> tuple[np.ndarray[Any, Any], ...]:
    times = START + day * DAY + np.sort(rng.integers(0, DAY, rows))
    return rng.integers(0, KEYS, rows), day * rows + np.arange(rows), times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--queries", type=int, default=1_000_000)
    parser.add_argument("--duckdb", metavar="PYTHON", help="python of an environment with duckdb")
    asked = parser.parse_args()
    rng, per_day = np.random.default_rng(0), asked.events // DAYS
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        log = EmbeddingLog(place / "log", DIM)
        began, wall = time.process_time(), time.perf_counter()
        for day in range(DAYS):
            keys, events, times = events_of(day, per_day, rng)
            codes = rng.integers(0, 256, (per_day, DIM // 2), dtype=np.uint8)
            log.append(keys, events, times, codes, times + LATE, "v1", START)
        append = {"cpu_seconds": time.process_time() - began, "seconds": time.perf_counter() - wall}
        bytes_per_event = log.nbytes / len(log)
        keys = rng.integers(0, KEYS, asked.queries)
        as_of = START + 20 * DAY + rng.integers(0, 10 * DAY, asked.queries)
        log = EmbeddingLog(place / "log")
        began, wall, found, last = time.process_time(), time.perf_counter(), 0, []
        first_call = 0.0
        for begin in range(0, asked.queries, AT_ONCE):
            part = slice(begin, begin + AT_ONCE)
            sequence = log.lookup(keys[part], as_of[part], LENGTH, "30d", fm_version="v1")
            found += len(sequence.codes)
            ends = sequence.offsets[1:] - 1
            last.append(np.where(sequence.lengths > 0, sequence.event_ids[np.maximum(ends, 0)], -1))
            first_call = first_call or time.process_time() - began
        cpu, peak = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        seconds = time.perf_counter() - wall
        rows.append(
            {"what": f"fullrank, the last {LENGTH} of each", "queries": asked.queries, "cpu_seconds": cpu,
             "queries_per_cpu_second": asked.queries / cpu, "peak_gib": peak}
        )  # fmt: skip
        began = time.process_time()
        columns = ("key", "event_id", "event_time", "available_at", "code")
        stored = pl.scan_parquet(place / "log" / "**" / "*.parquet").select(columns).collect()
        left = pl.DataFrame({"n": np.arange(asked.queries), "key": keys, "as_of": as_of})
        left = left.with_columns(pl.col("as_of").cast(pl.Datetime("us", "UTC")))
        # With availability an hour after each event, the last that had arrived is the last by that time.
        last_one = {"left_on": "as_of", "right_on": "available_at", "by": "key", "check_sortedness": False}
        joined = left.sort("as_of").join_asof(stored.sort("available_at"), **last_one).sort("n")
        cpu = time.process_time() - began
        agrees = float((joined["event_id"].fill_null(-1).to_numpy() == np.concatenate(last)).mean())
        rows.append(
            {"what": "polars join_asof, the last one", "queries": asked.queries, "cpu_seconds": cpu,
             "queries_per_cpu_second": asked.queries / cpu}
        )  # fmt: skip
        if asked.duckdb:
            few = asked.queries // 10
            left[:few].write_parquet(place / "queries.parquet")
            sql = LISTS.format(queries=place / "queries.parquet", length=LENGTH)
            command = [asked.duckdb, "-c", DUCKDB, str(place / "log" / "**" / "*.parquet"), sql]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
            if done.returncode:
                print(done.stderr[-2000:], file=sys.stderr)
            else:
                said = json.loads(done.stdout)
                rows.append(
                    {"what": f"DuckDB lateral join, the last {LENGTH} of each", "queries": few,
                     "cpu_seconds": said["cpu_seconds"], "queries_per_cpu_second": few / said["cpu_seconds"],
                     "peak_gib": said["peak_gib"]}
                )  # fmt: skip
    table(rows, ["what", "queries", "cpu_seconds", "queries_per_cpu_second", "peak_gib"])
    print(f"append {append}, {bytes_per_event:.1f} bytes an event, {found:,} events found in {seconds:.1f} s, "
          f"first call {first_call:.1f} s, the last event agrees with polars in {agrees:.4%}")  # fmt: skip
    write(
        "transfer_lookups",
        {"events": len(log), "found": found, "append": append, "bytes_per_event": bytes_per_event, "rows": rows,
         "seconds": seconds, "first_call_cpu_seconds": first_call, "last_event_agrees_with_polars": agrees},
    )  # fmt: skip


if __name__ == "__main__":
    main()
