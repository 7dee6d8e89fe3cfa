"""Benchmarks that a user runs, over the library's own tasks."""
