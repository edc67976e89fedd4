"""Semantic IDs: content vectors to codes, codes to rows of a table, and how stable that makes a ranker."""

from fullrank.embeddings.semantic_id.codes import ItemCodes
from fullrank.embeddings.semantic_id.content import Content
from fullrank.embeddings.semantic_id.loading import load_quantizer
from fullrank.embeddings.semantic_id.matching import code_churn
from fullrank.embeddings.semantic_id.quantizer import NotFittedError, Quantizer, VersionMismatchError
from fullrank.embeddings.semantic_id.rq_kmeans import RQKMeans
from fullrank.embeddings.semantic_id.rq_vae import RQVAE, RQLosses
from fullrank.embeddings.semantic_id.stability import (
    aar,
    attention_stats,
    click_loss_rate,
    drift_sensitivity,
    item_segments,
    partition_quality,
    segment_report,
)
from fullrank.embeddings.semantic_id.tokenizer import SemanticIDTokenizer

__all__ = [
    "RQVAE",
    "Content",
    "ItemCodes",
    "NotFittedError",
    "Quantizer",
    "RQKMeans",
    "RQLosses",
    "SemanticIDTokenizer",
    "VersionMismatchError",
    "aar",
    "attention_stats",
    "click_loss_rate",
    "code_churn",
    "drift_sensitivity",
    "item_segments",
    "load_quantizer",
    "partition_quality",
    "segment_report",
]
