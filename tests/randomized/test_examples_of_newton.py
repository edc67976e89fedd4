from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), "30000"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_bundle_serves_the_probabilities_of_the_newton_fit() -> None:
    printed = run("linear_ranker_by_newton.py")
    ne, difference = re.findall(r"NE ([0-9.]+), bundle and estimator differ by ([0-9.e+-]+)", printed)[0]
    assert float(ne) < 1.0 and float(difference) < 1e-5


def test_calibration_makes_predicted_clicks_those_observed_and_lowers_the_entropy() -> None:
    found = re.findall(r"NE ([0-9.]+), predicted over observed clicks ([0-9.]+)", run("calibrate_logits.py"))
    (raw, raw_ratio), _, (affine, affine_ratio), (pieces, pieces_ratio) = [(float(a), float(b)) for a, b in found]
    assert raw_ratio > 2 and abs(affine_ratio - 1) < 0.25 and abs(pieces_ratio - 1) < 0.25
    assert max(affine, pieces) < raw and affine < 1
