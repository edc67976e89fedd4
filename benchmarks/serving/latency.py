"""Latency and throughput of /v1/recommend over a million items, against servers as one writes them by hand.

    python -m benchmarks.serving.latency [--bentoml VENV/bin/bentoml]

All servers run the same trained weights, in turn, each in processes of its own; another process asks over loopback with
connections that are kept, each sending its next request when the answer has come. 1,000 items are retrieved, the early
stage hands 200 to the final one (DIN), 20 are answered.

Ours is `fullrank serve`. The first peer is FastAPI, a FAISS HNSW index over the same item vectors, features in NumPy
arrays, models called on batches of pairs in eager PyTorch with its default threads, and a response model
(`by_hand.py`); the second is the same code as a service of BentoML, which makes batches of requests that come together
(`peers/bentoml_peer.py`). Ours searches by `auto`. Recall of the 1,000 best items is measured for both indexes: HNSW on
inner products of vectors of unequal length misses items.

Then requests come to ours at twice the rate that it answered at most, whatever becomes of those before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.serving.load import FULLRANK, ask, free_port, running

RETRIEVE, KEEP, K = 1000, 200, 20
OURS, BY_HAND, BENTOML = "fullrank serve", "FastAPI + HNSW + eager torch", "the same in BentoML"
COLUMNS = ("category", "brand", "campaign", "price")


def prepare(work: Path, items: int, users: int, impressions: int) -> Path:
    """Train a funnel on a simulated log and give it a catalogue with every ad of the world."""
    import polars as pl
    import torch

    from benchmarks.serving.by_hand import INDEX, build_index
    from fullrank.data.simulate import World, simulate_dataset
    from fullrank.funnel import FunnelConfig, save_bundle, train_funnel
    from fullrank.funnel.catalogue import Catalogue

    torch.manual_seed(0)
    dataset = simulate_dataset(work / "data", impressions, 0, items=items, users=users, overwrite=True)
    world = World.load(work / "data" / "world.npz")
    config = FunnelConfig(retrieval={"name": "two_tower", "index": "auto"}, sizes={"retrieve": RETRIEVE, "keep": KEEP})
    trained, _ = train_funnel(dataset, config)
    raw = pl.DataFrame({"item_id": range(items)} | {name: world.arrays[f"item_{name}"] for name in COLUMNS})
    encoded = trained.encoders.transform(raw, allow_missing=True).select("__item_id", "item_id", *COLUMNS)
    frame = encoded.with_columns(pl.Series("__bid", world.arrays["item_bid"]), pl.lit(True).alias("__active"))
    funnel = trained.with_parts(items=Catalogue.of(frame, trained.schema))
    funnel.index_active()
    bundle = work / "bundle"
    save_bundle(funnel, bundle, overwrite=True)
    print("building the peers' index", file=sys.stderr)
    build_index(bundle, work / INDEX)
    return bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bentoml", type=Path, help="its command, in an environment with BentoML")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--impressions", type=int, default=400_000, help="rows of the log that the models train on")
    parser.add_argument("--seconds", type=float, default=10.0, help="of load for each line")
    parser.add_argument("--repeat", type=int, default=3, help="times that all servers are measured, in turn")
    parser.add_argument("--processes", type=int, default=1, help="of ours")
    parser.add_argument("--work", type=Path, default=Path("runs/serving_latency"))
    parser.add_argument("--prepared", action="store_true", help="the folder of work is there")
    arguments = parser.parse_args()

    from benchmarks.machine import table, write

    bundle = arguments.work / "bundle"
    if not arguments.prepared:
        print(f"preparing {arguments.items:,} items", file=sys.stderr)
        prepare(arguments.work, arguments.items, arguments.users, arguments.impressions)
    servers: dict[str, list[str]] = {
        OURS: [*FULLRANK, "serve", str(bundle)],
        BY_HAND: [sys.executable, "-m", "benchmarks.serving.by_hand", str(bundle)],
    }
    if arguments.processes > 1:
        servers[OURS] += ["--processes", str(arguments.processes)]
    if arguments.bentoml:
        servers[BENTOML] = [str(arguments.bentoml), "serve", "benchmarks.peers.bentoml_peer:Recommend"]
    environment = os.environ | {"FUNNEL_BUNDLE": str(bundle.absolute()), "BENTOML_DO_NOT_TRACK": "True"}
    asked = ["--users", str(arguments.users), "--k", str(K), "--seconds", str(arguments.seconds)]
    records: list[dict[str, Any]] = []
    recall, overload = {}, []
    for attempt in range(arguments.repeat):
        for name, command in servers.items():
            port = free_port()
            bento = ["--bento"] if name == BENTOML else []
            with running([*command, "--port", str(port)], port, environment):
                if name == BY_HAND and not attempt:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/recall", timeout=300) as answer:
                        recall = json.load(answer)
                for connections in arguments.connections:
                    found = ask(port, *asked, *bento, "--connections", str(connections))
                    facts = {"server": name, "attempt": attempt, "connections": connections}
                    records.append(facts | {"load": os.getloadavg()[0]} | found)
                    print(records[-1], file=sys.stderr)
                if name == OURS:
                    most = max(r["per_second"] for r in records if r["server"] == OURS and r["attempt"] == attempt)
                    overload.append(ask(port, *asked, "--connections", "512", "--rate", str(2 * most)))
                    print(overload[-1], file=sys.stderr)
    rows: list[dict[str, Any]] = []
    for key in dict.fromkeys((r["connections"], r["server"]) for r in records):
        runs = [r for r in records if (r["connections"], r["server"]) == key]
        middle = {name: statistics.median(r[name] for r in runs) for name in ("p50_ms", "p99_ms", "per_second")}
        failures = sum(r["failures"] for r in runs)
        rows.append({"connections": key[0], "server": key[1], **middle, "failures": failures})
    rows.sort(key=lambda row: row["connections"])
    table(rows, list(rows[0]))
    result = {"items": arguments.items, "processes": arguments.processes, "recall of the index": recall}
    write("serving_latency", result | {"table": rows, "at twice the rate": overload, "runs": records})


if __name__ == "__main__":
    main()
