"""Point-in-time joins by Feast's file store, which lives in an environment of its own.

    python -m venv VENV && VENV/bin/pip install feast==0.67.0
    VENV/bin/python benchmarks/peers/feast_peer.py FOLDER

FOLDER/views/*.parquet are logs, a feature view of each: `key`, `event_time`, `available_at` and features. The first
line printed has the versions; then each line read is {"view", "questions", "known"}: the second names a file of FOLDER
with `query`, `key` and `event_timestamp`, the last says whether `filter_by_created_timestamp` is set. It is answered
with the CPU and wall seconds of the join, whose rows are in FOLDER/answer.parquet. One thread.
"""

import json
import sys
import time
from importlib import metadata
from pathlib import Path

import dask
import pandas as pd
import pyarrow.parquet as pq
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Bytes, Int64

CONFIG = "project: log\nregistry: registry.db\nprovider: local\noffline_store: {type: file}\nonline_store: null\n"
NOT_FEATURES = ("key", "event_time", "available_at")


def feature_view(path, entity):
    names = {field.name: field.type for field in pq.read_schema(path)}
    kinds = {name: Int64 if str(kind) == "int64" else Bytes for name, kind in names.items()}
    source = FileSource(path=str(path), timestamp_field="event_time", created_timestamp_column="available_at")
    schema = [Field(name=name, dtype=kinds[name]) for name in names if name not in NOT_FEATURES[1:]]
    return FeatureView(name=path.stem, entities=[entity], ttl=None, schema=schema, source=source)


def main():
    folder, answers = Path(sys.argv[1]), sys.stdout
    sys.stdout = sys.stderr  # Feast prints as well
    dask.config.set(scheduler="synchronous")
    (folder / "feature_store.yaml").write_text(CONFIG)
    store = FeatureStore(str(folder))
    entity = Entity(name="key", join_keys=["key"], value_type=ValueType.INT64)
    views = {path.stem: feature_view(path, entity) for path in (folder / "views").glob("*.parquet")}
    store.apply([entity, *views.values()])
    said = {name: metadata.version(name) for name in ("feast", "dask", "pandas")}
    print(json.dumps(said), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        features = [f"{asked['view']}:{field.name}" for field in views[asked["view"]].features]
        questions = pd.read_parquet(folder / asked["questions"])
        cpu, wall = time.process_time(), time.perf_counter()
        job = store.get_historical_features(questions, features, filter_by_created_timestamp=asked["known"])
        found = job.to_df()
        took = {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - wall}
        found.to_parquet(folder / "answer.parquet")
        print(json.dumps(took), file=answers, flush=True)


if __name__ == "__main__":
    main()
