"""The table in docs/recipes.md of all that the preset ``fast`` changes, from the shipped configurations."""

from __future__ import annotations

import re
from typing import Any

from scan_fast.runs.config import Config, differences, load_config, shipped_configs

from .docstrings import ROOT

ORDER = ("cifar10", "cifar20", "stl10", "imagenet50", "imagenet100", "imagenet200", "imagenet", "folder", "digits")
"""The shipped configurations in the order of the table."""
FROM = {"digits": "reference"}
"""The preset that ``fast`` is compared with, if it is not ``paper``."""
_AS_YAML = {"None": "null", "True": "true", "False": "false"}
START, END = "<!-- presets -->", "<!-- end -->"


def changes(name: str) -> dict[str, tuple[str, str]]:
    """Return the settings that ``fast`` changes of a shipped configuration, each with the values before and after."""
    path = shipped_configs()[name]
    before, after = (load_config(path, [f"preset={preset}"]) for preset in (FROM.get(name, "paper"), "fast"))
    found = {}
    for line in differences(before, after):
        key, _, values = line.partition(": ")
        if key != "preset":
            old, _, new = values.partition(" -> ")
            found[key] = (_AS_YAML.get(old, old), _AS_YAML.get(new, new))
    return found


def table() -> str:
    """Return the table: a row for each setting and pair of values, with the configurations that it holds for."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for name in ORDER:
        for key, (old, new) in changes(name).items():
            rows.setdefault((key, old, new), []).append(name)
    keys = _keys(Config().model_dump(mode="json"))
    order = {key: number for number, key in enumerate(keys)}
    lines = ["| setting | `paper` | `fast` | configurations |", "|---|---|---|---|"]
    for (key, old, new), names in sorted(rows.items(), key=lambda row: order.get(row[0][0], len(order))):
        lines.append(f"| `{key}` | {old} | {new} | {', '.join(names)} |")
    return "\n".join(lines)


def _keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, value in values.items():
        keys += _keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return keys


def page() -> str:
    """Return docs/recipes.md with the table of today."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    return re.sub(f"{START}.*?{END}", lambda _: f"{START}\n\n{table()}\n\n{END}", text, count=1, flags=re.DOTALL)
