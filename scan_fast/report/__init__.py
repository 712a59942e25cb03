"""The HTML report of a run, and folders of its groups."""

from .build import write_report

__all__ = ["write_report"]
