"""FuxiCTR 2.3.10's own preprocessing of a comparison table, and nothing else; one JSON line with its begin and end.

    python benchmarks/peers/fuxictr_import.py --data TABLES/ml1m_ctr --work SCRATCH

Times are of `time.monotonic()`, which all processes of a machine share; begin comes after the imports.
"""

import argparse
import json
import logging
import shutil
import time
from pathlib import Path

from fuxictr import __version__ as fuxictr_version
from fuxictr.preprocess import FeatureProcessor, build_dataset
from fuxictr_peer import HISTORIES, TABLES, history


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    table = args.data.name
    features = [*TABLES[table], *(history(name, table, attends=True) for name in HISTORIES.get(table, {}))]
    dataset_id = f"{table}_import"
    shutil.rmtree(args.work / dataset_id, ignore_errors=True)
    settings = {
        "dataset_id": dataset_id,
        "data_root": str(args.work),
        "data_format": "csv",
        "feature_cols": features,
        "label_col": {"name": "label", "dtype": "float"},
        "min_categr_count": 1,
        "train_data": str(args.data / "train.csv"),
        "valid_data": str(args.data / "valid.csv"),
        "test_data": str(args.data / "test.csv"),
        # Without these two its own readers fail on a missing key.
        "embedding_dim": 16,
        "num_workers": 1,
    }
    begin = time.monotonic()
    build_dataset(FeatureProcessor(**settings), **settings)
    print(json.dumps({"begin": begin, "end": time.monotonic(), "version": fuxictr_version}))


if __name__ == "__main__":
    main()
