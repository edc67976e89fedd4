"""The index that costs least: all items scored while that is cheap, the best library at hand beyond."""

from __future__ import annotations
