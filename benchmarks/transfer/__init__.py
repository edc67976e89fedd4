"""Benchmarks of the transfer from a foundation model to served models."""
