"""The funnel by hand as a BentoML service, which batches requests that come together.

python -m venv VENV && VENV/bin/pip install bentoml==1.4.40      # and this repository, with faiss-cpu
FUNNEL_BUNDLE=BUNDLE VENV/bin/bentoml serve benchmarks.peers.bentoml_peer:Recommend --port 3000
"""

from __future__ import annotations

import os
from pathlib import Path

import bentoml

from benchmarks.serving.by_hand import Entry, Pipeline, Question


@bentoml.service(workers=1, traffic={"timeout": 60})
class Recommend:
    """One worker: the models are not shared by several."""

    def __init__(self) -> None:
        self.pipeline = Pipeline(Path(os.environ["FUNNEL_BUNDLE"]))

    @bentoml.api(route="/v1/recommend", batchable=True, max_batch_size=32, max_latency_ms=1000)
    def recommend(self, questions: list[Question]) -> list[list[Entry]]:
        return self.pipeline.recommend(questions)
