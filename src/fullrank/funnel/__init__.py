"""Stages put together: the funnel, its value formula, its bundle on disk, its evaluation."""

from fullrank.funnel.bundle import load_bundle, save_bundle
from fullrank.funnel.compare import compare_funnels
from fullrank.funnel.distillation import DistillConfig, Distilled
from fullrank.funnel.evaluation import evaluate_funnel
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.off_policy import LogColumns, evaluate_off_policy
from fullrank.funnel.ranking import RankedItem, Ranking, Recommendation
from fullrank.funnel.requests import Request, Shown
from fullrank.funnel.rollout import rollout, rollout_dataset
from fullrank.funnel.scorer import ScoredItem, Scorer
from fullrank.funnel.slate import Slate, SlateConfig, SlotPolicy, fill, propensities
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
    "LogColumns",
    "RankedItem",
    "Ranking",
    "Recommendation",
    "Request",
    "ScoredItem",
    "Scorer",
    "Shown",
    "Slate",
    "SlateConfig",
    "SlotPolicy",
    "StageSizes",
    "TwoSided",
    "ValueFormula",
    "compare_funnels",
    "evaluate_funnel",
    "evaluate_off_policy",
    "fill",
    "load_bundle",
    "propensities",
    "rollout",
    "rollout_dataset",
    "save_bundle",
    "train_funnel",
]
