"""Groups from what an interrupted run has learned so far, in another folder, so that the run can continue."""

from __future__ import annotations

from typing import Any

from .errors import RunError
from .runs import artifacts
from .runs.artifacts import Artifact, checkpoint
from .runs.config import Config, change_config
from .runs.folder import RunFolder
from .runs.records import StageResult
from .runs.tracker import Tracker
from .stages.pipeline import print_summary, run_stages, stages_of
from .training.context import open_context

SUFFIX = "-so-far"


def finish_early(run: RunFolder, *, quiet: bool = False) -> RunFolder:
    """Group the images by what a run has learned so far.

    If its clustering stage has heads, the best of them give the groups. Otherwise the features of the pretext stage's
    last checkpoint are grouped. The run itself is left as it is.

    Args:
        run: the interrupted run.
        quiet: print nothing but errors.

    Returns:
        The finished run, in a new folder beside the run's; one that an earlier call made there is replaced.

    Raises:
        RunError: if the run has not learned anything yet, or is complete.
    """
    config, stages = run.read(artifacts.CONFIG), run.summary().stages
    done: dict[str, dict[str, Any]] = {name: stages[name] for name in ("pretext", "mining", "number") if name in stages}
    results: dict[str, StageResult] = {}
    changes: dict[str, Any] = {"selflabel": None}
    if run.has(artifacts.ASSIGNMENTS):
        raise RunError(f"{run.path} is finished; its report is {run.path_of(artifacts.REPORT)}")
    best = run.read(checkpoint("clustering")).stage.get("best") if run.has(checkpoint("clustering")) else None
    if "clustering" in stages:
        done["clustering"] = stages["clustering"]
        results["clustering"] = run.read(artifacts.CLUSTER_MODEL)
    elif best is not None:
        record = {name: value for name, value in best.items() if name != "model"}
        done["clustering"] = {"seconds": 0.0, **record}
        results["clustering"] = StageResult(best["model"], record)
    else:
        changes |= {"clustering.update": "features", "clustering.cached_views": None, "mining.features": "backbone"}
        # What goes with training on pairs only.
        changes |= {"mining.files": None, "clustering.true_neighbors": False}
        done.pop("number", None)
        if config.mining.features != "backbone":
            done.pop("mining", None)
    if "pretext" in done:
        results["pretext"] = run.read(artifacts.PRETEXT_MODEL)
    elif run.has(checkpoint("pretext")):
        state = run.read(checkpoint("pretext"))
        results["pretext"] = StageResult(state.model)
        done["pretext"] = {"seconds": state.seconds, "epochs": state.epoch}
    elif "clustering" not in done or config.clustering.weights is None:
        raise RunError(f"{run.path} has not learned anything yet; run it until its first checkpoint")
    return _group(run, change_config(config, changes.items()), done, results, quiet=quiet)


def _copy(artifact: Artifact[Any], run: RunFolder, target: RunFolder) -> None:
    if run.has(artifact):
        target.write(artifact, run.read(artifact))


def _group(
    run: RunFolder, config: Config, done: dict[str, dict[str, Any]], results: dict[str, StageResult], *, quiet: bool
) -> RunFolder:
    beside = RunFolder(run.path.with_name(run.path.name + SUFFIX))
    if beside.has(artifacts.CONFIG):
        with beside:
            beside.forget(artifacts.COMMANDS)
    elif beside.path.exists() and any(beside.path.iterdir()):
        raise RunError(f"{beside.path} is in the way: it is not empty and is no run folder; move it away")
    with RunFolder.open(beside.path, config) as target:
        kept = {"pretext": artifacts.PRETEXT_MODEL, "clustering": artifacts.CLUSTER_MODEL}
        for name, result in results.items():
            target.write(kept[name], result)
        if "mining" in done:
            target.write(artifacts.EMBEDDINGS, run.read(artifacts.EMBEDDINGS))
            target.write(artifacts.NEIGHBORS, run.read(artifacts.NEIGHBORS))
        if "number" in done:
            target.write(artifacts.SUGGESTION, run.read(artifacts.SUGGESTION))
        for artifact in (artifacts.IMAGES, artifacts.DECODE_CACHE, artifacts.PRECISION, artifacts.BACKBONE):
            _copy(artifact, run, target)
        for name, entry in done.items():
            further = {key: value for key, value in entry.items() if key != "seconds"}
            target.finish_stage(name, entry["seconds"], further, config.seed)
        tracker = Tracker(target, quiet=quiet)
        context = open_context(config, target, tracker)
        run_stages(context, stages_of(context))
        print_summary(context, tracker)
    return target
