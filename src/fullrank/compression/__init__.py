"""Trained models made smaller."""

from fullrank.compression.codebooks import CodebookTable
from fullrank.compression.quantization import QuantizedTable, quantize_table
from fullrank.compression.rankers import PartReport, quantize_ranker

__all__ = ["CodebookTable", "PartReport", "QuantizedTable", "quantize_ranker", "quantize_table"]
