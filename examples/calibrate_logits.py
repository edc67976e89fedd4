"""Train on a log with most negatives left out, then make the log-odds tell the truth again.

python examples/calibrate_logits.py [IMPRESSIONS]
"""

import sys

import numpy as np
import polars as pl
import torch
from sklearn.preprocessing import OneHotEncoder

from fullrank.data.simulate import SimulationConfig, simulate
from fullrank.metrics import normalized_entropy
from fullrank.randomized import LogitCalibrator, SubsampledNewtonClassifier

impressions = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
KEPT = 0.1  # of the negatives

log = pl.concat(simulate(SimulationConfig(impressions=impressions, seed=1)))
columns = ["age_group", "gender", "country", "category", "brand", "campaign", "hour", "device", "position"]
cells, clicked = log.select(columns).to_numpy().astype(str), log["click"].to_numpy().astype(float)
train, valid, test = np.split(np.arange(len(log)), [int(0.7 * len(log)), int(0.85 * len(log))])

encoder = OneHotEncoder(handle_unknown="ignore").fit(cells[train])
kept = train[(clicked[train] == 1) | (np.random.default_rng(0).random(len(train)) < KEPT)]
model = SubsampledNewtonClassifier(C=1.0, random_state=0).fit(encoder.transform(cells[kept]), clicked[kept])
z_valid, z_test = (model.decision_function(encoder.transform(cells[part])) for part in (valid, test))


def report(name: str, logits: np.ndarray) -> None:
    ne = normalized_entropy(torch.from_numpy(logits), torch.from_numpy(clicked[test]))
    ratio = (1 / (1 + np.exp(-logits))).sum() / clicked[test].sum()
    print(f"{name:32} NE {ne:.4f}, predicted over observed clicks {ratio:.3f}")


report(f"trained on {KEPT:.0%} of the negatives", z_test)
report("log-odds plus log of the rate", z_test + np.log(KEPT))
for method in ("affine", "piecewise"):
    report(f"{method} calibration", LogitCalibrator(method).fit(z_valid, clicked[valid]).transform(z_test))
