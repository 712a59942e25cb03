"""Numbers as the report writes them."""

from __future__ import annotations

import math


def number(value: float, digits: int = 4) -> str:
    """Write a number with at most ``digits`` significant digits, and whole numbers in full up to a million."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    text = f"{value:.{digits}g}"
    return text.replace("e+0", "e").replace("e+", "e")


def percent(value: float) -> str:
    """Write a share: ``12.5 %``, with a narrow space; a dash for NaN."""
    return "–" if math.isnan(value) else f"{100 * value:.1f}\u202f%"


def count(value: int) -> str:
    """Write a whole number with narrow spaces between thousands."""
    return f"{value:,}".replace(",", "\u202f")


def duration(seconds: float) -> str:
    """Write a time span: ``0.4 s``, ``12 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
