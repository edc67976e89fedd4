"""Latency of /v1/recommend over 100,000 items with 200 final candidates, against a server as one writes it by hand.

    python -m benchmarks.serving_latency

All servers run the same trained weights, in turn, each in a process of its own; another process asks over loopback with
keep-alive connections, each sending its next request when the answer has come. Two funnels are served by both sides:

* three stages: 1,000 items retrieved, early stage, 200 to the final stage (DIN);
* two stages: 200 items retrieved, all to the final stage.

Ours is `fullrank serve`, with exact retrieval. The peer is FastAPI, a FAISS HNSW index over the same item vectors,
features in NumPy arrays, models called on batches of pairs in eager PyTorch with its default threads, and a response
model. Recall of the peer's index is measured too: HNSW on inner products of vectors of unequal length misses items.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

FINAL = 200
RETRIEVED = {"three": 1000, "two": FINAL}
HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 32, 100, 400


def prepare(work: Path, items: int, impressions: int) -> None:
    """Train a funnel on a simulated log and give it a catalogue with every ad of the world."""
    import polars as pl
    import torch

    from fullrank.data.simulate import World, simulate_dataset
    from fullrank.funnel import FunnelConfig, StageSizes, save_bundle, train_funnel
    from fullrank.funnel.catalogue import Catalogue
    from fullrank.funnel.funnel import Funnel

    torch.manual_seed(0)
    dataset = simulate_dataset(work / "data", impressions, 0, items=items, users=20_000, overwrite=True)
    world = World.load(work / "data" / "world.npz")
    trained, _ = train_funnel(dataset, FunnelConfig())
    raw = pl.DataFrame({"item_id": range(items)} | {name: world.arrays[f"item_{name}"] for name in COLUMNS})
    encoded = trained.encoders.transform(raw, allow_missing=True).select("__item_id", "item_id", *COLUMNS)
    frame = encoded.with_columns(pl.Series("__bid", world.arrays["item_bid"]), pl.lit(True).alias("__active"))
    for stages, retrieve in RETRIEVED.items():
        funnel = Funnel(
            encoders=trained.encoders,
            items=Catalogue.of(frame, trained.schema),
            users=trained.users,
            context=trained.context,
            retriever=trained.retriever,
            early=trained.early,
            final=trained.final,
            sizes=StageSizes(retrieve=retrieve, keep=FINAL),
        )
        funnel.index_active()
        save_bundle(funnel, work / f"bundle-{stages}", overwrite=True)


COLUMNS = ("category", "brand", "campaign", "price")


class Question(BaseModel):
    """Body of the peer's request."""

    user_id: int
    k: int = 10


class Entry(BaseModel):
    """Entry of the peer's list."""

    item_id: int
    value: float
    click: float


