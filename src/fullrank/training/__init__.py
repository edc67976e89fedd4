"""Fitting a ranker: the loop, schedules, precision, checkpoints, recipes."""

from fullrank.training.callbacks import Callback
from fullrank.training.evaluation import evaluate
from fullrank.training.saving import load_model, save_model
from fullrank.training.trainer import Trainer, TrainerConfig, TrainingResult

__all__ = ["Callback", "Trainer", "TrainerConfig", "TrainingResult", "evaluate", "load_model", "save_model"]
