"""Ablations: variants of one configuration, each run with several seeds, in one table.

An ablation is a YAML file. The shipped ones, those of the SCAN paper, are in ``configs/ablations``::

    title: Threshold of self-labelling
    found: what the paper found, in a sentence
    base: {mining: {k: 50}}           # changes for all variants, if there are any; words of the command line come later
    variants:
      "0.9": {selflabel: {threshold: 0.9}}
      "0.99": {selflabel: {threshold: 0.99}}

Changes are those of a configuration file, with three additions, so that one file fits every data set:

- A change of ``kind`` keeps the settings of the section that the new kind has too. So ``{kind: moco}`` keeps the view.
- ``{from: pretext.method.view}`` takes the value that the configuration has there.
- ``n_clusters: 2x`` is twice the number of the configuration, or of its classes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .data.datasets import Splits, open_splits
from .errors import ConfigError, ScanFastError, UsageError
from .runs import artifacts
from .runs.config import (
    CONFIG_FOLDERS,
    Config,
    build_config,
    change_config,
    differences,
    flatten,
    load_config,
    merge,
    parse_override,
)
from .runs.keys import all_keys
from .runs.plain_yaml import parse_yaml
from .runs.records import Summary
from .runs.variants import MEASURES, VariantTable
from .sharing import SHARED, STEPS, Planned, run_all, seconds_of_one
from .stages.beforehand import check_beforehand, listed_data
from .sweep import collect, statistics_of

_FIELDS = ("title", "found", "base", "variants")
_NAME = re.compile(r"[\w+-][\w.+ -]*")
_TIMES = re.compile(r"(\d{1,9})x")


@dataclass(frozen=True)
class Ablation:
    """Variants of a configuration.

    Attributes:
        name: of its file.
        title: what is varied.
        found: what is known about it, such as the result of a paper; may be empty.
        base: changes for all variants.
        variants: changes by the variant's name.
    """

    name: str
    title: str
    found: str
    base: dict[str, Any]
    variants: dict[str, dict[str, Any]]

    def only(self, names: str | None) -> Ablation:
        """Return the ablation with some variants only, named with commas; with all of them for None.

        Raises:
            UsageError: if there is no such variant; the message names the nearest.
        """
        if names is None:
            return self
        wanted = [name.strip() for name in names.split(",")]
        for name in wanted:
            if name not in self.variants:
                near = difflib.get_close_matches(name, self.variants, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                known = ", ".join(self.variants)
                raise UsageError(f"--variants: {self.name} has no variant {name!r}{hint}; it has {known}")
        return replace(self, variants={name: self.variants[name] for name in self.variants if name in wanted})


# -- files -------------------------------------------------------------------------------------------------------------


def shipped_ablations() -> dict[str, Path]:
    """Return the files of the shipped ablations by name."""
    return {file.stem: file for folder in CONFIG_FOLDERS for file in sorted(folder.glob("ablations/*.yaml"))}


def find_ablation(name: str) -> Ablation:
    """Read an ablation: a file, or a shipped one by its name.

    Raises:
        ConfigError: if there is none, with the nearest name, or the file holds anything else.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return read_ablation(path)
    shipped = shipped_ablations()
    if name in shipped:
        return read_ablation(shipped[name])
    near = difflib.get_close_matches(path.stem, shipped, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ConfigError(f"there is no ablation {name!r}{hint}; give a YAML file or one of {', '.join(sorted(shipped))}")


def read_ablation(path: Path) -> Ablation:
    """Read the file of an ablation.

    Raises:
        ConfigError: if it is no YAML or holds anything else; the message names what.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not values.get("variants"):
        raise ConfigError(f"{path} is no ablation: it must have variants, each a name with its changes")
    for key in values:
        if key not in _FIELDS:
            near = difflib.get_close_matches(str(key), _FIELDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"an ablation has {', '.join(_FIELDS)}"
            raise ConfigError(f"{path}: unknown key {key}: {hint}")
    base, variants = values.get("base") or {}, values["variants"]
    if not isinstance(variants, dict):
        raise ConfigError(f"{path}: variants must be names with their changes, got {variants!r}")
    changes = {str(name): {} if change is None else change for name, change in variants.items()}
    for name, change in [("base", base), *changes.items()]:
        if not isinstance(change, dict):
            raise ConfigError(f"{path}: {name} must hold sections (pretext, clustering, ...), got {change!r}")
    for name in changes:
        if not _NAME.fullmatch(name) or name == SHARED:
            raise ConfigError(f"{path}: a variant must have a name that a folder can have, got {name!r}")
    title, found = (" ".join(str(values.get(key) or "").split()) for key in ("title", "found"))
    return Ablation(path.stem, title or path.stem, found, base, changes)


def list_ablations() -> str:
    """Return the shipped ablations with their variants, and what the paper found."""
    entries = [find_ablation(name) for name in shipped_ablations()]
    width = max((len(entry.name) for entry in entries), default=0)
    lines = []
    for entry in entries:
        lines += [f"{entry.name:<{width}}  {entry.title}: {', '.join(entry.variants)}", f"{'':<{width}}  {entry.found}"]
    return "\n".join(lines)


# -- configurations ----------------------------------------------------------------------------------------------------


def configure(ablation: Ablation, path: Path, overrides: Sequence[str]) -> Config:
    """Return the configuration that is varied: that of a file, the ablation's ``base``, then words of the command line.

    Raises:
        ConfigError: if it is not valid.
    """
    config = load_config(path, overrides)
    if not ablation.base:
        return config
    try:
        changed = _changed(config, ablation.base, lambda: _groups(config))
    except ConfigError as error:
        raise ConfigError(f"ablation {ablation.name}, base: {error}") from None
    return change_config(changed, (parse_override(text) for text in overrides))


def variants_of(ablation: Ablation, config: Config) -> dict[str, Config]:
    """Return the configuration of each variant.

    Raises:
        ConfigError: if one is not valid, or two are the same; the message names them.
    """
    found: dict[str, Config] = {}
    for name, change in ablation.variants.items():
        try:
            found[name] = _changed(config, change, lambda: _groups(config))
        except ConfigError as error:
            raise ConfigError(f"ablation {ablation.name}, variant {name}: {error}") from None
    for name, variant in found.items():
        same = next((other for other in found if other != name and not differences(found[other], variant)), None)
        if same is not None:
            raise ConfigError(
                f"ablation {ablation.name}: the variants {name} and {same} are the same for this configuration"
            )
    return found


def _changed(config: Config, change: Mapping[str, Any], groups: Callable[[], int]) -> Config:
    values = config.model_dump(mode="json")
    return build_config(merge(values, _resolved(change, values, "", values, groups)))


def _resolved(change: Any, base: Any, place: str, values: Mapping[str, Any], groups: Callable[[], int]) -> Any:
    """Return a change without the additions of an ablation, see the module.

    Args:
        change: the change.
        base: what it changes.
        place: its dotted key.
        values: all values of the configuration.
        groups: returns the number of clusters of the configuration.
    """
    if isinstance(change, dict) and set(change) == {"from"}:
        return _value_at(str(change["from"]), values)
    if place == "clustering.n_clusters" and isinstance(change, str) and (times := _TIMES.fullmatch(change)):
        return int(times[1]) * groups()
    if isinstance(change, str) and isinstance(base, dict) and "kind" in base:
        change = {"kind": change}
    if not isinstance(change, dict):
        return change
    if base is None:
        key = f"{place}.{next(iter(change))}" if change else place
        raise ConfigError(f"{key} cannot be changed: this configuration has {place}: null")
    if not isinstance(base, dict):
        return change
    kind = change.get("kind")
    kept = {}
    if kind is not None and "kind" in base and kind != base["kind"]:
        known = _settings_of(place, str(kind))
        kept = {key: value for key, value in base.items() if key in known and key not in change}
    inner = f"{place}." if place else ""
    return kept | {
        key: _resolved(value, base[key], f"{inner}{key}", values, groups) if key in base else value
        for key, value in change.items()
    }


def _settings_of(place: str, kind: str) -> set[str]:
    """Return the names of the settings of a section's kind."""
    start = f"{place}."
    names = (key.name.removeprefix(start) for key in all_keys() if key.kind == kind and key.name.startswith(start))
    return {name.partition(".")[0] for name in names}


def _value_at(key: str, values: Mapping[str, Any]) -> Any:
    found: Any = values
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            raise ConfigError(f"from: {key}: this configuration has no such value")
        found = found[part]
    return found


def _groups(config: Config) -> int:
    wanted = config.clustering.n_clusters
    if isinstance(wanted, int):
        return wanted
    names = None if wanted == "auto" else open_splits(listed_data(config)).train.class_names
    if names is None:
        raise ConfigError("the number of clusters must be known to take a multiple of it: give clustering.n_clusters=K")
    return len(names)


def check_variants(ablation: Ablation, variants: Mapping[str, Config]) -> None:
    """Check each variant against the images and the device, before anything is trained.

    Raises:
        ScanFastError: of the first variant that could not run; the message names it.
    """
    opened: dict[str, Splits] = {}
    for name, config in variants.items():
        try:
            data = listed_data(config)
            key = data.model_dump_json()
            if key not in opened:
                opened[key] = open_splits(data)
            check_beforehand(config, opened[key])
        except ScanFastError as error:
            raise type(error)(f"ablation {ablation.name}, variant {name}: {error}") from None


# -- runs --------------------------------------------------------------------------------------------------------------


def run_ablation(
    ablation: Ablation,
    config: Config,
    seeds: Sequence[int],
    parent: Path,
    *,
    share_pretext: bool = False,
    shared: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run each variant with each seed in ``parent/VARIANT/seedN``; write ``ablation.json`` and ``ablation.csv``.

    What variants agree in is done once for each seed, in ``parent/shared``: the pretext stage, mining, and the
    clustering stage of variants that differ in self-labelling only. Finished runs are not repeated; unfinished ones
    continue.

    Args:
        ablation: the variants.
        config: the configuration that is varied (:func:`configure`).
        seeds: the seeds.
        parent: holds the run folders.
        share_pretext: share the pretext stage and mining of the configuration's own seed among all seeds, too.
        shared: the folder of what is shared, in place of ``parent/shared``. Ablations and sweeps that name the same
            folder do the pretext stage and mining once.
        quiet: print errors only.

    Returns:
        The content of ablation.json: "variants" has by name the "changes" by dotted key, the "stage" that the figures
        are of, and for each of :data:`.runs.variants.MEASURES` that is known mean, std, best, best_seed and values.
        ``acc`` is of the best one-to-one matching, or of each cluster's most frequent class if there are more clusters
        than classes ("acc_is"). A variant's ``seconds`` are those of one run, with the stages that it shares; "seconds"
        of all runs count these once.

    Raises:
        ScanFastError: before anything is trained, if a variant cannot run or a folder holds another experiment.
    """
    variants = variants_of(ablation, config)
    check_variants(ablation, variants)
    pinned = config.seed if share_pretext else None
    plans = {
        (name, seed): Planned(
            parent / name / f"seed{seed}",
            variant.with_seed(seed),
            f"{name}, seed {seed}: ",
            pinned,
        )
        for seed in seeds
        for name, variant in variants.items()
    }
    outcome = run_all(
        list(plans.values()),
        shared or parent / SHARED,
        share=tuple(STEPS),
        always=shared is not None,
        quiet=quiet,
    )
    summaries = dict(zip(plans, outcome.summaries, strict=True))
    seconds: dict[str, Any] = {"total": outcome.seconds}
    if outcome.shared_seconds:
        seconds["shared"] = outcome.shared_seconds
    results: dict[str, Any] = {
        "ablation": ablation.name,
        "title": ablation.title,
        "found": ablation.found,
        "config": config.name,
        "preset": config.preset,
        "seeds": list(seeds),
        "share_pretext": share_pretext,
        "variants": {
            name: {
                "changes": dict(flatten(ablation.variants[name])),
                **_measured([summaries[name, seed] for seed in seeds], seeds),
            }
            for name in variants
        },
        "seconds": seconds,
    }
    artifacts.write(artifacts.ABLATION, results, parent / artifacts.ABLATION.name)
    artifacts.write(artifacts.ABLATION_TABLE, table_of(results), parent / artifacts.ABLATION_TABLE.name)
    return results


def _measured(summaries: Sequence[Summary], seeds: Sequence[int]) -> dict[str, Any]:
    """Return the last stage of a variant's runs, and the statistics of each measure that is known."""
    stage = list(summaries[0].stages)[-1]
    found = collect(summaries)
    place = f"{stage} test " if summaries[0].reported == "test" else f"{stage} "
    accuracy = "acc_many_to_one" if f"{place}acc_many_to_one" in found else "acc"
    keys = {"acc": f"{place}{accuracy}", "nmi": f"{place}nmi", "ari": f"{place}ari", "purity": "mining purity"}
    entry: dict[str, Any] = {"stage": stage}
    if keys["acc"] in found:
        entry["acc_is"] = accuracy
    entry |= {measure: statistics_of(found[key], seeds) for measure, key in keys.items() if key in found}
    return entry | {"seconds": statistics_of([seconds_of_one(summary) for summary in summaries])}


def table_of(results: Mapping[str, Any]) -> VariantTable:
    """Return the table of what :func:`run_ablation` returned."""
    rows: list[dict[str, Any]] = []
    for name, entry in results["variants"].items():
        row: dict[str, Any] = {"variant": name, "seeds": len(results["seeds"])}
        for measure in MEASURES:
            row |= {f"{measure}_{figure}": entry.get(measure, {}).get(figure) for figure in ("mean", "std", "best")}
        rows.append(row)
    return VariantTable(rows)


def cells(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows for the screen or a page: mean ± standard deviation in percent, and the best accuracy."""
    entries = results["variants"]
    known = [measure for measure in MEASURES if any(measure in entry for entry in entries.values())]
    titles = {"acc": ["ACC", "best"], "nmi": ["NMI"], "ari": ["ARI"]}
    columns = ["variant", *(title for measure in known for title in titles.get(measure, [measure]))]
    rows = []
    for name, entry in entries.items():
        row = [name]
        for measure in known:
            figures = entry.get(measure)
            scale, digits = (1, 0) if measure == "seconds" else (100, 1)
            spread = len(results["seeds"]) > 1 and measure != "seconds"
            mean = "" if figures is None else f"{scale * figures['mean']:.{digits}f}"
            row.append(mean + (f" ± {scale * figures['std']:.{digits}f}" if mean and spread else ""))
            if measure == "acc":
                best = "" if figures is None else f"{scale * figures['best']:.{digits}f} (seed {figures['best_seed']})"
                row.append(best)
        rows.append(row)
    return columns, rows
