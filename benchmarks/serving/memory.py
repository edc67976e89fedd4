"""Memory of `fullrank serve --processes N`: 1,000,000 items and as many users with histories of 50.

    python -m benchmarks.serving.memory

The bundle is made, not trained: vocabularies of all items and users, histories of random items with their times, two
towers with exact search, an early stage and a DIN. Each server is asked over eight connections for lists of users drawn
from all of them, so that what it shares is read, and then its processes are read from `/proc`: PSS counts a page that
several share once over all of them. The peak is that of the sum from the start of the server to the end. One process is
`fullrank serve` as it is without the option, with as many threads as two have together; several have one each. Then a
few items are added, one after the other: how long an answer takes, and what the processes take after that.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from benchmarks.process_tree import descendants
from benchmarks.serving.load import FULLRANK

HISTORY, NOW = 50, 1_700_000_000
CONNECTIONS, INTERVAL_S = 8, 0.25
ADDED, SETTLES_S = 5, 2.0


def prepare(bundle: Path, items: int, users: int) -> None:
    """Make the bundle of a funnel of that size."""
    import numpy as np
    import polars as pl
    import torch

    from fullrank.data.importing import import_dataset
    from fullrank.funnel import FunnelConfig, save_bundle
    from fullrank.funnel.catalogue import Catalogue, times_column, usual_context
    from fullrank.funnel.funnel import Funnel
    from fullrank.schema import Categorical, Keys, Label, Numeric, Schema, Sequence

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    bundle.parent.mkdir(parents=True, exist_ok=True)
    schema = Schema(
        features=(
            Categorical(name="user_id", role="user"),
            Categorical(name="item_id", role="item"),
            Categorical(name="category", role="item"),
            Numeric(name="price", role="item", transform="log1p"),
            Categorical(name="hour", role="context"),
            Sequence(name="history", of=("item_id",), where="click", max_length=HISTORY),
        ),
        labels=(Label(name="click"),),
        keys=Keys(user_id="user_id", item_id="item_id", timestamp="time"),
    )
    rows, log = 1000, bundle.parent / "log.csv"
    columns = {
        "user_id": rng.integers(0, 100, rows),
        "item_id": rng.integers(0, 100, rows),
        "category": rng.integers(0, 50, rows),
        "price": rng.lognormal(size=rows).round(2),
        "hour": rng.integers(0, 24, rows),
        "time": np.sort(rng.integers(NOW - 10**6, NOW, rows)),
        "click": rng.integers(0, 2, rows),
    }
    pl.DataFrame(columns).write_csv(log)
    dataset = import_dataset("csv", log, bundle.parent / "data", schema=schema, overwrite=True)
    encoders = dataset.encoders
    for table, count in (("user_id", users), ("item_id", items)):
        names = pl.Series("value", range(count)).cast(pl.String)
        encoders = encoders.with_values(
            table, names.filter(~names.is_in(encoders.vocabularies[table].values.implode()))
        )
    raw = {
        "item_id": range(items),
        "category": rng.integers(0, 50, items),
        "price": rng.lognormal(size=items),
    }
    item_frame = encoders.transform(pl.DataFrame(raw), allow_missing=True)
    item_frame = item_frame.select("__item_id", "item_id", "category", "price")
    user_frame = encoders.transform(pl.DataFrame({"user_id": range(users)}), allow_missing=True)
    times = np.sort(rng.integers(NOW - 10**7, NOW, (users, HISTORY)), axis=1)
    history = {
        "history.item_id": rng.integers(2, items, (users, HISTORY), dtype=np.int32),
        times_column("history"): times,
    }
    user_frame = user_frame.select("__user_id", "user_id").with_columns(
        pl.Series(name, values).arr.to_list() for name, values in history.items()
    )
    config = FunnelConfig()
    items_known = Catalogue.of(item_frame, encoders.schema)
    funnel = Funnel(
        encoders=encoders,
        items=items_known,
        users=Catalogue.of(user_frame, encoders.schema),
        context=usual_context(dataset),
        retriever=config.retrieval.build(encoders.schema),
        early={stage.name: stage.model.build(encoders.schema) for stage in config.early},
        final=config.final.model.build(encoders.schema),
        sizes=config.sizes,
    )
    funnel.index_active()
    save_bundle(funnel, bundle, overwrite=True)


def tree(root: int) -> list[int]:
    """A process and all that it and they have started."""
    return [root, *(process.pid for process in descendants(root))]


def memory(process: int) -> dict[str, float]:
    """PSS in MB, of it what no file is behind, and RSS; nothing of a process that has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {"pss_mb": 0.0, "anonymous_mb": 0.0, "rss_mb": 0.0}
    kb = {line.split()[0].rstrip(":"): int(line.split()[1]) for line in lines}
    return {
        name: kb[key] * 1.024 / 1000
        for name, key in (("pss_mb", "Pss"), ("anonymous_mb", "Pss_Anon"), ("rss_mb", "Rss"))
    }


