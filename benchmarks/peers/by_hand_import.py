"""A comparison table encoded by hand, as users of DeepCTR-Torch do: arrays in memory; one JSON line.

    python benchmarks/peers/by_hand_import.py --data TABLES/ml1m_ctr --how label-encoder|polars

label-encoder   what the library's documentation shows: pandas, scikit-learn's LabelEncoder, a Python loop for lists
polars          what somebody who knows polars writes: Enum codes, lists exploded, coded at once and padded with NumPy

Both encode train, valid and test together, keep everything in memory and write nothing: no vocabulary for later rows,
no check of a row, no unknown id. The arrays have the same shapes either way.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

SPARSE = {
    "ml1m_ctr": ["user_id", "item_id", "gender", "age", "occupation", "zip_code", "year"],
    "globo_seq": ["item_id", "hour", "environment", "device", "os", "country", "region", "referrer"],
}
BAG = {"ml1m_ctr": ("genres", 6), "globo_seq": ("click_history", 20)}
PARTS = ("train", "valid", "test")


def with_label_encoder(data, sparse, bag, length):
    import pandas as pd
    from sklearn.preprocessing import LabelEncoder

    parts = {name: pd.read_csv(data / f"{name}.csv", dtype=str, keep_default_na=False) for name in PARTS}
    frame = pd.concat(parts.values(), keys=parts.keys())
    inputs = {name: LabelEncoder().fit_transform(frame[name]) for name in sparse}
    tokens = [row.split("^") for row in frame[bag]]
    values = {token for row in tokens for token in row}
    if bag == "click_history":  # the history shares the item table
        values |= set(frame["item_id"])
    lookup = {value: place + 1 for place, value in enumerate(sorted(values))}
    if bag == "click_history":
        inputs["item_id"] = frame["item_id"].map(lookup).to_numpy()
    padded = np.zeros((len(tokens), length), np.int64)
    for place, row in enumerate(tokens):
        ids = [lookup[token] for token in row[-length:]]
        padded[place, : len(ids)] = ids
    inputs[bag] = padded
    return inputs, frame["label"].astype(np.float32).to_numpy()


def with_polars(data, sparse, bag, length):
    import polars as pl

    def codes(values):
        return values.cast(pl.Enum(values.unique())).to_physical().to_numpy()

    frame = pl.concat(pl.read_csv(data / f"{name}.csv", infer_schema=False) for name in PARTS)
    inputs = {name: codes(frame[name]) for name in sparse}
    lists = frame[bag].str.split("^").list.tail(length)
    lengths = lists.list.len().to_numpy()
    tokens = lists.explode()
    if bag == "click_history":  # the history shares the item table
        ids = codes(pl.concat([tokens, frame["item_id"].alias(bag)]))
        ids, inputs["item_id"] = ids[: len(tokens)], ids[len(tokens) :] + 1
    else:
        ids = codes(tokens)
    padded = np.zeros((len(lists), length), np.int64)
    padded[np.arange(length) < lengths[:, None]] = ids + 1
    inputs[bag] = padded
    return inputs, frame["label"].cast(pl.Float32).to_numpy()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--how", choices=["label-encoder", "polars"], required=True)
    args = parser.parse_args()
    table = args.data.name
    encode = with_label_encoder if args.how == "label-encoder" else with_polars
    begin = time.monotonic()
    inputs, labels = encode(args.data, SPARSE[table], *BAG[table])
    end = time.monotonic()
    sizes = {name: len(np.unique(ids[ids > 0] if ids.ndim == 2 else ids)) for name, ids in inputs.items()}
    print(json.dumps({"begin": begin, "end": end, "rows": len(labels), "sizes": sizes}))


if __name__ == "__main__":
    main()
