"""Fixtures of tests of networks and of their files."""

from hostile_files import no_network

__all__ = ["no_network"]
