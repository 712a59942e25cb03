"""Formats the summary of the GPU suite for the terminal. Standard library only."""

from __future__ import annotations

from typing import Any


def report(summary: dict[str, Any]) -> list[str]:
    """Return the lines: times first, then what is verified."""
    lines = []
    for timing in summary["timings"]:
        eager = next((c["seconds"] for c in timing["contenders"] if c["name"] == "eager" and "seconds" in c), None)
        for c in timing["contenders"]:
            text = c.get("skipped") or c.get("failed") or ""
            if "seconds" in c:
                faster = f"{eager / c['seconds']:7.2f} x eager" if eager else ""
                share = f"{c['of_limit']:5.0%} of the limit" if "of_limit" in c else ""
                text = f"{1e6 * c['seconds']:11.1f} us {faster:<15} {share}"
            lines.append(f"{timing['family']:<11} {timing['timing']:<30} {c['name']:<32} {text}".rstrip())
    for way in (entry for entry in summary["step"] if "way" in entry):
        text = way.get("failed") or way.get("skipped")
        if "seconds" in way:
            text = f"{1e3 * way['seconds']:11.2f} ms {way['views_per_second']:12,.0f} views/s"
        lines.append(f"step        {way['way']:<30} {text}")
    for name, kernel in summary["kernels"].items():
        reason = f": {kernel['reason']}" if kernel["reason"] else ""
        waived = f", without {', '.join(kernel['waived'])}" if kernel["waived"] else ""
        lines.append(f"{kernel['status']:<11} {name} ({kernel['cases']} cases{waived}){reason}")
    return lines
