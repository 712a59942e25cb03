"""Plans of trials: the strict form of their files, their configurations, and what must stay once there are results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from scan_fast.data.datasets import Splits, open_splits
from scan_fast.errors import ConfigError, ScanFastError, UsageError
from scan_fast.runs.config import Config, differences, find_config, load_config, parse_override
from scan_fast.runs.problems import explain
from scan_fast.schema import Settings
from scan_fast.stages.beforehand import check_beforehand, listed_data
from scan_fast.stages.pipeline import STAGES

from ..files import FOLDER

STAGES_OF_TRIALS = [name for name in STAGES if name != "number"]
"""The stages of a trial, which is given its number of clusters."""
OPEN = f"data.root={FOLDER}"
"""The setting of a plan that leaves the images to the command line."""
OF_MACHINE = ("data.root", "data.resident", "data.workers", "runtime.checkpoint_seconds")
"""The settings that a plan leaves to the command line."""
OWN = {"seed": "seeds", "runtime.device": "device"}
"""Settings that have their own place in a plan."""


class Trial(Settings):
    """One trial of a plan.

    Attributes:
        name: its name in tables and result files.
        changes: ``section.key=value`` words.
        predicted: what is expected, written before the trial runs.
        outcome: what was found, written afterwards.
    """

    name: str = Field(min_length=1)
    changes: tuple[str, ...] = ()
    predicted: str = Field(min_length=1)
    outcome: str | None = None

    @field_validator("name", "predicted", "outcome")
    @classmethod
    def _one_line(cls, text: str | None) -> str | None:
        return None if text is None else " ".join(text.split())


class Plan(Settings):
    """A plan of trials.

    Attributes:
        title: one line.
        config: a configuration file, or the name of a shipped one.
        set: ``section.key=value`` words for all trials.
        until: the last stage to run.
        seeds: the seeds, in the order in which they run.
        device: ``cpu`` or ``cuda``.
        trials: the trials.
    """

    title: str = Field(min_length=1)
    config: str
    set: tuple[str, ...] = ()
    until: Literal["pretext", "mining", "clustering", "selflabel"]
    seeds: tuple[int, ...] = Field(min_length=1)
    device: Literal["cpu", "cuda"] = "cpu"
    trials: tuple[Trial, ...] = Field(min_length=1)

    @field_validator("seeds")
    @classmethod
    def _apart(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(f"must be different numbers from 0, got {', '.join(map(str, seeds))}")
        return seeds

    @property
    def stages(self) -> list[str]:
        """The stages to run, in order."""
        return stages_until(self.until)


def stages_until(last: str) -> list[str]:
    """Return the stages of a trial up to and with the last."""
    return STAGES_OF_TRIALS[: STAGES_OF_TRIALS.index(last) + 1]


def read_plan(path: Path) -> Plan:
    """Read the file of a plan.

    Raises:
        ConfigError: if it is no plan; the message names each problem.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise ConfigError(f"the plan {path} cannot be read: {error.strerror or error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is no plan: it must have {', '.join(Plan.model_fields)}")
    listed = values.get("trials")
    try:
        if isinstance(listed, list):
            # One by one, so that a problem is named with its trial.
            values["trials"] = [_trial(path, number, trial) for number, trial in enumerate(listed, start=1)]
        plan = Plan.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(explain(problem, Plan) for problem in error.errors())}") from None
    names = [trial.name for trial in plan.trials]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{path}: two trials have the name {twice!r}; give each its own")
    if plan.config.startswith(("/", "~")):
        raise ConfigError(f"{path}: config names a file of one machine, {plan.config}; give a relative path or a name")
    for place, words in (("set", plan.set), *((f"trial {trial.name!r}", trial.changes) for trial in plan.trials)):
        for key, value in map(parse_override, words):
            if key in OWN:
                raise ConfigError(f"{path}, {place}: {key} cannot be set; a plan has {OWN[key]} for it")
            if isinstance(value, str) and value.startswith(("/", "~")):
                hint = f"write {OPEN}, and give --set data.root=PATH" if key == "data.root" else "give a relative path"
                raise ConfigError(f"{path}, {place}: {key} names a path of one machine, {value}; {hint}")
    return plan


def _trial(path: Path, number: int, values: Any) -> Trial:
    name = values.get("name") if isinstance(values, dict) else None
    place = f"{path}, trial {number if name is None else repr(name)}"
    if not isinstance(values, dict):
        raise ConfigError(f"{place}: must have {', '.join(Trial.model_fields)}, got {values!r}")
    try:
        return Trial.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{place}: {'; '.join(explain(problem, Trial) for problem in error.errors())}") from None


def hidden(words: Sequence[str]) -> list[str]:
    """Return the words without the path of the images, which says something about one machine only."""
    return [OPEN if word.startswith("data.root=") else word for word in words]


def check_words(words: Sequence[str]) -> None:
    """Refuse words of the command line that would change the experiment of a plan.

    Raises:
        UsageError: names the setting.
    """
    for key, _ in map(parse_override, words):
        if key not in OF_MACHINE:
            raise UsageError(f"--set {key}: with --plan only {', '.join(OF_MACHINE)} can be set; put it into the plan")


def configuration(path: Path, words: Sequence[str], seed: int, device: str) -> Config:
    """Return the configuration of a trial.

    Raises:
        ConfigError: if it is not valid.
    """
    return load_config(path, words, {"seed": seed, "runtime.device": device, "pretext.monitor_every": 0})


