"""``scan-fast export --format reference``: a run's networks as weight files of the original SCAN project."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from .atomic import atomic_file
from .errors import RunError, UsageError, WeightsError
from .models.reference_writer import Stage, check_writable, dump_original
from .runs import artifacts
from .runs.folder import RunFolder

_RESULTS = {
    "pretext": artifacts.PRETEXT_MODEL,
    "clustering": artifacts.CLUSTER_MODEL,
    "selflabel": artifacts.SELFLABEL_MODEL,
}


def export_reference(target: Path, out: Path, stage: str | None = None) -> None:
    """Write the result of a stage as the original project does, see :func:`.models.reference_writer.dump_original`.

    Args:
        target: a run folder, or a model.pt.
        out: the file to write.
        stage: "pretext", "clustering" or "selflabel"; None: the last stage that is finished.

    Raises:
        WeightsError: if the original project has no such network.
        RunError: if the stage is not finished.
        UsageError: if a model.pt is of another stage.
        OSError: if the file cannot be written.
    """
    target = target.expanduser()
    if target.is_dir():
        _export_run(RunFolder.existing(target), out, stage)
        return
    if not target.is_file():
        raise WeightsError(f"there is no model at {target}; give a run folder or its model.pt")
    saved = artifacts.read(artifacts.MODEL, target)
    if stage not in (None, saved.stage):
        raise UsageError(f"--stage {stage}: {target} is of the stage {saved.stage}; give the run folder")
    of = cast(Stage, saved.stage)
    check_writable(saved.model, of)
    with atomic_file(out) as file:
        dump_original(file, of, saved.model, saved.state_dict)


def _export_run(run: RunFolder, out: Path, stage: str | None) -> None:
    finished = [name for name in _RESULTS if run.finished(name) and run.has(_RESULTS[name])]
    if not finished:
        raise RunError(f"{run.path} has no finished stage that could be exported; run `scan-fast run {run.path}` first")
    of = cast(Stage, stage or finished[-1])
    run.require(_RESULTS[of])
    config = run.read(artifacts.CONFIG)
    model = config.model.from_scratch()
    if run.has(artifacts.BACKBONE):  # model.backbone=auto, resolved
        model = model.model_copy(update={"backbone": run.read(artifacts.BACKBONE).backbone})
    if not config.clustering.trains and of != "pretext":
        model = model.model_copy(update={"unit_features": True})
    check_writable(model, of)
    result = run.read(_RESULTS[of])
    with atomic_file(out) as file:
        dump_original(file, of, model, result.model, int(result.record.get("head", 0)))
