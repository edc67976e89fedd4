from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fullrank.training.recipe import read_recipe

ROOT = Path(__file__).parent.parent


def test_a_ranker_trained_on_a_simulated_log_beats_the_mean_and_not_the_oracle() -> None:
    script = ROOT / "examples" / "train_a_ranker.py"
    done = subprocess.run([sys.executable, str(script), "40000"], capture_output=True, text=True, check=True)
    ne, oracle = (float(text) for text in re.findall(r"(?:test NE|probabilities) ([0-9.]+)", done.stdout))
    assert oracle < ne < 1.0


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("**/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_its_schema_exists(recipe: Path) -> None:
    source = read_recipe(recipe).data.source
    if source is not None and source.schema_file is not None:
        assert (ROOT / source.schema_file).is_file()
