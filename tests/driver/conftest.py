"""Fixtures of tests that run the driver."""

from driver_fixtures import _process_state, finished, finished_run, images
from hostile_files import no_network

__all__ = ["_process_state", "finished", "finished_run", "images", "no_network"]
