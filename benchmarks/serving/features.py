"""What a request has to know of its user and items: ours against Feast's online store.

    python -m benchmarks.serving.features --feast VENV/bin/python

30 features of 200 items, by their ids, out of 100,000. Feast reads its SQLite online store (`get_online_features`, as
dictionaries of lists); ours takes the same columns from the catalogue of a funnel, in memory, as the batch that its
models read. What is asked is the same, and the values are compared. A second row adds what only ours keeps: the user's
events since, out of its own SQLite store, in the order of time.

Feast is not an extra of this package: make an environment, `pip install feast==0.67.0`. Both are measured in turn,
three times, one thread, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ITEMS, FEATURES, ASKED, CALLS = 100_000, 30, 200, 100


def numbers() -> Any:
    return np.random.default_rng(0).normal(size=(ITEMS, FEATURES)).astype(np.float32)


def questions() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.choice(ITEMS, ASKED, replace=False).tolist() for _ in range(CALLS)]


def timed(ask: Callable[[list[int]], Any]) -> dict[str, float]:
    """Milliseconds of a call."""
    asked = questions()
    for question in asked[:5]:
        ask(question)
    times = []
    for question in asked:
        began = time.perf_counter()
        ask(question)
        times.append(1e3 * (time.perf_counter() - began))
    times.sort()
    return {"p50_ms": statistics.median(times), "p99_ms": times[int(0.99 * len(times))]}


def feast(place: Path) -> dict[str, Any]:
    """In an environment with Feast."""
    import datetime

    import pandas as pd
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource
    from feast.types import Float32, Int64

    names = [f"f{number}" for number in range(FEATURES)]
    now = pd.Timestamp.now(tz="UTC")
    frame = pd.DataFrame(numbers(), columns=names).assign(item_id=np.arange(ITEMS), event_timestamp=now)
    frame.to_parquet(place / "items.parquet")
    (place / "feature_store.yaml").write_text(
        "project: items\nregistry: registry.db\nprovider: local\nonline_store:\n  type: sqlite\n  path: online.db\n"
    )
    store = FeatureStore(str(place))
    item = Entity(name="item", join_keys=["item_id"])
    view = FeatureView(
        name="items",
        entities=[item],
        ttl=datetime.timedelta(days=1),
        schema=[Field(name="item_id", dtype=Int64), *(Field(name=name, dtype=Float32) for name in names)],
        source=FileSource(path=str(place / "items.parquet"), timestamp_field="event_timestamp"),
    )
    store.apply([item, view])
    store.materialize(now.to_pydatetime() - datetime.timedelta(hours=1), now.to_pydatetime())
    wanted = [f"items:{name}" for name in names]

    def ask(items: list[int]) -> dict[str, list[Any]]:
        rows = [{"item_id": each} for each in items]
        answer: dict[str, list[Any]] = store.get_online_features(features=wanted, entity_rows=rows).to_dict()
        return answer

    first = ask(questions()[0])
    return {"feast": timed(ask), "sum": float(sum(sum(first[name]) for name in names))}


def ours(place: Path) -> dict[str, Any]:
    import polars as pl
    import torch

    from fullrank.funnel.catalogue import Catalogue
    from fullrank.funnel.recent_events import Event
    from fullrank.schema import Categorical, Keys, Label, Numeric, Schema
    from fullrank.serving.store import EventStore, Feedback

    torch.set_num_threads(1)
    names = [f"f{number}" for number in range(FEATURES)]
    schema = Schema(
        features=(Categorical(name="item_id", role="item"), *(Numeric(name=name, role="item") for name in names)),
        labels=(Label(name="click"),),
        keys=Keys(item_id="item_id"),
    )
    columns = {"__item_id": np.arange(ITEMS), "item_id": np.zeros(ITEMS, np.int32)}
    frame = pl.DataFrame(columns | dict(zip(names, numbers().T, strict=True)))
    catalogue = Catalogue.of(frame, schema)

    def ask(items: list[int]) -> Any:
        return catalogue.rows.take(catalogue.find(items))

    store = EventStore(place / "store")
    for user in range(100):
        events = [Event(item, 1000 + item, {"click": 1}, {}) for item in range(50)]
        store.append([Feedback(user, event) for event in events]).result()

    def ask_both(items: list[int]) -> Any:
        return ask(items), store.recent(items[0] % 100)

    found = {"fullrank": timed(ask), "fullrank, and 50 events of the user": timed(ask_both)}
    total = float(ask(questions()[0]).numeric_BN.double().sum())
    store.close()
    return {**found, "sum": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--feast", type=Path, help="the Python of an environment with Feast")
    parser.add_argument("--role", choices=("feast", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.role:
        with tempfile.TemporaryDirectory() as folder:
            print("found " + json.dumps((feast if arguments.role == "feast" else ours)(Path(folder))))
        return

    from benchmarks.machine import table, write

    runs: dict[str, list[dict[str, float]]] = {}
    sums = set()
    for _ in range(arguments.repeat):
        for role, python in (("feast", arguments.feast), ("ours", sys.executable)):
            if python is None:
                continue
            command = [str(python), "-m", "benchmarks.serving.features", "--role", role]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found = json.loads(next(line for line in output.splitlines() if line.startswith("found "))[6:])
            sums.add(round(found.pop("sum"), 2))
            for name, times in found.items():
                runs.setdefault(name, []).append(times)
    if len(sums) != 1:
        raise SystemExit(f"the stores disagree: sums {sums}")
    rows = [
        {"store": name, **{key: statistics.median(run[key] for run in each) for key in ("p50_ms", "p99_ms")}}
        for name, each in runs.items()
    ]
    table(rows, ["store", "p50_ms", "p99_ms"])
    result = {"items": ITEMS, "features": FEATURES, "asked": ASKED, "calls": CALLS, "table": rows, "runs": runs}
    write("serving_features", result)


if __name__ == "__main__":
    main()
