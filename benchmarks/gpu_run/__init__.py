"""The ``fast`` CIFAR-10 preset on a GPU in the minutes that are left: ``python -m benchmarks.gpu_run --minutes 6``."""

import time

BEGIN = time.monotonic()
"""When this process began, as far as Python can tell: before PyTorch is imported."""
