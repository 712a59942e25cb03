"""One changed bit in any file of a run is noticed when the file is read, and named with what to do about it."""

from __future__ import annotations

import io
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from driving import TINY, contents, results, run_here, summary

from scan_fast.errors import RunError
from scan_fast.runs import artifacts
from scan_fast.runs.digests import JOURNAL, digest_of
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.records import Checkpoint
from scan_fast.runs.verification import present

FLIPS = 200


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has the checkpoint of a stage beside finished ones, and names of its groups."""
    folder = tmp_path_factory.mktemp("unfinished") / "run"
    assert run_here("run", "digits", *TINY, "evaluation.thumbnails=40", "--out", folder, "--quiet").code == 0
    assert run_here("name", folder, "0", "zero").code == 0
    run = RunFolder(folder)
    result = run.read(artifacts.SELFLABEL_MODEL)
    run.write(artifacts.checkpoint("selflabel"), Checkpoint(result.model, {}, {}, 160, 1, 1, {}, 1.0))
    return folder


def flip(content: bytes, generator: random.Random) -> bytes:
    damaged = bytearray(content)
    damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
    return bytes(damaged)


def test_a_changed_bit_in_any_file_is_noticed(unfinished: Path) -> None:
    run = RunFolder(unfinished)
    generator = random.Random(0)
    files = present(run)
    assert len(files) >= 19
    for artifact in files:
        content = run.path_of(artifact).read_bytes()
        artifacts.checked(artifact, io.BytesIO(content), run.journal)
        for _ in range(FLIPS):
            with pytest.raises(ValueError, match=r"digest|not what was written"):
                artifacts.checked(artifact, io.BytesIO(flip(content, generator)), run.journal)


def test_a_changed_bit_in_the_journal_changes_no_result(unfinished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unfinished, folder)
    run = RunFolder(folder)
    whole = (folder / JOURNAL).read_bytes()
    generator = random.Random(1)
    refused = 0
    for _ in range(FLIPS):
        (folder / JOURNAL).write_bytes(flip(whole, generator))
        for artifact in present(run):
            try:
                run.check(artifact)
            except RunError as error:
                refused += 1
                assert str(run.path_of(artifact)) in str(error)
    assert refused > FLIPS / 4


COMMANDS: dict[str, tuple[list[str], str]] = {
    "config.yaml": (["run", "RUN"], "cp RUN/.config.yaml RUN/config.yaml"),
    "summary.json": (["run", "RUN"], "remove it, and the same command continues"),
    "metrics.jsonl": (["report", "RUN"], "remove it"),
    "checkpoints/pretext-final.pt": (["mine", "RUN", "--again"], "scan-fast pretext RUN --again"),
    "embeddings.npz": (["evaluate", "RUN", "--again"], "scan-fast mine RUN --again"),
    "neighbors.npz": (["cluster", "RUN", "--again"], "scan-fast mine RUN --again"),
    "checkpoints/clustering-final.pt": (["selflabel", "RUN", "--again"], "scan-fast cluster RUN --again"),
    "checkpoints/selflabel-final.pt": (["evaluate", "RUN"], "scan-fast selflabel RUN --again"),
    "model.pt": (["predict", "RUN", "--data", "images"], "scan-fast run RUN"),
    "assignments.csv": (["report", "RUN"], "scan-fast run RUN"),
    "names.json": (["report", "RUN"], "name the groups again"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_name_the_damaged_file_and_the_remedy(name: str, finished: Path, images: Path) -> None:
    words, advice = COMMANDS[name]
    if name == "names.json":
        assert run_here("name", finished, "0", "zero").code == 0
    if name == "embeddings.npz":
        words = ["report", "RUN"]
        (finished / "map.npz").unlink(missing_ok=True)
    path = finished / name
    path.write_bytes(flip(path.read_bytes(), random.Random(2)))
    before = contents(finished)
    places = {"RUN": str(finished), "images": str(images)}
    message = run_here(*(places.get(word, word) for word in words)).refusal()
    assert str(path) in message
    assert advice.replace("RUN", str(finished)) in message
    after = contents(finished)
    assert after == before


def test_the_remedies_restore_the_run(finished: Path, finished_run: Path) -> None:
    for name in ("config.yaml", "model.pt", "assignments.csv"):
        (finished / name).write_bytes(flip((finished / name).read_bytes(), random.Random(3)))
    assert "config.yaml" in run_here("run", finished).refusal()
    shutil.copy(finished / ".config.yaml", finished / "config.yaml")
    assert "2 of " in run_here("check", finished).refusal()
    for name in ("model.pt", "assignments.csv"):
        (finished / name).unlink()
    assert run_here("run", finished, "--quiet").code == 0
    assert run_here("check", finished).code == 0
    assert results(finished) == results(finished_run)


# -- scan-fast check ---------------------------------------------------------------------------------------------------


def test_check_reads_every_file(finished: Path) -> None:
    result = run_here("check", finished)
    assert result.code == 0
    count = len(present(RunFolder(finished)))
    assert result.out == f"{count} files of {finished} are as they were written\n"
    damaged = ("confusion.png", "neighbors.npz")
    for name in damaged:
        (finished / name).write_bytes(flip((finished / name).read_bytes(), random.Random(4)))
    result = run_here("check", finished)
    assert f"2 of {count} files of {finished} are not as they were written: {', '.join(damaged)}" in result.refusal()
    assert [line.partition(" cannot")[0] for line in result.out.splitlines()] == [str(finished / n) for n in damaged]


def test_digests_that_were_lost_are_made_again(finished: Path) -> None:
    """As after ``cp RUN/*.json``, or in a folder of a version that had no digests."""
    (finished / JOURNAL).unlink()
    model = (finished / "model.pt").read_bytes()
    (finished / "model.pt").write_bytes(model[:-52] + b"\0\0")
    message = run_here("run", finished).refusal()
    assert f"`scan-fast check {finished} --accept` gives it one" in message
    assert run_here("check", finished, "--accept", "--traceback").code == 0
    assert (finished / "model.pt").read_bytes() == model
    assert run_here("run", finished, "--quiet").code == 0


def test_a_file_that_was_changed_on_purpose_can_be_accepted(finished: Path) -> None:
    path = finished / "summary.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 7'))
    assert "summary.json" in run_here("check", finished).err
    assert "summary.json has a digest now" in run_here("check", finished, "--accept").out
    assert summary(finished)["seed"] == 7
    path.write_text("{")
    assert "cannot be read" in run_here("check", finished, "--accept").refusal()


def test_check_of_a_model_alone(finished: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.pt"
    shutil.copy(finished / "model.pt", model)
    assert run_here("check", model).code == 0
    model.write_bytes(model.read_bytes()[:-52] + b"\0\0")
    assert f"`scan-fast check {model} --accept`" in run_here("check", model).refusal()
    assert run_here("check", model, "--accept").code == 0
    model.write_bytes(flip(model.read_bytes(), random.Random(5)))
    assert "copy it again from where it is whole" in run_here("predict", model, "--data", tmp_path).refusal()


def test_a_part_of_a_line_of_metrics_is_no_damage(finished: Path) -> None:
    path = finished / "metrics.jsonl"
    whole = path.read_bytes()
    run = RunFolder(finished)
    entries = run.metrics()
    for cut, lost in ((1, 0), (2, 1), (20, 1)):
        path.write_bytes(whole[:-cut])
        assert run.metrics() == entries[: len(entries) - lost]
    path.write_bytes(whole[:-1] + b"\x0b")
    with pytest.raises(RunError, match=f"line {len(entries)} is not what was written"):
        run.metrics()


def test_losing_a_file_of_another_kind_is_one_line(finished: Path) -> None:
    """Content with the right digest may still be anything: nothing but a line comes of it."""
    run = RunFolder(finished)

    def put(artifact: artifacts.Artifact[Any], content: bytes) -> None:
        run.path_of(artifact).write_bytes(content)
        run.journal.add(artifact.name, digest_of(content))

    hostile: list[tuple[artifacts.Artifact[Any], bytes]] = [
        (artifacts.SUMMARY, b"[" * 100_000),
        (artifacts.SUMMARY, b'{"stages": 3}'),
        (artifacts.SUMMARY, b"\xff\xfe"),
        (artifacts.CONFIG, b"[" * 3000),
        (artifacts.CONFIG, b"data: " + b"{a: " * 3000),
        (artifacts.BACKBONE, b'{"' * 5000),
        (artifacts.ASSIGNMENTS, b"path,cluster\n\x00"),
    ]
    for artifact, content in hostile:
        put(artifact, content)
        with pytest.raises(RunError, match="cannot be read"):
            run.read(artifact)
