"""Let waiting threads spin shortly. This module is imported before torch, whose OpenMP library reads the value once.

By default, a thread of libgomp that waits for others spins for milliseconds before it sleeps. While other programs use
the cores, the threads that are waited for do not run meanwhile, and training steps take many times as long. Who sets
GOMP_SPINCOUNT or OMP_WAIT_POLICY, or imports torch first, decides.
"""

import os
import sys

SPINS = "1000"
"""Rounds of some ten nanoseconds each, so that a thread sleeps after some ten microseconds."""

if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
