"""Fitting a ranker: the loop, schedules, precision, checkpoints, recipes."""

from fullrank.training.callbacks import Callback
from fullrank.training.config import TrainerConfig
from fullrank.training.engine import Engine, LocalEngine
from fullrank.training.evaluation import evaluate
from fullrank.training.result import TrainingResult
from fullrank.training.saving import load_model, save_model
from fullrank.training.trainer import Trainer

__all__ = [
    "Callback",
    "Engine",
    "LocalEngine",
    "Trainer",
    "TrainerConfig",
    "TrainingResult",
    "evaluate",
    "load_model",
    "save_model",
]
