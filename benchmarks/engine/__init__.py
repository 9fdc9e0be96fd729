"""Benchmark of the engine: one job, several contenders, one table. ``python benchmarks/engine --help``."""
