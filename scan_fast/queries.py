"""Commands that look at configurations and at finished runs. Each imports what it needs, as in :mod:`.commands`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    from .data.sources import Source
    from .predictor import Predictor


def evaluate_on(options: argparse.Namespace) -> int:
    """Compare the clusters of labelled images with their classes."""
    from .data.kinds import is_prefixed
    from .devices import choose_device
    from .evaluating import check_prototypes
    from .predictor import Predictor

    check_prototypes(options.prototypes)
    predictor = Predictor.load(options.target, choose_device(options.device or "auto", "--device"))
    if not is_prefixed(options.data):
        check_data_folder(options.data)
        check_no_splits(options.data)
    source = predictor.source(options.data, setting="--data")
    title = f"{options.target} on {options.data}"
    return show_evaluation(predictor, source, title, as_json=options.json, prototypes=options.prototypes)


def show_evaluation(
    predictor: Predictor,
    source: Source,
    title: str,
    *,
    as_json: bool,
    prototypes: Path | None = None,
    further: Mapping[str, Any] | None = None,
) -> int:
    """Print how far the clusters of a source's images agree with their classes.

    Args:
        predictor: the model.
        source: the images.
        title: says which model and images these are.
        as_json: print JSON instead of tables.
        prototypes: write one image for each cluster to this PNG, and a table beside it. Images need no classes then.
        further: what else the JSON is to say.

    Returns:
        The exit code.

    Raises:
        DataError: if the images have no classes and no prototypes are asked for.
        UsageError: if ``prototypes`` is no PNG.
    """
    from .errors import DataError
    from .evaluating import Assessment, check_prototypes, save_prototypes

    check_prototypes(prototypes)
    if prototypes is None and (source.labels is None or source.class_names is None):
        raise DataError(f"{title}: there are no classes to compare with; give a folder with a sub-folder for each")
    probabilities, features = predictor.outputs(source)
    found = Assessment.of(probabilities, source)
    if as_json:
        print(json.dumps({**found.to_dict(), **(further or {})}, indent=2))
    else:
        found.show(title)
    if prototypes is not None:
        table = save_prototypes(prototypes, source, probabilities, features, found)
        if not as_json:
            print(f"prototypes: {prototypes}, {table}")
    return 0


def check_no_splits(data: str, option: str = "--data") -> None:
    """Refuse a folder whose sub-folders are splits, which would count as classes."""
    from .data.folders import TEST_NAMES, TRAIN_NAMES
    from .data.kinds import is_prefixed

    if is_prefixed(data):
        return
    folder = Path(data).expanduser()
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if found and all(name.lower() in (*TRAIN_NAMES, *TEST_NAMES) for name in found):
        raise UsageError(f"{option}: {folder} holds {', '.join(found)}; give one of them, such as {folder / found[-1]}")


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


def check_data_folder(data: str, option: str = "--data") -> None:
    """Refuse the value of an option, --data, that is no folder of images and no PREFIX:ARGUMENT."""
    from .data.kinds import is_prefixed

    if is_prefixed(data):
        return
    path = Path(data).expanduser()
    if path.is_file():
        raise UsageError(f"{option}: {data} is a file; give the folder that holds the images")
    if not path.is_dir():
        raise UsageError(f"{option}: there is no folder {data}")
