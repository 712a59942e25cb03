"""The command ``python -m benchmarks.trials``."""

import sys

from .command import main

sys.exit(main())
