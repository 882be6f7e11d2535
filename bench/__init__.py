"""Benchmarks: one script a question, results as JSON under `bench/results`."""
