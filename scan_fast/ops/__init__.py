"""The operators: one module per kernel family, plus their plain PyTorch twins in :mod:`scan_fast.ops.reference`."""
