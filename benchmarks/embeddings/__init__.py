"""Benchmarks of tables and their memory."""
