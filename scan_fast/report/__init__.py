"""The HTML report of a run: one file that opens from disk."""

from .build import write_report

__all__ = ["write_report"]
