"""Cases of the self-tests: one module per family with CUDA kernels, whose ``findings(device)`` yields what it compares.

:func:`scan_fast.ops.self_test.run` runs them. :mod:`~scan_fast.ops.self_tests.comparison` holds what they share.
"""
