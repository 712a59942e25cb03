"""Fixtures of tests that run the driver."""

from driver_fixtures import _process_state, finished, finished_run, images

__all__ = ["_process_state", "finished", "finished_run", "images"]
