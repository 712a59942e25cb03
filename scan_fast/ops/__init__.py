"""Operators: one module per kernel family; :mod:`scan_fast.ops.reference` has the same in plain PyTorch."""
