from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "kernel_early_stage.py"


def test_kernel_features_beat_a_linear_model_and_score_all_ads_at_once() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "40000"], capture_output=True, text=True, check=True)
    kernel, linear = (float(text) for text in re.findall(r"([0-9.]+) (?:with kernel|linear)", done.stdout))
    assert kernel > linear + 0.01
    assert float(re.findall(r"to ([0-9e+-]+)", done.stdout)[-1]) < 1e-10
