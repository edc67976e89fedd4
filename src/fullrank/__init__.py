"""fullrank: the whole ads and recommendation ranking funnel.

    import fullrank as fr

    fitted = fr.fit("log.csv", label="click")
    fitted.predict(new_rows)

Names here are those of the long way, imported when they are asked for: `fr.Dataset` is `fullrank.data.dataset.Dataset`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PLACES = {
    "Dataset": "fullrank.data.dataset",
    "EmbeddingOptimizer": "fullrank.embeddings",
    "Fitted": "fullrank.fitted",
    "Funnel": "fullrank.funnel",
    "FunnelConfig": "fullrank.funnel",
    "Loader": "fullrank.data.loader",
    "Ranker": "fullrank.models",
    "RankerSpec": "fullrank.models",
    "Recipe": "fullrank.training.recipe",
    "Request": "fullrank.funnel",
    "RetrieverSpec": "fullrank.retrieval",
    "Schema": "fullrank.schema",
    "Trainer": "fullrank.training",
    "TrainerConfig": "fullrank.training",
    "fit": "fullrank.fitted",
    "load": "fullrank.fitted",
    "read_recipe": "fullrank.training.recipe",
    "run": "fullrank.training.run",
    "simulate_dataset": "fullrank.data.simulate",
}

if TYPE_CHECKING:
    from fullrank.data.dataset import Dataset
    from fullrank.data.loader import Loader
    from fullrank.data.simulate import simulate_dataset
    from fullrank.embeddings import EmbeddingOptimizer
    from fullrank.fitted import Fitted, fit, load
    from fullrank.funnel import Funnel, FunnelConfig, Request
    from fullrank.models import Ranker, RankerSpec
    from fullrank.retrieval import RetrieverSpec
    from fullrank.schema import Schema
    from fullrank.training import Trainer, TrainerConfig
    from fullrank.training.recipe import Recipe, read_recipe
    from fullrank.training.run import run


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_PLACES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})


__all__ = [
    "Dataset",
    "EmbeddingOptimizer",
    "Fitted",
    "Funnel",
    "FunnelConfig",
    "Loader",
    "Ranker",
    "RankerSpec",
    "Recipe",
    "Request",
    "RetrieverSpec",
    "Schema",
    "Trainer",
    "TrainerConfig",
    "__version__",
    "fit",
    "load",
    "read_recipe",
    "run",
    "simulate_dataset",
]
