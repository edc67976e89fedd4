"""Time FuxiCTR's own AUC and gAUC on saved arrays; prints one JSON line.

python benchmarks/peers/fuxictr_metrics.py FOLDER     (scores.npy, labels.npy, users.npy)
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from fuxictr import __version__
from fuxictr.metrics import evaluate_metrics

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    scores, labels, users = (np.load(folder / f"{name}.npy") for name in ("scores", "labels", "users"))
    result = {"version": __version__}
    for name in ("AUC", "gAUC"):
        begin = time.perf_counter()
        value = evaluate_metrics(labels, scores, [name], group_id=users)[name]
        result[name] = {"value": float(value), "seconds": time.perf_counter() - begin}
    print(json.dumps(result))
