"""Benchmarks: ``python -m benchmarks.NAME [--device cpu|cuda] [--json FILE]``."""
