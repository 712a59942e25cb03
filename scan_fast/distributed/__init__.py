"""The processes of a run that torchrun has started: their parts, what they agree on, and how they end together."""

from .guard import announce, cause, end, is_first_by_environment
from .joining import join, leave
from .ranks import (
    Ranks,
    agreed,
    all_rows,
    alone,
    current,
    gathered,
    is_first,
    mean,
    on_first,
    rows_on_first,
    several,
    share,
    shares,
    wait,
)

__all__ = [
    "Ranks",
    "agreed",
    "all_rows",
    "alone",
    "announce",
    "cause",
    "current",
    "end",
    "gathered",
    "is_first",
    "is_first_by_environment",
    "join",
    "leave",
    "mean",
    "on_first",
    "rows_on_first",
    "several",
    "share",
    "shares",
    "wait",
]