def peer(bundle: Path, port: int) -> None:
    """The server as one writes it by hand around the same weights."""
    import faiss
    import numpy as np
    import torch
    import uvicorn
    from fastapi import FastAPI

    from fullrank.batch import Batch
    from fullrank.funnel import load_bundle
    from fullrank.retrieval import TwoTower

    funnel = load_bundle(bundle)
    retriever = funnel.retriever
    assert isinstance(retriever, TwoTower) and funnel.users is not None and funnel.items.bid_I is not None
    schema, model = funnel.schema, funnel.final
    vectors = retriever.vectors.vectors_ID.numpy()
    index = faiss.IndexHNSWFlat(vectors.shape[1], HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    retrieve = funnel.sizes.retrieve
    index.hnsw.efConstruction, index.hnsw.efSearch = HNSW_BUILD, max(HNSW_SEARCH, retrieve)
    index.add(vectors)
    item_numbers, item_ids = funnel.items.rows.batch.numeric_BN.numpy(), funnel.items.rows.batch.ids_BF.numpy()
    bids, names = funnel.items.bid_I.numpy(), np.array(funnel.items.ids)
    from_item = np.array([feature.role == "item" for feature in schema.categorical])
    users = {name: funnel.users.rows.take(torch.tensor([row])) for row, name in enumerate(funnel.users.ids)}
    stranger = funnel.encode.stranger

    app = FastAPI()

    @app.get("/readyz")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.get("/recall")
    def recall() -> dict[str, float]:
        queries = torch.cat([retriever.user_vectors(row) for row in list(users.values())[:200]])
        exact = retriever.vectors.search(queries, retrieve).item_keys_BK.numpy()
        _, found = index.search(queries.numpy(), retrieve)
        keys = retriever.vectors.keys_I.numpy()
        pairs = zip(found, exact, strict=True)
        return {"recall": float(np.mean([len(set(keys[f]) & set(e)) / retrieve for f, e in pairs]))}

    def pairs(user: Batch, rows: Any) -> Batch:
        count = len(rows)
        events = torch.split(user.jagged_values, user.jagged_lengths_KB[:, 0].tolist())
        return Batch(
            numeric_BN=torch.from_numpy(item_numbers[rows]),
            ids_BF=torch.from_numpy(np.where(from_item, item_ids[rows], user.ids_BF.numpy())),
            jagged_keys=user.jagged_keys,
            jagged_values=torch.cat([part.repeat(count) for part in events]),
            jagged_lengths_KB=user.jagged_lengths_KB.repeat(1, count),
            event_keys=user.event_keys,
            event_values=user.event_values.repeat(count),
            event_lengths_EB=user.event_lengths_EB.repeat(1, count),
            labels_BT=torch.zeros(count, len(schema.labels)),
        )

    @app.post("/v1/recommend")
    def recommend(question: Question) -> list[Entry]:
        user = users.get(question.user_id, stranger)
        with torch.no_grad():
            _, found = index.search(retriever.user_vectors(user).numpy(), retrieve)
            rows = found[0][found[0] >= 0]
            if len(rows) > FINAL:
                early = torch.sigmoid(funnel.early["early"](pairs(user, rows)).logits_BT[:, 0]).numpy()
                rows = rows[np.argsort(-early * bids[rows])[:FINAL]]
            click = torch.sigmoid(model(pairs(user, rows)).logits_BT[:, 0]).numpy()
        value = click * bids[rows]
        best = np.argsort(-value)[: question.k]
        return [Entry(item_id=int(names[rows[i]]), value=float(value[i]), click=float(click[i])) for i in best]

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


async def _ask(port: int, users: Iterator[int], until: float, latencies: list[float], failures: list[str]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while time.perf_counter() < until:
            body = json.dumps({"user_id": next(users), "k": 10}).encode()
            began = time.perf_counter()
            writer.write(
                b"POST /v1/recommend HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                b"content-length: " + str(len(body)).encode() + b"\r\n\r\n" + body
            )
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            answer = await reader.readexactly(length)
            latencies.append(time.perf_counter() - began)
            if not head.startswith(b"HTTP/1.1 200"):
                failures.append(answer.decode(errors="replace"))
    finally:
        writer.close()


def load(port: int, seconds: float, connections: int) -> None:
    """Ask for `seconds`, print one JSON object."""

    async def run() -> dict[str, Any]:
        import random

        draw = random.Random(connections)
        users = iter(lambda: draw.randrange(20_000), None)
        warm: list[float] = []
        failures: list[str] = []
        await asyncio.gather(
            *(_ask(port, users, time.perf_counter() + min(1.0, seconds), warm, failures) for _ in range(connections))
        )
        latencies: list[float] = []
        began = time.perf_counter()
        await asyncio.gather(*(_ask(port, users, began + seconds, latencies, failures) for _ in range(connections)))
        spent = time.perf_counter() - began
        cuts = statistics.quantiles(latencies, n=1000)
        return {
            "requests": len(latencies),
            "failures": len(failures),
            "p50_ms": 1e3 * cuts[499],
            "p99_ms": 1e3 * cuts[989],
            "per_second": len(latencies) / spent,
        }

    print(json.dumps(asyncio.run(run())))


@contextlib.contextmanager
def running(command: list[str], port: int, environment: dict[str, str] | None = None) -> Iterator[None]:
    """A server process, ready to answer; ended when the block ends."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{' '.join(command)} did not start") from None
                time.sleep(0.2)
        yield
    finally:
        server.terminate()
        server.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", choices=("all", "peer", "load"), default="all", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--impressions", type=int, default=400_000, help="rows of the log that the models train on")
    parser.add_argument("--seconds", type=float, default=10.0, help="of load for each line")
    parser.add_argument("--repeat", type=int, default=3, help="times that both servers are measured, in turn")
    parser.add_argument("--work", type=Path, default=Path("runs/serving_latency"))
    arguments = parser.parse_args()
    if arguments.role == "peer":
        peer(arguments.work, arguments.port)
        return
    if arguments.role == "load":
        load(arguments.port, arguments.seconds, arguments.connections[0])
        return

    from benchmarks.machine import table, write

    print(f"preparing {arguments.items:,} items", file=sys.stderr)
    prepare(arguments.work, arguments.items, arguments.impressions)
    this = [sys.executable, "-m", "benchmarks.serving_latency"]
    cli = [sys.executable, "-c", "from fullrank.cli.main import main; main()"]
    records: list[dict[str, Any]] = []
    for attempt in range(arguments.repeat):
        for stages in RETRIEVED:
            bundle = str(arguments.work / f"bundle-{stages}")
            for name in ("fullrank serve", "FastAPI + HNSW + eager torch"):
                port = free_port()
                ours = [*cli, "serve", bundle, "--port", str(port)]
                theirs = [*this, "--role", "peer", "--work", bundle, "--port", str(port)]
                with running(ours if name == "fullrank serve" else theirs, port):
                    facts = {"stages": stages, "server": name, "attempt": attempt, "recall": 1.0}
                    if name != "fullrank serve":
                        with urllib.request.urlopen(f"http://127.0.0.1:{port}/recall", timeout=60) as answer:
                            facts |= json.load(answer)
                    for connections in arguments.connections:
                        ask = ["--role", "load", "--port", str(port), "--connections", str(connections)]
                        ask += ["--seconds", str(arguments.seconds)]
                        asked = subprocess.run([*this, *ask], capture_output=True, text=True, check=True)
                        found = json.loads(asked.stdout)
                        records.append(facts | {"connections": connections, "load": os.getloadavg()[0]} | found)
                        print(records[-1], file=sys.stderr)
    rows: list[dict[str, Any]] = []
    for key in dict.fromkeys((r["stages"], r["connections"], r["server"]) for r in records):
        runs = [r for r in records if (r["stages"], r["connections"], r["server"]) == key]
        middle = {name: statistics.median(r[name] for r in runs) for name in ("p50_ms", "p99_ms", "per_second")}
        facts = {"recall of retrieval": runs[0]["recall"], "failures": sum(r["failures"] for r in runs)}
        rows.append({"stages": key[0], "connections": key[1], "server": key[2], **middle, **facts})
    rows.sort(key=lambda row: (row["stages"], row["connections"]))
    table(rows, list(rows[0]))
    write("serving_latency", {"items": arguments.items, "seconds": arguments.seconds, "table": rows, "runs": records})


if __name__ == "__main__":
    main()
