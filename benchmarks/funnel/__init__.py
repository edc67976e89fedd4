"""Benchmarks of whole funnels."""