def resolve(plan: Plan, path: Path, words: Sequence[str]) -> dict[str, Config]:
    """Return the configuration of each trial with the first seed.

    Args:
        plan: the plan.
        path: its file, for messages.
        words: of the command line; they come last.

    Raises:
        ConfigError: if one is not valid, or two are the same; the message names the trials.
    """
    file = find_config(plan.config)
    found: dict[str, Config] = {}
    for trial in plan.trials:
        try:
            config = configuration(file, [*plan.set, *trial.changes, *words], plan.seeds[0], plan.device)
            why = next(filter(None, map(config.why_without, plan.stages)), None)
            if why is not None:
                raise ConfigError(f"there is no stage until {plan.until}: {why}")
        except ConfigError as error:
            raise ConfigError(f"{path}, trial {trial.name!r}: {error}") from None
        for name, other in found.items():
            if not differences(other, config) and other.runtime == config.runtime:
                raise ConfigError(f"{path}: the trials {name!r} and {trial.name!r} have the same settings")
        found[trial.name] = config
    return found


def check_images(configs: Mapping[str, Config], path: Path, given: Splits | None = None) -> None:
    """Check the configuration of each trial against the images and the device, before anything runs.

    Args:
        configs: by the name of the trial.
        path: the plan's file, for messages.
        given: the images of all trials; by default those that each configuration names.

    Raises:
        ScanFastError: of the first trial that could not run; the message names it.
    """
    opened: dict[str, Splits] = {}
    for name, config in configs.items():
        try:
            if given is None and str(config.data.root) == FOLDER:
                raise ConfigError("the plan leaves the images open: give --set data.root=PATH")
            if given is None:
                data = listed_data(config)
                key = data.model_dump_json()
                if key not in opened:
                    opened[key] = open_splits(data)
                splits = opened[key]
            else:
                splits = given
            check_beforehand(config, splits)
            classes = splits.train.class_names
            if splits.train.labels is None or classes is None or (splits.test and splits.test.labels is None):
                raise ConfigError("trials are compared by labels, and these images have none")
            if config.clustering.n_clusters == "auto":
                raise ConfigError("a trial needs a number of clusters: set clustering.n_clusters=K")
        except ScanFastError as error:
            raise type(error)(f"{path}, trial {name!r}: {error}") from None


def read_result(path: Path) -> dict[str, Any]:
    """Read a result file of trials.

    Raises:
        UsageError: if it cannot be read or is something else.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path} is no result of trials that can be read: {reason}") from error
    if not isinstance(result, dict) or result.get("benchmark") != "trials" or "trials" not in result:
        raise UsageError(f"{path} is no result of benchmarks.trials")
    return result


def check_same(known: Mapping[str, Any], plan: Plan, path: Path, file: Path) -> None:
    """Refuse a result of another plan, and a plan whose settled parts were changed.

    Args:
        known: the content of a result file.
        plan: the plan.
        path: the plan's file.
        file: the result file.

    Raises:
        UsageError: names the difference.
    """
    advice = "undo the change, or choose another --json and --work"
    ours = plan.model_dump(mode="json") | {"set": hidden(plan.set)}
    for key in ("config", "set", "until", "device"):
        if known.get(key) != ours[key]:
            there, here = (_spelled(value) for value in (known.get(key), ours[key]))
            raise UsageError(f"{file} is of another plan: its {key} is {there}, that of {path} {here}; {advice}")
    trials = {trial.name: trial for trial in plan.trials}
    for name, entry in known["trials"].items():
        if not entry["seeds"]:
            continue
        if name not in trials:
            raise UsageError(f"{file} has results of the trial {name!r}, which {path} no longer has; {advice}")
        trial = trials[name]
        for key, before, now in (
            ("changes", entry["changes"], list(trial.changes)),
            ("prediction", entry.get("predicted"), trial.predicted),
        ):
            if before != now:
                raise UsageError(
                    f"the trial {name!r} has results in {file}, so its {key} must stay {_spelled(before)}, "
                    f"got {_spelled(now)}; {advice}"
                )
        missing = sorted(set(entry["seeds"]) - set(map(str, plan.seeds)))
        if missing:
            raise UsageError(f"{file} has results of seed {missing[0]}, which {path} no longer has; {advice}")


def _spelled(value: Any) -> str:
    text = " ".join(value) if isinstance(value, list) else value
    return "not given" if text is None else repr(text)


def result_of(plan: Plan, path: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Return the result of a plan with what is known of it.

    Args:
        plan: the plan.
        path: its file, for messages.
        files: result files, which need not exist; the later ones win.

    Raises:
        UsageError: if a file belongs to another plan (:func:`check_same`).
    """
    result: dict[str, Any] = {
        "benchmark": "trials",
        "title": plan.title,
        "config": plan.config,
        "set": hidden(plan.set),
        "until": plan.until,
        "seeds": list(plan.seeds),
        "device": plan.device,
        "trials": {
            trial.name: {
                "changes": list(trial.changes),
                "predicted": trial.predicted,
                **({} if trial.outcome is None else {"outcome": trial.outcome}),
                "seeds": {},
            }
            for trial in plan.trials
        },
        "untrained": {},
        "environments": [],
    }
    for file in files:
        if not file.exists():
            continue
        known = read_result(file)
        check_same(known, plan, path, file)
        for name, entry in known["trials"].items():
            if entry["seeds"]:
                result["trials"][name]["seeds"] |= entry["seeds"]
                result["trials"][name] |= {key: entry[key] for key in ("untrained",) if key in entry}
        for key, seeds in known.get("untrained", {}).items():
            result["untrained"].setdefault(key, {}).update(seeds)
        result["environments"] += [e for e in known.get("environments", []) if e not in result["environments"]]
    if result["environments"]:
        result["environment"] = result["environments"][-1]
    return result
