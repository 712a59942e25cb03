"""Stages that several runs share: they are done once, and each of the runs takes what they have written.

Runs share a stage if their configurations agree in everything that it depends on (:func:`dependencies`). A shared stage
has its own run folder, whose name holds a digest of these settings. So it is the same whichever of the runs are asked
for, and it is resumed like any other run. The runs that take it hold hard links of its artifacts. Several
sweeps and ablations may have one folder of shared stages.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import distributed
from .errors import RunError
from .models.weight_files import file_digest
from .runs import artifacts
from .runs.config import MACHINE, Config, flatten
from .runs.folder import RunFolder
from .runs.records import FILES, TAKEN, Summary
from .runs.tracker import Tracker
from .stages.pipeline import STAGES, run_stages, stages_of
from .training.context import Context, open_context

SHARED = "shared"
"""The folder of shared stages, beside the folders of the runs."""
STEPS: dict[str, tuple[str, ...]] = {
    "pretext": ("pretext",),
    "mining": ("mining",),
    "clustering": ("number", "clustering"),
}
"""The steps that runs may share, in order: by name, the stages of each."""
OF_PRETEXT = ("pretext", "mining")
"""The steps that runs of different seeds may share."""


@dataclass(frozen=True)
class Planned:
    """One of several runs that may share stages.

    Attributes:
        folder: its run folder.
        config: its configuration, with its seed.
        label: names it in front of each line on the screen.
        pretext_seed: the seed of the pretext stage and mining, which are then shared with runs of other seeds; None for
            its own seed.
    """

    folder: Path
    config: Config
    label: str
    pretext_seed: int | None = None

    def seed_of(self, step: str) -> int:
        """Return the seed of a step."""
        return self.config.seed if self.pretext_seed is None or step not in OF_PRETEXT else self.pretext_seed

    def config_of(self, step: str) -> Config:
        """Return the configuration, with the seed of a step."""
        return self.config.with_seed(self.seed_of(step))

    def key(self, step: str) -> str:
        """Return a digest of everything that the artifacts of a step depend on, seeds included."""
        facts = dependencies(self.config, step) | {"seeds": [self.seed_of(each) for each in (OF_PRETEXT[0], step)]}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]

    def is_pinned(self, step: str) -> bool:
        """Return whether a step is of a seed that other runs share."""
        return self.pretext_seed is not None and step in OF_PRETEXT


@dataclass(frozen=True)
class Outcome:
    """The results of several runs.

    Attributes:
        summaries: of the runs, in their order.
    """

    summaries: list[Summary]

    @property
    def shared_seconds(self) -> dict[str, float]:
        """By folder, the time of the stages that runs have taken."""
        taken = {
            (Path(entry[TAKEN]["from"]).name, stage): entry[TAKEN]["seconds"]
            for summary in self.summaries
            for stage, entry in summary.stages.items()
            if TAKEN in entry
        }
        found: dict[str, float] = {}
        for (folder, _), seconds in taken.items():
            found[folder] = round(found.get(folder, 0.0) + seconds, 3)
        return found

    @property
    def seconds(self) -> float:
        """The time of all stages; shared ones count once."""
        return round(sum(each.seconds for each in self.summaries) + sum(self.shared_seconds.values()), 3)


def dependencies(config: Config, step: str, noted: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return by dotted key the settings that the artifacts of a step depend on, and those of the steps before it.

    Files that settings name, such as weights, count by their content too. The images do not: each run identifies its
    own. The seed is left out, and so is what belongs to the machine.

    Args:
        config: the configuration.
        step: one of :data:`STEPS`.
        noted: by path, digests of files that are to count in place of their content (:func:`noted_files`).
    """
    values = config.model_dump(mode="json", exclude=MACHINE)
    steps = list(STEPS)
    apart = ("name", "preset", "seed", "evaluation", *steps[steps.index(step) + 1 :], "selflabel")
    facts = dict(flatten({section: value for section, value in values.items() if section not in apart}))
    for key, path in _files(config):
        if key in facts:
            facts[f"content of {path}"] = (noted or {}).get(str(path)) or (
                file_digest(path) if path.is_file() else None
            )
    # The space of the kNN check, the size of the plain view, and the batches of passes over all images.
    facts["mining.features"] = config.mining.features
    facts["clustering.view.size"] = config.clustering.view.size
    facts["evaluation.batch_size"] = config.evaluation.batch_size
    facts["clustering.update=features"] = not config.clustering.trains
    if config.precision == "auto":  # what a trial decides depends on whether anything is trained
        facts["a stage that trains"] = config.trains
    return facts


