"""One protocol for quality against the memory of tables: the sets, a run, and paired differences."""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[2] / "recipes"
SETS = ("ml1m_ctr", "avazu")
# At most: training ends two epochs after the best one on validation rows, whose weights are tested.
EPOCHS = {"ml1m_ctr": 2, "avazu": 12}
BATCH = {"ml1m_ctr": 2048, "avazu": 256}
RATE = {"ml1m_ctr": 3e-3, "avazu": 1e-3}


def arguments(description: str | None) -> argparse.Namespace:
    """Of a benchmark under this protocol: `name` of a set, where its rows are, and seeds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", dest="name", required=True, choices=SETS)
    parser.add_argument("--tables", type=Path, default=Path("tables"))
    parser.add_argument("--avazu", type=Path, help="rows of the training file of the Avazu challenge")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    return parser.parse_args()


@contextmanager
def dataset_of(name: str, tables: Path, avazu: Path | None) -> Iterator[Any]:
    """`ml1m_ctr` as `benchmarks.tables` writes it; `avazu`, rows of the challenge's training file, split by time."""
    from fullrank.data.dataset import Dataset
    from fullrank.data.formats import open_format
    from fullrank.data.importing import import_dataset
    from fullrank.schema import Schema

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "dataset"
        if name == "avazu":
            assert avazu is not None, "--avazu: the file is needed"
            schema = open_format("avazu").default_schema(avazu)
            every = [feature.model_copy(update={"min_count": 1}) for feature in schema.features]
            schema = schema.model_copy(update={"features": tuple(every)})  # rare ids are what this is about
            import_dataset("avazu", avazu, out, schema=schema)
        else:
            schema = Schema.read(RECIPES / "movielens-1m.schema.json")
            import_dataset("csv", tables / name, out, schema=schema)
        yield Dataset.open(out)


def evaluated(dataset: Any, name: str, model: dict[str, Any], seed: int) -> dict[str, float]:
    """Test NE and AUC after the epoch that is best on validation rows."""
    from fullrank.data.loader import Loader
    from fullrank.training import TrainerConfig, evaluate
    from fullrank.training.run import train_ranker

    spec = {"name": "dlrm", "hidden": [64, 32], **model}
    training = TrainerConfig(
        seed=seed, epochs=EPOCHS[name], batch_size=BATCH[name], learning_rate=RATE[name], monitor="ne"
    )
    ranker, _ = train_ranker(spec, dataset, training)
    (metrics,) = evaluate(ranker, Loader(dataset, "test", 8192)).values()
    return {"ne": metrics["ne"], "auc": metrics["auc"], "parameters": ranker.num_parameters().embedding}


def summary(label: str, found: list[dict[str, float]], full: list[dict[str, float]]) -> dict[str, Any]:
    """Means over seeds, and the mean and standard error of the differences to `full`, seed by seed."""
    differences = [mine["ne"] - theirs["ne"] for mine, theirs in zip(found, full, strict=True)]
    size = found[0]["parameters"]
    return {
        "label": label,
        "bytes": int(4 * size),
        "times_smaller": round(full[0]["parameters"] / size, 2),
        "test_ne": round(statistics.mean(each["ne"] for each in found), 5),
        "test_auc": round(statistics.mean(each["auc"] for each in found), 5),
        "ne_minus_full": round(statistics.mean(differences), 5),
        "standard_error": round(statistics.stdev(differences) / math.sqrt(len(differences)), 5),
    }
