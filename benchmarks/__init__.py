"""Benchmarks against what a user would write today, for developers: `python -m benchmarks.NAME`."""
