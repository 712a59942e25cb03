"""Fixtures of tests of the pages."""

from driver_fixtures import _process_state

__all__ = ["_process_state"]
