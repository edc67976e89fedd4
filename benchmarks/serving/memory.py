"""Memory of `fullrank serve --processes N`: 1,000,000 items and as many users with histories of 50.

    python -m benchmarks.serving.memory

The bundle is made, not trained: vocabularies of all items and users, histories of random items with their times, two
towers with exact search, an early stage and a DIN. Each server is asked for lists of users from all over the catalogue,
as many as it takes until what it shares has been read, and is then read from `/proc`: PSS counts a page that several
processes share once over all of them. The peak is that of the sum, from the start of the server to the end; lists a
second are those of eight connections to an idle machine.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

HISTORY, NOW = 50, 1_700_000_000
MIB = 2**20


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
            Sequence(name="history", of=("item_id",), where="click", age=True, max_length=HISTORY),
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
        "history.age": np.log1p(NOW - times).astype(np.float32),
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
