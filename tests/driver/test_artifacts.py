"""The artifacts of a run: all are listed, each is read back, and a missing or damaged one has good advice."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import TINY, fill, results, run_here, tiny_config

import scan_fast
from scan_fast.cli import build_parser
from scan_fast.errors import RunError, WeightsError
from scan_fast.models.backbones import ModelConfig
from scan_fast.models.heads import ClusterModel
from scan_fast.models.saved import SavedModel
from scan_fast.predictor import Predictor
from scan_fast.runs import artifacts
from scan_fast.runs.digests import JOURNAL, seal
from scan_fast.runs.folder import RunFolder
from scan_fast.stages.pipeline import PIPELINE

LISTED: dict[str, artifacts.Artifact[Any]] = {
    value.name: value for value in vars(artifacts).values() if isinstance(value, artifacts.Artifact)
}
LEARNED = ("pretext", "clustering", "selflabel")


def files_of(folder: Path) -> set[str]:
    """Return the files of a run folder but the lock, the digests, and the thumbnails, which are a cache."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    found -= {".lock", JOURNAL}
    return {name for name in found if not name.startswith(f"{artifacts.THUMBNAILS}/")}


def test_every_file_of_a_finished_run_is_an_artifact(finished_run: Path) -> None:
    known = {*LISTED, *(artifacts.checkpoint(stage).name for stage in LEARNED)}
    assert files_of(finished_run) <= known
    written = {artifact.name for artifact in (*artifacts.OF_STAGES, *artifacts.AT_END)}
    assert written - {artifacts.SUGGESTION.name} <= files_of(finished_run)  # the number of clusters was given
    others: tuple[artifacts.Artifact[Any], ...] = (
        artifacts.CONFIG,
        artifacts.CONFIG_COPY,
        artifacts.SUMMARY,
        artifacts.METRICS,
        artifacts.SWEEP,
        artifacts.ABLATION,
        artifacts.ABLATION_TABLE,
    )
    others = (*others, artifacts.NAMES, *artifacts.BESIDE_REPORT)
    grouped = [*others, *artifacts.AT_START, *artifacts.OF_STAGES, *artifacts.AT_END]
    assert sorted(artifact.name for artifact in grouped) == sorted(LISTED)


def test_every_artifact_is_read_and_written_again(finished_run: Path, tmp_path: Path) -> None:
    run, copy = RunFolder(finished_run), RunFolder(tmp_path / "copy")
    read = 0
    for artifact in (*LISTED.values(), *(artifacts.checkpoint(stage) for stage in LEARNED)):
        if run.has(artifact):
            copy.write(artifact, run.read(artifact))
            read += 1
    assert read == len(files_of(finished_run)) == len(files_of(copy.path))
    assert results(copy.path) == results(finished_run)
    for name in ("config.yaml", "report.html", "confusion.csv", "confusion.png"):
        assert (copy.path / name).read_bytes() == (finished_run / name).read_bytes()


def test_the_stages_of_artifacts_are_those_that_write_them() -> None:
    for stage in PIPELINE:
        assert set(stage.outputs) == {artifact for artifact in artifacts.OF_STAGES if artifact.stage == stage.name}
        options = build_parser().parse_args([artifacts.COMMANDS[stage.name]])
        assert stage.name == "number" or options.stages == (stage.name,)
    assert list(artifacts.COMMANDS) == [stage.name for stage in PIPELINE]


@pytest.mark.parametrize("first", [stage.name for stage in PIPELINE])
def test_forgetting_removes_the_artifacts_of_later_stages(first: str, finished: Path) -> None:
    names = [stage.name for stage in PIPELINE]
    kept, gone = names[: names.index(first)], names[names.index(first) :]
    run = RunFolder(finished)
    run.forget(gone)
    kept = [stage for stage in kept if stage != "number"]  # the number of clusters was given
    assert list(run.summary().stages) == kept
    assert {entry.stage for entry in run.metrics()} == set(kept)
    expected = {artifact.name for artifact in artifacts.OF_STAGES if artifact.stage in kept}
    expected |= {artifacts.checkpoint(stage).name for stage in kept if stage != "mining"}
    of_the_run = {"backbone.json", "environment.json", "images.npz", "config.yaml", ".config.yaml"}
    assert files_of(finished) == expected | of_the_run | {"summary.json", "metrics.jsonl"}


