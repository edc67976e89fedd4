"""Train a ranker on a simulated log and hold it against the best that any model could reach.

python examples/train_a_ranker.py [IMPRESSIONS]
"""

import sys
import tempfile
from pathlib import Path

import torch

from fullrank.data.loader import Loader
from fullrank.data.simulate import simulate_dataset
from fullrank.metrics import normalized_entropy
from fullrank.models import MODELS
from fullrank.training import Trainer, TrainerConfig, evaluate

impressions = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000

with tempfile.TemporaryDirectory() as folder:
    dataset = simulate_dataset(Path(folder) / "log", impressions, seed=1)
    schema = dataset.schema.model_copy(update={"labels": dataset.schema.labels[:1]})  # clicks only
    torch.manual_seed(0)
    model = MODELS["dcn_v2"].from_config(schema, {"embedding_init": 0.01})
    config = TrainerConfig(batch_size=256, learning_rate=0.002, schedule="linear")
    Trainer(config).fit(model, Loader(dataset, "train", 256, shuffle=True, schema=schema))
    metrics = evaluate(model, Loader(dataset, "test", 4096, schema=schema))["click"]

    test = dataset.scan("test").select("click", "__true_click").collect()
    oracle = normalized_entropy(
        torch.logit(torch.tensor(test["__true_click"].to_numpy()).double()), torch.tensor(test["click"].to_numpy())
    )
    print(f"test NE {metrics['ne']:.4f}, AUC {metrics['auc']:.4f}; NE of the true probabilities {oracle:.4f}")
