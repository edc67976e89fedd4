"""Statistics of the training numbers."""

from __future__ import annotations

import numpy as np
import pytest

from fullrank.data import transforms
from fullrank.data.transforms import Sample


def test_a_sample_of_a_long_stream_is_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "SAMPLE_SIZE", 2000)
    sample = Sample()
    for start in range(0, 100_000, 1000):
        sample.add(np.arange(start, start + 1000, dtype=np.float64))
    quartiles = np.array(sample.quantiles(np.array([0.25, 0.5, 0.75]))) / 100_000
    # Five standard errors of a quartile of 2000 draws.
    np.testing.assert_allclose(quartiles, [0.25, 0.5, 0.75], atol=5 * 0.5 / np.sqrt(2000))
