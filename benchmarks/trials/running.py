"""Runs the stages of a trial: each once for all trials that share it, resumed at its checkpoint, with its time.

On a CPU that is CPU time, which other programs disturb less; on a GPU it is elapsed time.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from scan_fast.data.datasets import Splits
from scan_fast.evaluation.probes import kmeans_baseline, kmeans_metrics
from scan_fast.runs import artifacts
from scan_fast.runs.artifacts import CONFIG, PRETEXT_MODEL, Artifact, checkpoint
from scan_fast.runs.config import Config, flatten
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.records import Checkpoint, StageResult
from scan_fast.sharing import STEPS, dependencies, take
from scan_fast.stages.embedding import knn_check
from scan_fast.stages.handover import Handover
from scan_fast.stages.pipeline import STAGES, run_stage
from scan_fast.stages.pretext import start_model
from scan_fast.training.context import Context, open_context, seeded
from scan_fast.training.process import kept_memory

from ..files import read_json, write_json
from ..gpu_run.watch import Watch, WatchedTracker

T = TypeVar("T")

RESULTS = "results.json"
"""In the folder of a finished stage: its metrics and seconds."""
SECONDS = "seconds.json"
"""In the folder of a stage: its seconds until its last two checkpoints, and until its end."""
WANTED = ("knn_acc", "purity", "test_purity", "acc", "nmi")
"""Metrics that are kept."""

Figures = dict[str, dict[str, float]]
"""By stage, metrics and seconds."""


@dataclass(frozen=True)
class Clock:
    """The measure of a trial's cost.

    Attributes:
        key: of the seconds in a result file.
        now: returns seconds.
    """

    key: str
    now: Callable[[], float]


def clock_of(device: str) -> Clock:
    """Return the clock for a device: CPU time for a CPU, elapsed time for a GPU, whose work no CPU time shows."""
    return Clock("cpu_seconds", time.process_time) if device == "cpu" else Clock("seconds", time.perf_counter)


class MeasuredFolder(RunFolder):
    """The folder of one stage of a trial, which also knows how much time the stage has taken.

    Before a checkpoint is written, the seconds until it are noted under its position. The note of the checkpoint
    before is kept, so that there is one for whichever checkpoint a kill leaves. Work after the last checkpoint, which a
    resumed stage does again, counts once.
    """

    def __init__(self, path: Path, stage: str, clock: Clock) -> None:
        super().__init__(path)
        self._stage = stage
        self._now = clock.now
        self._checkpoint = checkpoint(stage)
        self._notes: dict[str, float] = {}
        self._before = 0.0
        self._begin = self._now()

    def begin(self) -> None:
        """Start to measure, from the checkpoint if there is one."""
        file = self.path / SECONDS
        self._notes = read_json(file) if file.exists() else {}
        if self.has(self._checkpoint):
            state = self.read(self._checkpoint)
            self._before = self._notes.get(_position(state.epoch, state.step), 0.0)
        self._begin = self._now()

    @property
    def seconds(self) -> float:
        """Seconds of the finished stage, over all its interruptions."""
        return float(read_json(self.path / SECONDS)["end"])

    def write(self, artifact: Artifact[T], content: T) -> Path:
        """Write an artifact; note the time first if it is the checkpoint."""
        if artifact.name == self._checkpoint.name:
            assert isinstance(content, Checkpoint)
            self._note(_position(content.epoch, content.step))
        return super().write(artifact, content)

    def finish_stage(self, stage: str, seconds: float, results: Mapping[str, Any], seed: int) -> None:
        """Enter a finished stage into summary.json; note the time first if it is the measured one."""
        if stage == self._stage:
            self._note("end")
        super().finish_stage(stage, seconds, results, seed)

    def _note(self, position: str) -> None:
        self._notes.pop(position, None)
        last = dict(list(self._notes.items())[-1:])
        self._notes = {**last, position: self._before + self._now() - self._begin}
        write_json(self.path / SECONDS, self._notes)


def _position(epoch: int, step: int) -> str:
    return f"epoch {epoch}, step {step}"


def stage_key(config: Config, stages: Sequence[str]) -> str:
    """Return a digest of everything that the result and the cost of the last of the given first stages depend on."""
    steps = [stage for stage in stages if stage in STEPS]
    facts = dependencies(config, steps[-1])
    if stages[-1] not in STEPS:
        facts |= dict(flatten({stages[-1]: config.model_dump(mode="json")[stages[-1]]}))
    runtime = config.runtime.model_dump(mode="json", exclude={"checkpoint_seconds", "tensorboard"})
    return _digest(facts | {"stage": stages[-1], "seed": config.seed, "runtime": runtime})


def untrained_key(config: Config, stages: Sequence[str]) -> str | None:
    """Return a digest of what the figures of the untrained network depend on besides the seed.

    None if the network of this configuration is not trained.
    """
    if not config.pretext.method.trains:
        return None
    kept = (
        *(f"pretext.{key}" for key in ("monitor_k", "monitor_temperature")),
        *(f"clustering.{key}" for key in ("view.size", "n_clusters", "update=features")),
        *(["pretext.method.view.size"] if config.model.stem == "whitened" else []),
    )
    facts = dependencies(config, "pretext" if stages[-1] == "pretext" else "clustering")
    trained = ("pretext.", "clustering.")
    facts = {key: value for key, value in facts.items() if key in kept or not key.startswith(trained)}
    return _digest(facts | {"baseline_seeds": config.evaluation.baseline_seeds, "stages": len(stages)})


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def run_trial(config: Config, stages: Sequence[str], work: Path, watch: Watch, splits: Splits | None = None) -> Figures:
    """Run the stages, or reuse those of another trial; return metrics and seconds per stage.

    Args:
        config: the configuration, with its seed.
        stages: the first stages of a run.
        work: holds the folders of the stages.
        watch: stops a stage, with a checkpoint, when it is time.
        splits: the images; by default those that the configuration names.

    Raises:
        Stopped: if it is time; the next call goes on at the checkpoint.
        ScanFastError: if the configuration does not fit the images.
    """
    results: Figures = {}
    for number, stage in enumerate(stages, start=1):
        folder = work / stage_key(config, stages[:number])
        if not (folder / RESULTS).exists():
            former = work / stage_key(config, stages[: number - 1]) if number > 1 else None
            _run(config, stages[:number], folder, former, watch, splits)
        results[stage] = read_json(folder / RESULTS)
    return results


def _run(
    config: Config, stages: Sequence[str], folder: Path, former: Path | None, watch: Watch, splits: Splits | None
) -> None:
    """Run the last of the stages in its folder, with what the former stages have left in theirs."""
    stage = stages[-1]
    clock = clock_of(config.runtime.device)
    run = MeasuredFolder(folder, stage, clock)
    with run, kept_memory():
        run.write(CONFIG, config)
        if former is not None:
            take(run, RunFolder(former), config, stages[:-1])
        context = _context(config, run, watch, splits)
        if not run.finished(stage):
            watch.check()
            run.begin()
            run_stage(context, STAGES[stage], Handover())
        figures = _metrics(context, stage) | {clock.key: round(run.seconds, 2)}
        write_json(folder / RESULTS, figures)


def _context(config: Config, run: RunFolder, watch: Watch, splits: Splits | None) -> Context:
    tracker = WatchedTracker(run, watch, lambda text: None)
    tracker.context = open_context(config, run, tracker, splits)
    return tracker.context


def _metrics(context: Context, stage: str) -> dict[str, float]:
    entry = context.run.summary().stages[stage]
    metrics = {**entry, **entry.get(context.reported, {})}
    return {key: float(metrics[key]) for key in WANTED if key in metrics}


def run_untrained(
    config: Config, stages: Sequence[str], work: Path, watch: Watch, splits: Splits | None = None
) -> Figures:
    """Return the figures of the network with random weights, for those of a trial to be compared with.

    The kNN accuracy and the purity are those of its features. In place of clustering comes k-means on the same
    features.

    Args:
        config: the configuration of the trial, with its seed.
        stages: the stages of the trial.
        work: holds the folders of the stages.
        watch: stops, if it is time.
        splits: the images; by default those that the configuration names.
    """
    folder = work / f"untrained-{untrained_key(config, stages)}-{config.seed}"
    if not (folder / RESULTS).exists():
        with RunFolder(folder) as run, kept_memory():
            run.write(CONFIG, config)
            context = _context(config, run, watch, splits)
            watch.check()
            write_json(folder / RESULTS, _untrained(context, stages))
    figures: Figures = read_json(folder / RESULTS)
    return figures


def _untrained(context: Context, stages: Sequence[str]) -> Figures:
    run, config = context.run, context.config
    with seeded(config.seed, "pretext"):
        model = start_model(context)
    run.write(PRETEXT_MODEL, StageResult(model.state_dict()))
    run.finish_stage("pretext", 0.0, knn_check(context, model), config.seed)
    found = {"pretext": _metrics(context, "pretext")}
    if "mining" in stages:
        run_stage(context, STAGES["mining"], Handover())
        found["mining"] = _metrics(context, "mining")
    labels, classes = context.clustered[context.reported].labels, context.n_classes
    if "clustering" in stages and labels is not None and classes is not None:
        rows = run.read(artifacts.EMBEDDINGS).rows
        seeds = range(config.evaluation.baseline_seeds)
        groups = kmeans_baseline(rows["train"], rows[context.reported], context.n_clusters, seeds)
        metrics = kmeans_metrics(groups, labels.numpy(), context.n_clusters, classes)
        found["clustering"] = {key: metrics[f"{key}_mean"] for key in WANTED if f"{key}_mean" in metrics}
    return found


def position(config: Config, stages: Sequence[str], work: Path) -> str:
    """Return in words how far the stages of a trial have come."""
    for number, stage in enumerate(stages, start=1):
        run = RunFolder(work / stage_key(config, stages[:number]))
        if (run.path / RESULTS).exists():
            continue
        if not run.has(checkpoint(stage)):
            return f"{stage} has no checkpoint yet"
        state = run.read(checkpoint(stage))
        epochs = getattr(config, stage).epochs
        return f"{stage} has a checkpoint in epoch {min(state.epoch + 1, epochs)} of {epochs}"
    return "all stages are finished"
