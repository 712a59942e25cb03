"""The tables of presets in docs/recipes.md: what ``fast`` and ``cpu`` change, and the training steps of the stages."""

from __future__ import annotations

from typing import Any

from scan_fast.data.loader import steps_per_epoch
from scan_fast.planning import CPU_PRESET
from scan_fast.runs.config import Config, differences, load_config, presets_of, shipped_configs

from .docstrings import ROOT

ORDER = (
    "cifar10", "cifar20", "stl10", "tinyimagenet32", "imagenet50", "imagenet100", "imagenet200", "imagenet", "folder",
    "digits",
)  # fmt: skip
"""The shipped configurations in the order of the tables."""
FROM = {"digits": "reference"}
"""The preset that ``fast`` is compared with, if it is not ``paper``."""
_AS_YAML = {"None": "null", "True": "true", "False": "false"}
IMAGES = {
    "cifar10": 50_000,
    "cifar20": 50_000,
    "stl10": 5_000,
    "tinyimagenet32": 100_000,
    "imagenet50": 64_274,
    "imagenet100": 128_545,
    "imagenet200": 256_558,
    "imagenet": 1_281_167,
    "digits": 1_348,
}
"""Training images of stages two and three; those of a folder are the user's."""


def with_preset(preset: str) -> tuple[str, ...]:
    """Return the shipped configurations that have a preset, in the order of the tables."""
    return tuple(name for name in ORDER if preset in presets_of(shipped_configs()[name]))


def changes(name: str, old_preset: str, new_preset: str) -> dict[str, tuple[str, str]]:
    """Return the settings that one preset changes of another, each with the values before and after."""
    path = shipped_configs()[name]
    before, after = (load_config(path, [f"preset={preset}"]) for preset in (old_preset, new_preset))
    found = {}
    for line in differences(before, after):
        key, _, values = line.partition(": ")
        if key != "preset":
            old, _, new = values.partition(" -> ")
            found[key] = (_AS_YAML.get(old, old), _AS_YAML.get(new, new))
    return found


def table() -> str:
    """Return the table of what ``fast`` changes of ``paper``."""
    return _table({name: changes(name, FROM.get(name, "paper"), "fast") for name in ORDER}, "paper", "fast")


def cpu_table() -> str:
    """Return the table of what ``cpu`` changes of ``fast``."""
    return _table({name: changes(name, "fast", CPU_PRESET) for name in with_preset(CPU_PRESET)}, "fast", CPU_PRESET)


def _table(found: dict[str, dict[str, tuple[str, str]]], old_preset: str, new_preset: str) -> str:
    """Return a row for each setting and pair of values, with the configurations that it holds for."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for name, changed in found.items():
        for key, (old, new) in changed.items():
            rows.setdefault((key, old, new), []).append(name)
    keys = _keys(Config().model_dump(mode="json"))
    order = {key: number for number, key in enumerate(keys)}
    lines = [f"| setting | `{old_preset}` | `{new_preset}` | configurations |", "|---|---|---|---|"]
    for (key, old, new), names in sorted(rows.items(), key=lambda row: order.get(row[0][0], len(order))):
        lines.append(f"| `{key}` | {old} | {new} | {', '.join(names)} |")
    return "\n".join(lines)


def _keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, value in values.items():
        keys += _keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return keys


def steps() -> str:
    """Return the table of training steps of stages two and three; a cell without such a preset or stage is empty."""
    stages = " | ".join(f"stage {stage}, `paper` | `fast` | `{CPU_PRESET}`" for stage in ("two", "three"))
    lines = [f"| configuration | images | {stages} |", "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for name, n in IMAGES.items():
        path = shipped_configs()[name]
        known = presets_of(path)
        cells = []
        for section in ("clustering", "selflabel"):
            for preset in (FROM.get(name, "paper"), "fast", CPU_PRESET):
                settings = getattr(load_config(path, [f"preset={preset}"]), section) if preset in known else None
                count = settings and settings.epochs * steps_per_epoch(n, settings.batch_size)
                cells.append("" if count is None else f"{count:,}")
        lines.append(f"| {name} | {n:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {"presets": table, "cpu": cpu_table, "steps": steps}


def page() -> str:
    """Return docs/recipes.md with the tables of today, each between ``<!-- NAME -->`` and ``<!-- end -->``."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name, make in TABLES.items():
        before, rest = text.split(f"<!-- {name} -->", 1)
        _, after = rest.split("<!-- end -->", 1)
        text = f"{before}<!-- {name} -->\n\n{make()}\n\n<!-- end -->{after}"
    return text
