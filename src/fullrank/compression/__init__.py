"""Trained models made smaller."""

from fullrank.compression.codebooks import CodebookTable
from fullrank.compression.pruning import PruneReport, prune_ranker
from fullrank.compression.quantization import QuantizedTable, quantize_table
from fullrank.compression.rankers import PartReport, quantize_ranker

__all__ = [
    "CodebookTable",
    "PartReport",
    "PruneReport",
    "QuantizedTable",
    "prune_ranker",
    "quantize_ranker",
    "quantize_table",
]
