"""Stages put together: the funnel, its value formula, its bundle on disk, its evaluation."""

from fullrank.funnel.bundle import load_bundle, save_bundle
from fullrank.funnel.compare import compare_funnels
from fullrank.funnel.distillation import DistillConfig, Distilled
from fullrank.funnel.evaluation import evaluate_funnel
from fullrank.funnel.funnel import Funnel, Ranking, Recommendation
from fullrank.funnel.requests import Request
from fullrank.funnel.scorer import ScoredItem, Scorer
from fullrank.funnel.stages import StageSizes, TwoSided
from fullrank.funnel.training import EarlyConfig, FinalConfig, FunnelConfig, train_funnel
from fullrank.funnel.value import ValueFormula

__all__ = [
    "DistillConfig",
    "Distilled",
    "EarlyConfig",
    "FinalConfig",
    "Funnel",
    "FunnelConfig",
    "Ranking",
    "Recommendation",
    "Request",
    "ScoredItem",
    "Scorer",
    "StageSizes",
    "TwoSided",
    "ValueFormula",
    "compare_funnels",
    "evaluate_funnel",
    "load_bundle",
    "save_bundle",
    "train_funnel",
]
