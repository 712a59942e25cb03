"""Commands that look at configurations and at finished runs. Each imports what it needs, as in :mod:`.commands`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    from .data.sources import Source
    from .predictor import Predictor

MOST_CLASSES = 20
"""Largest number of classes whose confusion table is printed."""


def evaluate_on(options: argparse.Namespace) -> int:
    """Compare the clusters of labelled images with their classes."""
    from .data.kinds import is_prefixed
    from .devices import choose_device
    from .predictor import Predictor

    predictor = Predictor.load(options.target, choose_device(options.device or "auto", "--device"))
    if not is_prefixed(options.data):
        check_data_folder(options.data)
        _check_no_splits(Path(options.data).expanduser())
    source = predictor.source(options.data, setting="--data")
    return show_evaluation(predictor, source, f"{options.target} on {options.data}", as_json=options.json)


def show_evaluation(predictor: Predictor, source: Source, title: str, *, as_json: bool) -> int:
    """Print how far the clusters of a source's images agree with their classes.

    Args:
        predictor: the model.
        source: the images.
        title: says which model and images these are.
        as_json: print JSON instead of tables.

    Returns:
        The exit code.

    Raises:
        DataError: if the images have no classes.
    """
    from .errors import DataError
    from .evaluation.metrics import clustering_metrics, confusion, match_clusters
    from .runs.tables import Confusion
    from .runs.tracker import print_table

    if source.labels is None or source.class_names is None:
        raise DataError(f"{title}: there are no classes to compare with; give a folder with a sub-folder for each")
    probabilities = predictor.probabilities(source)
    confidence, clusters = probabilities.max(dim=1)
    assigned, labels = clusters.numpy(), source.labels.numpy()
    n_clusters, n_classes = predictor.n_clusters, len(source.class_names)
    match = match_clusters(assigned, labels, n_clusters, n_classes, many_to_one=n_clusters > n_classes)
    table = Confusion.of(confusion(assigned, labels, n_clusters, n_classes, match), source.class_names)
    metrics = clustering_metrics(assigned, labels, n_clusters, n_classes, probabilities.numpy())
    facts: dict[str, Any] = {
        "images": len(source),
        "classes": n_classes,
        "clusters": n_clusters,
        "clusters_used": int(clusters.unique().numel()),
        "confidence": float(confidence.mean()),
        **metrics,
    }
    if as_json:
        matrix = {"true": table.row_names, "assigned": table.column_names, "counts": table.counts.tolist()}
        print(json.dumps({**facts, "confusion": matrix}, indent=2))
        return 0
    shown = {name: f"{value:.3f}" if isinstance(value, float) else str(value) for name, value in facts.items()}
    print_table(title, ["", ""], [[name, value] for name, value in shown.items()])
    if n_classes <= MOST_CLASSES:
        # Numbers instead of names above the columns, so that they fit on a screen.
        columns = ["", *(str(number) if number < n_classes else "none" for number in range(len(table.column_names)))]
        rows = [
            [f"{number} {name}", *map(str, counts)]
            for number, (name, counts) in enumerate(zip(table.row_names, table.counts.tolist(), strict=True))
        ]
        print_table("images by class (rows) and class of their cluster (columns)", columns, rows)
    return 0


def _check_no_splits(folder: Path) -> None:
    """Refuse a folder whose sub-folders are splits, which would count as classes."""
    from .data.folders import TEST_NAMES, TRAIN_NAMES

    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if found and all(name.lower() in (*TRAIN_NAMES, *TEST_NAMES) for name in found):
        raise UsageError(f"--data: {folder} holds {', '.join(found)}; give one of them, such as {folder / found[-1]}")


def compare(options: argparse.Namespace) -> int:
    """Print one table of several runs."""
    from .atomic import atomic_file
    from .runs.comparison import compare
    from .runs.folder import RunFolder
    from .runs.tracker import print_table

    if len(set(options.targets)) < len(options.targets):
        raise UsageError(f"each run must be given once, got {' '.join(options.targets)}")
    comparison = compare({name: RunFolder.existing(Path(name)) for name in options.targets})
    if options.csv is not None:
        with atomic_file(options.csv) as file:
            comparison.dump_csv(file)
    if options.json:
        print(json.dumps(comparison.to_dict(), indent=2))
        return 0
    print_table("results on test images", *comparison.table())
    if len(options.targets) > 1:
        print_table("agreement (AMI) on the images in both", *comparison.agreement_table())
    return 0


def list_configs() -> str:
    """Return the shipped configurations with their presets, and what each is for."""
    from .runs.config import shipped_configs

    entries = [(name, *_about_config(path)) for name, path in sorted(shipped_configs().items())]
    width = max((len(name) for name, *_ in entries), default=0)
    return "\n".join(f"{name:<{width}}  presets: {presets}\n{'':<{width}}  {about}" for name, presets, about in entries)


def _about_config(path: Path) -> tuple[str, str]:
    """Return the presets of a shipped configuration and the first sentence of its comment."""
    import yaml

    text = path.read_text(encoding="utf-8")
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    presets = [name for name, change in yaml.safe_load(text).get("presets", {}).items() if isinstance(change, dict)]
    return ", ".join(presets) or "of its base", " ".join(lines).partition(". ")[0]


def list_keys(pattern: str) -> str:
    """Return the keys of the configuration that a pattern selects, each with its type, default and meaning."""
    from .runs.keys import find_keys

    lines = []
    for key in find_keys(pattern):
        kind = f", of kind {key.kind}" if key.kind else ""
        lines += [f"{key.name} = {key.default}  ({key.type}{kind})", f"    {key.meaning}"]
    return "\n".join(lines)


def completion(options: argparse.Namespace) -> int:
    """Print a script that completes the command line in a shell."""
    from .completion import script
    from .runs.config import shipped_configs
    from .runs.keys import all_keys

    keys = list(dict.fromkeys(key.name for key in all_keys()))
    print(script(options.shell, options.parser, sorted(shipped_configs()), keys), end="")
    return 0


def check_data_folder(data: str) -> None:
    """Refuse a --data that is no folder of images and no PREFIX:ARGUMENT."""
    from .data.kinds import is_prefixed

    if is_prefixed(data):
        return
    path = Path(data).expanduser()
    if path.is_file():
        raise UsageError(f"--data: {data} is a file; give the folder that holds the images")
    if not path.is_dir():
        raise UsageError(f"--data: there is no folder {data}")
