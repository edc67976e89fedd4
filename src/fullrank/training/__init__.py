"""Fitting a ranker: the loop, schedules, precision, checkpoints, recipes."""

from fullrank.training.saving import load_model, save_model
from fullrank.training.trainer import Trainer, TrainerConfig, TrainingResult, evaluate

__all__ = ["Trainer", "TrainerConfig", "TrainingResult", "evaluate", "load_model", "save_model"]