def ask(port: int, seed: int, requests: int, users: int) -> None:
    """Ask for lists of random users, over one connection that is kept."""
    draw, connection = random.Random(seed), HTTPConnection("127.0.0.1", port)
    for _ in range(requests):
        body = json.dumps({"user_id": draw.randrange(users), "k": 10})
        connection.request("POST", "/v1/recommend", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        said = answer.read()
        if answer.status != 200:
            raise RuntimeError(said.decode())


def add_items(port: int, first: int) -> float:
    """Add items in turn; the median of the seconds until it is answered."""
    taken = []
    for item in range(first, first + ADDED):
        body = json.dumps({"items": [{"item_id": item, "features": {"category": "3", "price": 9.5}}]})
        connection, began = HTTPConnection("127.0.0.1", port), time.monotonic()
        connection.request("POST", "/v1/items", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 201:
            raise RuntimeError(answer.read().decode())
        taken.append(time.monotonic() - began)
    time.sleep(SETTLES_S)
    return statistics.median(taken)


def measure(bundle: Path, processes: int, requests: int, users: int, items: int) -> dict[str, Any]:
    """Start a server, ask it, and read its memory."""
    program = [*FULLRANK, "serve", str(bundle), "--port", "0"]
    options = ["--processes", str(processes), "--workers", "2" if processes == 1 else "1", "--json"]
    began, peak, over = time.monotonic(), 0.0, threading.Event()
    server = subprocess.Popen([*program, *options], stdout=subprocess.PIPE, text=True)

    def watch() -> None:
        nonlocal peak
        while not over.wait(INTERVAL_S):
            peak = max(peak, sum(memory(process)["pss_mb"] for process in tree(server.pid)))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        assert server.stdout is not None
        port = int(json.loads(server.stdout.readline())["url"].rpartition(":")[2])
        ready = time.monotonic() - began
        at_start = sum(memory(process)["pss_mb"] for process in tree(server.pid))
        share = requests // CONNECTIONS
        asking = [threading.Thread(target=ask, args=(port, seed, share, users)) for seed in range(CONNECTIONS)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        each = [memory(process) for process in tree(server.pid)]
        change_s = add_items(port, items)
        changed = sum(memory(process)["pss_mb"] for process in tree(server.pid))
    finally:
        over.set()
        watching.join()
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    totals = {name: sum(one[name] for one in each) for name in each[0]}
    return {
        "processes": processes,
        "ready_s": ready,
        "pss_at_start_mb": at_start,
        **totals,
        "peak_pss_mb": peak,
        "item_change_s": change_s,
        "pss_after_changes_mb": changed,
        "each_pss_mb": [one["pss_mb"] for one in each],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--requests", type=int, default=8000, help="lists that each server is asked for")
    parser.add_argument("--work", type=Path, default=Path("runs/serving_memory"))
    arguments = parser.parse_args()
    from benchmarks.machine import table, write

    bundle = arguments.work / "bundle"
    if not bundle.is_dir():
        print(f"making {arguments.items:,} items and {arguments.users:,} users", file=sys.stderr)
        prepare(bundle, arguments.items, arguments.users)
    rows = []
    for processes in arguments.processes:
        rows.append(measure(bundle, processes, arguments.requests, arguments.users, arguments.items))
        print(rows[-1], file=sys.stderr)
    table(rows, [name for name in rows[0] if name != "each_pss_mb"])
    facts = {"items": arguments.items, "users": arguments.users, "history": HISTORY, "requests": arguments.requests}
    write("serving_memory", {**facts, "load": os.getloadavg()[0], "table": rows})


if __name__ == "__main__":
    main()