@pytest.mark.parametrize(
    "artifact",
    [artifact for artifact in artifacts.OF_STAGES if artifact is not artifacts.SUGGESTION],
    ids=lambda artifact: artifact.name,
)
def test_a_missing_result_names_its_command(artifact: artifacts.Artifact[Any], finished: Path) -> None:
    run = RunFolder(finished)
    run.require(artifact)
    advice = rf"has no {artifact.name}; run `scan-fast {artifacts.COMMANDS[artifact.stage or '']} {finished}` first"
    run.remove(artifact)
    for use in (run.require, run.read):
        with pytest.raises(RunError, match=advice):
            use(artifact)
    # Written, but by a stage that was killed before it was done.
    run.path_of(artifact).write_bytes(b"")
    run.forget([artifact.stage or ""])
    run.path_of(artifact).write_bytes(b"")
    with pytest.raises(RunError, match=advice):
        run.require(artifact)


@pytest.mark.parametrize("name", ["assignments.csv", "model.pt", "report.html"])
def test_a_result_that_was_removed_is_written_again(name: str, finished: Path, finished_run: Path) -> None:
    (finished / name).unlink()
    assert run_here("run", finished, "--quiet").code == 0
    assert (finished / name).exists()
    assert results(finished) == results(finished_run)


@pytest.mark.parametrize("content", [b"", b"path,cluster\n", b"\xff\xfe"])
def test_the_advice_for_damaged_assignments_works(content: bytes, finished: Path, finished_run: Path) -> None:
    (finished / "assignments.csv").write_bytes(content)
    message = run_here("report", finished).refusal()
    assert f"{finished / 'assignments.csv'} cannot be read" in message
    assert f"remove it, and `scan-fast run {finished}` writes it again" in message
    (finished / "assignments.csv").unlink()
    assert run_here("run", finished, "--quiet").code == 0
    assert results(finished) == results(finished_run)


# -- model.pt ----------------------------------------------------------------------------------------------------------


def saved_model() -> SavedModel:
    config = ModelConfig(backbone="resnet_digits", width=0.25)
    weights = ClusterModel(config, 3).state_dict()
    return SavedModel("selflabel", config, 3, 8, 8, "image", "exact", (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), weights)


def content_of(model: SavedModel) -> dict[str, Any]:
    file = io.BytesIO()
    model.dump(file)
    file.seek(0)
    content: dict[str, Any] = torch.load(file, weights_only=True)
    return content


def test_a_saved_model_is_read_back(tmp_path: Path) -> None:
    model = saved_model()
    artifacts.write(artifacts.MODEL, model, tmp_path / "any name.bin")
    found = artifacts.read(artifacts.MODEL, tmp_path / "any name.bin")
    names = ("stage", "model", "n_clusters", "size", "view_size", "crop", "decode", "mean", "std")
    assert [getattr(found, name) for name in names] == [getattr(model, name) for name in names]
    assert all(found.state_dict[name].equal(value) for name, value in model.state_dict.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "it is no model.pt of scan-fast"),
        ({"mean": None}, "it lacks mean"),
        ({"model": {"backbone": "resnet19"}}, "its model settings are not valid: .*did you mean"),
        ({"n_clusters": 4}, "other.pt: the weights of the saved model do not fit ClusterModel"),
    ],
)
def test_another_model_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = content_of(saved_model()) | changes
    with (tmp_path / "other.pt").open("w+b") as file:
        torch.save({name: value for name, value in content.items() if value is not None}, file)
        seal(file)
    with pytest.raises(WeightsError, match=message):
        Predictor.load(tmp_path / "other.pt")


def test_the_predictor_does_not_import_the_training_driver() -> None:
    code = "import sys, scan_fast.predictor, scan_fast.export; print('\\n'.join(sys.modules))"
    root = Path(scan_fast.__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(root)}
    )
    modules = set(found.stdout.split())
    assert "scan_fast.predictor" in modules
    driver = ("scan_fast.stages", "scan_fast.training", "scan_fast.report", "scan_fast.cli", "scan_fast.estimator")
    assert not [name for name in modules if name.startswith((*driver, "sklearn", "matplotlib", "rich"))]


def test_only_a_folder_with_results_is_protected(tmp_path: Path) -> None:
    for artifact in artifacts.AT_START:
        (tmp_path / artifact.name).write_text("")
    (tmp_path / ".model.pt.0123.tmp").write_text("")
    RunFolder.open(tmp_path, tiny_config())
    fill(tmp_path, 1)
    with pytest.raises(RunError, match="is not empty and is no run folder"):
        RunFolder.open(tmp_path, tiny_config())


def test_a_killed_first_write_leaves_a_usable_folder(tmp_path: Path) -> None:
    words = ["pretext", "digits", *TINY, "--out", "out", "--quiet"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".config.yaml.89abcdef.tmp").write_bytes(b"name")
    assert run_here(*words).code == 0
    assert not list(Path("out").glob(".*.tmp"))
