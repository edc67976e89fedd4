"""A training run in a process of its own, for the tests that kill it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tables import SCHEMA
from torch import Tensor

from fullrank.data.dataset import Dataset
from fullrank.data.loader import Loader
from fullrank.embeddings import EmbeddingOptimizer
from fullrank.models import MODELS, Ranker
from fullrank.training import Callback, Trainer, TrainerConfig

CONFIG = TrainerConfig(
    epochs=3,
    learning_rate=0.02,
    schedule="plateau",
    patience=0,
    checkpoint_every=2,
    keep_checkpoints=2,
    seed=4,
)
STEPS = 3 * 10


def model() -> Ranker:
    torch.manual_seed(CONFIG.seed)
    config = {"hidden": (16,), "embedding_dim": 4, "embedding_init": 0.01, "dropout": 0.2, "batch_norm": True}
    return MODELS["dcn_v2"].from_config(SCHEMA, config)


class Progress(Callback):
    """Notes each step in a file, so that a parent process knows when to strike."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def after_step(self, step: int, loss: Tensor) -> None:
        with self.path.open("a") as file:
            file.write(f"{step}\n")


def train(data: Path, run: Path, embedding: dict[str, Any], out: Path) -> None:
    """Train, resuming if there is something to resume, and write the final weights, and the curve beside them."""
    torch.set_num_threads(1)
    dataset = Dataset.open(data)
    ranker = model()
    loader = Loader(dataset, "train", 60, shuffle=True, seed=CONFIG.seed)
    valid = Loader(dataset, "valid", 100)
    run.mkdir(exist_ok=True)
    result = Trainer(CONFIG, EmbeddingOptimizer(**embedding), [Progress(run / "steps")]).fit(
        ranker, loader, valid, run_directory=run, resume=True
    )
    out.with_suffix(".curve").write_text(json.dumps(result.curve))
    partial = out.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in ranker.state_dict().items()}, partial)
    os.replace(partial, out)
