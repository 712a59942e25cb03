"""``scan-fast export --format reference``: a run's networks and neighbours as files of the SCAN project."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from .atomic import atomic_file
from .data.neighbor_files import NAMES, dump_neighbors
from .errors import RunError, UsageError, WeightsError
from .models.reference_writer import Stage, check_writable, dump_original
from .runs import artifacts
from .runs.folder import RunFolder

_RESULTS = {
    "pretext": artifacts.PRETEXT_MODEL,
    "clustering": artifacts.CLUSTER_MODEL,
    "selflabel": artifacts.SELFLABEL_MODEL,
}


def export_reference(target: Path, out: Path, stage: str | None = None) -> list[Path]:
    """Write the result of a stage as the original project does.

    Args:
        target: a run folder, or a model.pt.
        out: the file to write (:func:`.models.reference_writer.dump_original`). For "mining" it is the folder that gets
            the files of neighbours (:func:`.data.neighbor_files.dump_neighbors`), one for each split.
        stage: "pretext", "mining", "clustering" or "selflabel"; None: the last stage with a network that is finished.

    Returns:
        The files that were written.

    Raises:
        WeightsError: if the original project has no such network.
        RunError: if the stage is not finished.
        UsageError: if the run has no such stage, a model.pt is of another one, or ``out`` is a file and should be a
            folder, or the reverse.
        OSError: if a file cannot be written.
    """
    target, out = target.expanduser(), out.expanduser()
    if stage == "mining" and out.exists() and not out.is_dir():
        raise UsageError(f"--out: {out} is a file; the files of neighbours go to a folder")
    if stage != "mining" and out.is_dir():
        raise UsageError(f"--out: {out} is a folder; give the file to write, such as {out / 'model.pth.tar'}")
    if target.is_dir():
        run = RunFolder.existing(target)
        _check_stage(run, stage)
        return _export_neighbors(run, out) if stage == "mining" else [_export_network(run, out, stage)]
    if not target.is_file():
        raise WeightsError(f"there is no model at {target}; give a run folder or its model.pt")
    saved = artifacts.read(artifacts.MODEL, target)
    if stage not in (None, saved.stage):
        raise UsageError(f"--stage {stage}: {target} is of the stage {saved.stage}; give the run folder")
    of = cast(Stage, saved.stage)
    check_writable(saved.model, of)
    with atomic_file(out) as file:
        dump_original(file, of, saved.model, saved.state_dict)
    return [out]


def _check_stage(run: RunFolder, stage: str | None) -> None:
    """Refuse a stage that the run does not have, and say which have something to export."""
    why = None if stage is None else run.read(artifacts.CONFIG).why_without(stage)
    if why is None:
        return
    present = [name for name in ("pretext", "mining", "clustering", "selflabel") if run.finished(name)]
    advice = f"--stage {' or '.join(present)} can be exported" if present else f"run `scan-fast run {run.path}` first"
    raise UsageError(f"--stage {stage}: {run.path} has no {stage} stage ({why}); {advice}")


def _export_neighbors(run: RunFolder, folder: Path) -> list[Path]:
    run.require(artifacts.NEIGHBORS)
    written = []
    for split, index in run.read(artifacts.NEIGHBORS).index.items():
        with atomic_file(folder / NAMES[split]) as file:
            dump_neighbors(index, file)
        written.append(folder / NAMES[split])
    return written


def _export_network(run: RunFolder, out: Path, stage: str | None) -> Path:
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
    return out