def _files(config: Config) -> Iterator[tuple[str, Path]]:
    """Yield the files that settings name, images apart, each with its dotted key."""
    for key, value in flatten(config.model_dump(exclude={"data"})):
        yield from ((key, each) for each in (value if isinstance(value, tuple) else (value,)) if isinstance(each, Path))


def noted_files(run: RunFolder) -> dict[str, str]:
    """Return by path the digests of the files that a run has read for its finished stages, as it has noted them."""
    found: dict[str, str] = {}
    if run.has_results() and run.has(artifacts.BACKBONE):
        start = run.read(artifacts.BACKBONE)
        if start.weights is not None and start.digest is not None:
            found[start.weights] = start.digest
    for entry in run.summary().stages.values():
        found |= entry.get(FILES, {})
    return found


def take(run: RunFolder, source: RunFolder, config: Config, steps: Sequence[str]) -> None:
    """Take the finished artifacts of another run for steps that are not finished, and note it in summary.json.

    With several ranks, rank 0 does.

    Args:
        run: the run that takes, entered.
        source: the run that has finished these steps.
        config: the configuration of the run that takes.
        steps: the first of :data:`STEPS`, as many as are to be taken.

    Raises:
        RunError: if the configurations differ in what the steps depend on, or so does the content of a file that they
            name, or a step of the source is not finished.
    """
    distributed.on_first(lambda: _take(run, source, config, steps))


def _take(run: RunFolder, source: RunFolder, config: Config, steps: Sequence[str]) -> None:
    ours = dependencies(config, steps[-1])
    theirs = dependencies(source.read(artifacts.CONFIG), steps[-1], noted_files(source))
    keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    different = [f"{key}: {theirs.get(key)} -> {ours.get(key)}" for key in keys]
    if different:
        raise RunError(
            f"{run.path} cannot take {' and '.join(steps)} of {source.path}: they depend on what differs "
            f"({'; '.join(different)})"
        )
    entries = source.summary().stages
    for artifact in artifacts.AT_START:
        if source.has(artifact) and not run.has_results():
            run.take(artifact, source)
    for stage in (stage for step in steps for stage in STEPS[step] if stage in entries or stage == step):
        if run.finished(stage):
            continue
        for artifact in STAGES[stage].outputs:
            source.require(artifact)
            run.take(artifact, source)
        run.drop_metrics(stage, 0)
        for entry in source.metrics():
            if entry.stage == stage:
                run.append_metrics(entry)
        results = {key: value for key, value in entries[stage].items() if key != "seconds"}
        former = results.get(TAKEN)
        results[TAKEN] = {
            "from": os.path.relpath(source.path / former["from"] if former else source.path, run.path),
            "seed": former["seed"] if former else source.read(artifacts.CONFIG).seed,
            "seconds": former["seconds"] if former else entries[stage]["seconds"],
        }
        run.finish_stage(stage, 0.0, results, config.seed)


def seconds_of_one(summary: Summary) -> float:
    """Return the time that a run's stages took together, those included that it has taken from elsewhere."""
    return summary.seconds + sum(entry[TAKEN]["seconds"] for entry in summary.stages.values() if TAKEN in entry)


def run_all(plans: Sequence[Planned], shared: Path, *, share: Sequence[str], always: bool, quiet: bool) -> Outcome:
    """Do runs that are not finished; what several of them share is done once.

    Args:
        plans: the runs.
        shared: the folder of the shared stages' folders.
        share: the steps that runs of the same seed share. Runs with a ``pretext_seed`` share its steps in any case.
        always: share the pretext stage and mining even if one run needs them, for plans that come later.
        quiet: print errors only.

    Raises:
        RunError: before anything is done, if a folder holds another experiment or its pretext stage is of another seed.
    """
    for plan in plans:
        distributed.on_first(lambda plan=plan: check(plan))  # type: ignore[misc]
    stages = _Shared(plans, shared, share, always, quiet)
    summaries = []
    for plan in plans:
        with _opened(plan.folder, plan.config, plan.label, quiet, stages.provider(plan)) as context:
            run_stages(context, stages_of(context))
            summaries.append(context.run.summary())
    return Outcome(summaries)


def check(plan: Planned) -> None:
    """Refuse a folder of another experiment.

    Raises:
        RunError: if the configuration is another one, the pretext stage or mining is of another seed than planned, or a
            file that a finished stage has read has changed since.
    """
    run = RunFolder.open(plan.folder, plan.config)
    stages = run.summary().stages
    for step in OF_PRETEXT:
        if step not in stages:
            continue
        found, wanted = stages[step].get(TAKEN, {}).get("seed", plan.config.seed), plan.seed_of(step)
        if found != wanted:
            option = "give --share-pretext" if plan.pretext_seed is None else "leave out --share-pretext"
            raise RunError(
                f"{plan.folder} has the {step} stage of seed {found}, not of seed {wanted}: {option}, or choose "
                "another folder with --out"
            )
    for path, digest in noted_files(run).items():
        if Path(path).is_file() and file_digest(Path(path)) != digest:
            raise RunError(
                f"{plan.folder} was begun with another content of {path}: restore the file, or choose another folder "
                "with --out"
            )


class _Shared:
    """The folders of shared stages: which there are, and who takes from which."""

    def __init__(self, plans: Sequence[Planned], folder: Path, share: Sequence[str], always: bool, quiet: bool) -> None:
        self._folder = folder
        self._quiet = quiet
        self._share = share
        self._always = OF_PRETEXT if always else ()
        self._takers = Counter((step, plan.key(step)) for plan in plans for step in STEPS)

    def provider(self, plan: Planned) -> tuple[RunFolder, list[str]] | None:
        """Return the run folder that has finished what a run takes, and these steps; do them if they are not done.

        None if the run shares nothing, or has all that it shares.
        """
        steps = [
            step
            for step in STEPS
            if plan.config.why_without(step) is None
            and (
                plan.is_pinned(step)
                or (step in self._share and (step in self._always or self._takers[step, plan.key(step)] > 1))
            )
        ]
        if all(map(RunFolder(plan.folder).finished, steps)):
            return None
        return self._provide(plan, steps), steps

    def _provide(self, plan: Planned, steps: list[str]) -> RunFolder:
        """Return the run folder of the last of these steps, which takes the others from theirs."""
        *former, step = steps
        config = plan.config_of(step)
        provider = (self._provide(plan, former), former) if former else None
        run = RunFolder(self._folder / f"{step}-seed{config.seed}-{plan.key(step)}")
        if run.has(artifacts.CONFIG):
            # The settings of what comes later may be those of another run; those of the machine are ours.
            config = run.read(artifacts.CONFIG).model_copy(update={"runtime": config.runtime})
        if not run.finished(step):
            with _opened(run.path, config, f"shared, seed {config.seed}: ", self._quiet, provider) as context:
                run_stages(context, [stage for stage in stages_of(context) if stage in STEPS[step]], results=False)
        return run


@contextmanager
def _opened(
    folder: Path, config: Config, label: str, quiet: bool, provider: tuple[RunFolder, list[str]] | None
) -> Iterator[Context]:
    """Enter a run folder, take what is shared, and open the context."""
    run = RunFolder.open(folder, config)
    with run:
        tracker = Tracker(run, quiet=quiet, prefix=label)
        if provider is not None:
            source, steps = provider
            take(run, source, config, steps)
        yield open_context(config, run, tracker)
