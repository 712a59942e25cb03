"""What a user can get wrong costs one line, exit code 2 and nothing that was there before."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import (
    TINY,
    TINY_FOLDER,
    Process,
    assignments,
    contents,
    fill,
    left_out,
    metrics,
    picture,
    results,
    run_here,
    weights,
)
from PIL import PngImagePlugin

from scan_fast.data.folders import held_out_rows
from scan_fast.objectives import SCANSettings
from scan_fast.runs.artifacts import CONFIG
from scan_fast.runs.digests import JOURNAL, seal
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.records import MetricsEntry


def run_folder(images: Path, *words: object, clusters: object = 3) -> Any:
    return run_here("run", "--data", images, "--clusters", clusters, "--out", "out", "--quiet", *TINY_FOLDER, *words)


# -- images ------------------------------------------------------------------------------------------------------------


def test_missing_folder(tmp_path: Path) -> None:
    assert f"--data: there is no folder {tmp_path / 'nowhere'}" in run_folder(tmp_path / "nowhere").refusal()


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "image.png")
    assert "is a file; give the folder that holds the images" in run_folder(tmp_path / "image.png").refusal()


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no images found in" in run_folder(tmp_path / "empty").refusal()


def test_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "readme.txt").write_text("no image")
    assert "no images found in" in run_folder(tmp_path / "texts").refusal()


def test_fewer_images_than_clusters(images: Path) -> None:
    message = run_folder(images, clusters=50).refusal()
    assert "36 images are too few for 50 clusters; ask for 2 to 35, or add images" in message


@pytest.mark.parametrize("clusters", [36, 35])
def test_as_many_clusters_as_images(clusters: int, images: Path) -> None:
    if clusters == 36:
        assert "36 images are too few for 36 clusters" in run_folder(images, clusters=clusters).refusal()
    else:
        assert run_folder(images, "selflabel=null", clusters=clusters).code == 0


def test_one_cluster(images: Path) -> None:
    assert "one group needs no clustering; give at least 2, got 1" in run_folder(images, clusters=1).refusal()


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_images(count: int, tmp_path: Path) -> None:
    fill(tmp_path / "few", count)
    message = run_folder(tmp_path / "few", clusters=2).refusal()
    assert f"{count} image{'s' if count > 1 else ''} cannot be grouped; add images, at least 3" in message


@pytest.mark.parametrize("resident", ["host", "files"])
def test_copies_of_one_image(resident: str, tmp_path: Path) -> None:
    fill(tmp_path / "copies", 12, make=lambda number: picture(0))
    message = run_folder(tmp_path / "copies", f"data.resident={resident}").refusal()
    assert "all 12 images are the same picture; there is nothing to group" in message


def test_images_with_the_same_features(tmp_path: Path) -> None:
    """Other files with the same pixels, which only their features tell."""
    for number in range(12):
        info = PngImagePlugin.PngInfo()
        info.add_text("number", str(number))
        (tmp_path / "same").mkdir(exist_ok=True)
        picture(0).save(tmp_path / "same" / f"{number}.png", pnginfo=info)
    message = run_folder(tmp_path / "same", "data.resident=files").refusal()
    assert "all 12 images have the same projection features" in message


@pytest.mark.parametrize("clusters", [0, -3])
def test_too_few_clusters(clusters: int, images: Path) -> None:
    message = run_folder(images, clusters=clusters).refusal()
    assert f"clustering.n_clusters: must be at least 2, or auto, got {clusters}" in message


def test_clusters_that_are_no_number(images: Path) -> None:
    message = run_folder(images, clusters="many").refusal()
    assert "--clusters: must be a whole number of at least 2, or auto, got 'many'" in message


def test_without_a_number_of_clusters_one_is_suggested(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_here("run", "--data", images, "--out", out, *TINY_FOLDER).code == 0
    suggestion = json.loads((out / "suggested-k.json").read_text())
    assert suggestion["k"] in [point["k"] for point in suggestion["curve"]]
    assert json.loads((out / "summary.json").read_text())["stages"]["number"]["k"] == suggestion["k"]


def test_more_neighbours_than_images_and_its_advice(images: Path) -> None:
    message = run_folder(images, "mining.k=40").refusal()
    assert "mining.k=40" in message
    # The advice must work in the same folder, in which nothing has been computed yet.
    advice = next(
        word for word in message.replace(";", " ").split() if word.startswith("mining.k=") and word[9:] != "40"
    )
    result = run_folder(images, advice)
    assert result.code == 0, result.err


def test_more_neighbours_drawn_than_mined(images: Path) -> None:
    message = run_folder(images, "clustering.neighbors=4").refusal()
    assert "clustering.neighbors=4 is more than the mining.k=3 neighbours mined" in message


def test_unreadable_image_is_named_and_can_be_skipped(images: Path) -> None:
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    whole = (images / "003.png").read_bytes()
    (images / "003.png").write_bytes(whole[: len(whole) // 2])
    message = run_folder(images).refusal()
    assert "data.on_error=skip" in message
    assert "003.png" in message or "broken.png" in message
    result = run_folder(images, "data.on_error=skip")
    assert result.code == 0, result.err
    lines = Path("out/skipped.csv").read_text().splitlines()
    assert lines[0] == "path,reason"
    assert [line.split(",")[0] for line in lines[1:]] == ["003.png", "broken.png"]
    assert all(len(line.split(",", 1)[1]) > 5 for line in lines[1:])
    paths = {row["path"] for row in assignments(Path("out"))}
    assert paths == {f"{number:03d}.png" for number in range(36) if number != 3}


def test_no_readable_image_at_all(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    for number in range(5):
        (tmp_path / "bad" / f"{number}.jpg").write_bytes(b"no image")
    message = run_folder(tmp_path / "bad", "data.on_error=skip").refusal()
    assert f"0 readable of 5 images of {tmp_path / 'bad'}: 0.jpg: UnidentifiedImageError" in message
    assert "2.jpg: " in message and "3.jpg" not in message


@pytest.mark.parametrize("fraction", [0, 0.2])
def test_unreadable_images_never_empty_a_split(fraction: float, tmp_path: Path) -> None:
    """The images that would be held out are the broken ones."""
    fill(tmp_path / "images", 20)
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    broken = [names[row] for row in held_out_rows(names, 0.2)[1]]
    assert len(broken) > 1
    for name in broken:
        (tmp_path / "images" / name).write_bytes(b"broken")
    result = run_folder(tmp_path / "images", "data.on_error=skip", f"data.test_fraction={2 * fraction}")
    assert result.code == 0, result.err
    assert [row["path"] for row in assignments(Path("out")) if row["path"] in broken] == []
    assert len(assignments(Path("out"))) == 20 - len(broken)
    assert ("test" in {row["split"] for row in assignments(Path("out"))}) == (fraction > 0)


def test_a_test_folder_without_a_readable_image(tmp_path: Path) -> None:
    fill(tmp_path / "images" / "train", 12)
    fill(tmp_path / "images" / "test", 2)
    for path in (tmp_path / "images" / "test").iterdir():
        path.write_bytes(b"broken")
    message = run_folder(tmp_path / "images", "data.on_error=skip").refusal()
    assert f"0 readable of 2 test images of {tmp_path / 'images'}: test/000.png: Unidentified" in message


def test_no_list_of_skipped_images_where_all_can_be_read(images: Path) -> None:
    assert run_folder(images, "data.on_error=skip").code == 0
    assert not Path("out/skipped.csv").exists()


# -- configurations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digits", "pretext.epoch=3"], "did you mean pretext.epochs?"),
        (["digits", "pretext.epochs=many"], "pretext.epochs: input should be a valid integer"),
        (["digits", "preset=quick"], "preset 'quick' is not in digits.yaml; it has reference, fast"),
        (["nothing.yaml"], "there is no configuration 'nothing.yaml'"),
        (["broken.yaml"], "broken.yaml is not valid YAML"),
        (["list.yaml"], "list.yaml must hold sections"),
        (["digits", "--data", "."], "give either a configuration (digits) or --data, not both"),
        ([], "say what to run"),
        (["digits", "--out", "list.yaml"], "list.yaml is a file; choose another --out"),
        (["digits", "--out", "list.yaml/run"], "list.yaml/run"),
        (["digits", "--out", "full"], "full is not empty and is no run folder; choose another --out"),
        (["full"], "full is no run folder"),
        (["digits", "runtime.device=cuda:99"], "usable CUDA devices"),
        (["digits", "runtime.device=abacus"], "runtime.device must be auto, cpu, cuda or cuda:N, got 'abacus'"),
        (["digits", "--unknown"], "there is no option --unknown"),
    ],
)
def test_refused_command_lines(words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("a: [1")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    assert message in run_here("run", *words).refusal()
    assert (tmp_path / "full" / "thesis.tex").read_text() == "precious"
    assert (tmp_path / "list.yaml").read_text() == "- 1\n"


@pytest.mark.parametrize("words", [[], ["dance"], ["predict"], ["info", "mining.k=3"]])
def test_refused_commands(words: list[str]) -> None:
    run_here(*words).refusal()


def test_pretext_weights_that_are_not_there() -> None:
    message = run_here(
        *(
            "run",
            "digits",
            *left_out(TINY, "pretext."),
            "pretext.method=weights",
            "pretext.method.file=no.pt",
            "--quiet",
        )
    ).refusal()
    assert "no.pt" in message


def test_pretext_none_needs_pretrained_weights() -> None:
    message = run_here("run", "digits", *TINY, "pretext.method=none", "--quiet").refusal()
    assert "model.pretrained=true" in message


# -- run folders -------------------------------------------------------------------------------------------------------


def test_another_experiment_is_refused_with_the_difference(finished: Path) -> None:
    before = contents(finished)
    for words in (["digits", *TINY, "--out", finished], [finished]):
        message = run_here("run", *words, "mining.k=6", "pretext.optimizer.lr=0.5").refusal()
        assert "mining.k: 5 -> 6" in message
        assert "pretext.optimizer.lr: 0.002 -> 0.5" in message
    assert contents(finished) == before


def test_the_runtime_may_change(finished: Path) -> None:
    before = contents(finished)
    assert run_here("run", finished, "runtime.threads=2", "runtime.checkpoint_seconds=3", "--quiet").code == 0
    assert contents(finished) == before
    assert RunFolder(finished).read(CONFIG).runtime.threads == 2


def test_a_folder_without_results_takes_another_configuration(tmp_path: Path) -> None:
    assert "too few for 170" in run_here("run", "digits", *TINY, "--out", "out", "--clusters", 170).refusal()
    assert run_here("pretext", "digits", *TINY, "--out", "out", "--clusters", 4, "--quiet").code == 0
    assert RunFolder(tmp_path / "out").read(CONFIG).clustering.n_clusters == 4
    # Now there is something to lose.
    message = run_here("pretext", "digits", *TINY, "--out", "out", "--clusters", 5, "--quiet").refusal()
    assert "clustering.n_clusters: 4 -> 5" in message


def test_stages_out_of_order() -> None:
    words = ["digits", *TINY, "--out", "out", "--quiet"]
    assert "run `scan-fast pretext out` first" in run_here("mine", *words).refusal()
    assert "run `scan-fast pretext out` first" in run_here("cluster", *words).refusal()
    assert run_here("pretext", *words).code == 0
    before = contents(Path("out"))
    assert "run `scan-fast mine out` first" in run_here("cluster", *words).refusal()
    assert "run `scan-fast cluster out` first" in run_here("selflabel", *words).refusal()
    assert contents(Path("out")) == before


def test_a_stage_that_the_configuration_lacks() -> None:
    message = run_here("selflabel", "digits", *TINY, "selflabel=null", "--out", "out").refusal()
    assert "has no selflabel stage (selflabel: null)" in message


def test_commands_on_folders_without_results(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for command in ("evaluate", "report"):
        assert "is no run folder" in run_here(command, "empty").refusal()
        assert "is no run folder" in run_here(command, "nowhere").refusal()
    assert "there is no model at" in run_here("predict", "empty", "--data", "empty").refusal()
    assert run_here("pretext", "digits", *TINY, "--out", "half", "--quiet").code == 0
    assert "half" in run_here("report", "half").refusal()


@pytest.mark.parametrize(
    ("name", "words", "advice"),
    [
        ("checkpoints/pretext-final.pt", ["mine", "RUN", "--again"], "scan-fast pretext {} --again"),
        ("embeddings.npz", ["evaluate", "RUN"], None),
        ("neighbors.npz", ["cluster", "RUN", "--again"], "scan-fast mine {} --again"),
        ("checkpoints/clustering-final.pt", ["selflabel", "RUN", "--again"], "scan-fast cluster {} --again"),
        ("checkpoints/selflabel-final.pt", ["evaluate", "RUN"], "scan-fast selflabel {} --again"),
        ("summary.json", ["run", "RUN"], "remove it"),
        ("config.yaml", ["run", "RUN"], "config.yaml cannot be read"),
    ],
)
@pytest.mark.parametrize("part", [0, 0.6])
def test_damaged_files_are_named_with_what_to_do(
    name: str, words: list[str], advice: str | None, part: float, finished: Path
) -> None:
    content = (finished / name).read_bytes()
    (finished / name).write_bytes(content[: int(part * len(content))])
    if name == "config.yaml" and part:
        (finished / name).write_text("pretext: {epochs: [")
    message = run_here(*(finished if word == "RUN" else word for word in words)).refusal()
    assert str(finished / name) in message
    if advice is not None:
        assert advice.format(finished) in message


def test_the_advice_for_a_damaged_result_works(finished: Path, finished_run: Path) -> None:
    (finished / "checkpoints" / "clustering-final.pt").write_bytes(b"")
    run_here("selflabel", finished, "--again").refusal()
    assert run_here("cluster", finished, "--again", "--quiet").code == 0
    assert run_here("run", finished, "--quiet").code == 0
    assert results(finished)["assignments.csv"] == results(finished_run)["assignments.csv"]
    assert weights(finished / "model.pt") == weights(finished_run / "model.pt")


def test_a_damaged_checkpoint_of_an_unfinished_stage(finished_run: Path) -> None:
    words = ["pretext", "digits", *TINY, "--out", "out", "--quiet"]
    assert run_here(*words).code == 0
    summary = Path("out/summary.json")
    summary.unlink()
    Path("out/checkpoints/pretext-final.pt").unlink()
    checkpoint = Path("out/checkpoints/pretext.pt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    message = run_here(*words).refusal()
    assert str(checkpoint) in message
    assert "remove it" in message
    checkpoint.unlink()
    assert run_here(*words).code == 0
    name = "checkpoints/pretext-final.pt"
    assert weights(Path("out") / name) == weights(finished_run / name)


def test_a_damaged_model_is_named(finished: Path, images: Path) -> None:
    content = (finished / "model.pt").read_bytes()
    (finished / "model.pt").write_bytes(content[: len(content) // 2])
    for command in (["predict", finished], ["embed", finished, "--out", "features.npz"]):
        assert "model.pt cannot be read" in run_here(*command, "--data", images).refusal()
    torch.save({"weights": 1}, finished / "model.pt")
    assert "model.pt cannot be read: it has no digest" in run_here("predict", finished, "--data", images).refusal()
    with (finished / "model.pt").open("r+b") as file:
        seal(file)
    assert (
        "model.pt cannot be read: it is no model.pt of scan-fast"
        in run_here("predict", finished, "--data", images).refusal()
    )


# -- repeated stages ---------------------------------------------------------------------------------------------------


def test_again_repeats_a_stage_with_a_changed_section(finished: Path) -> None:
    before, old = results(finished), contents(finished)
    words = ["cluster", finished, "--again", "clustering.objective.entropy_weight=3", "--quiet"]
    assert run_here(*words).code == 0
    assert RunFolder(finished).read(CONFIG).clustering.objective == SCANSettings(entropy_weight=3)
    assert not (finished / "assignments.csv").exists()
    assert run_here("run", finished, "--quiet").code == 0
    after, new = results(finished), contents(finished)
    for name in ("checkpoints/pretext-final.pt", "embeddings.npz", "neighbors.npz"):
        assert new[name] == old[name]
    kinds = {key.split(".")[0] for key in after if after[key] != before[key]}
    assert kinds >= {"clustering-final", "selflabel-final", "model", "assignments", "metrics", "summary"}
    assert "pretext-final" not in kinds
    count = [(entry["stage"], entry["epoch"]) for entry in metrics(finished)]
    assert len(count) == len(set(count)) == 7


def test_again_refuses_what_the_stage_does_not_own(finished: Path) -> None:
    before, config = contents(finished), (finished / "config.yaml").read_text()
    message = run_here("cluster", finished, "--again", "mining.k=6", "--quiet").refusal()
    assert "mining.k: 5 -> 6 does not belong to" in message
    assert contents(finished) == before
    assert (finished / "config.yaml").read_text() == config


def test_again_with_numbers_that_do_not_fit_changes_nothing(finished: Path) -> None:
    before, config = contents(finished), (finished / "config.yaml").read_text()
    run_here("cluster", finished, "--again", "clustering.n_clusters=161", "--quiet").refusal()
    run_here("cluster", finished, "--again", "clustering.neighbors=9", "--quiet").refusal()
    assert contents(finished) == before
    assert (finished / "config.yaml").read_text() == config


def test_again_forgets_baselines_of_other_clusters(tmp_path: Path) -> None:
    words = ["digits", *TINY, "evaluation.baselines=true", "evaluation.baseline_seeds=1", "selflabel=null"]
    assert run_here("run", *words, "--out", "out", "--quiet").code == 0
    old = RunFolder(tmp_path / "out").summary().baselines
    assert run_here("cluster", "out", "--again", "--clusters", 4, "--quiet").code == 0
    new = RunFolder(tmp_path / "out").summary().baselines
    assert old is not None and new is not None
    assert new["kmeans_pixels"]["acc_mean"] < old["kmeans_pixels"]["acc_mean"]


# -- disks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("function", ["open", "replace", "mkdir"])
def test_a_folder_that_cannot_be_written(code: int, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(code, os.strerror(code), "out/config.yaml")

    monkeypatch.setattr(Path if function == "mkdir" else os, function, refuse)
    message = run_here("run", "digits", *TINY, "--out", "out").refusal()
    assert "out/config.yaml: not writable or not readable" in message
    monkeypatch.undo()
    assert not list(Path().glob("out/*.yaml"))


@pytest.mark.parametrize(("at", "seconds"), [(1, 60), (3, 60), (6, 60), (9, 60), (12, 60), (4, 0), (11, 0)])
def test_a_full_disk_costs_nothing(
    at: int, seconds: int, tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0

    def fsync(handle: int) -> None:
        nonlocal count
        count += 1
        if count == at:
            # What was being written is lost: a new file, or the line that was appended to the journal.
            appended = os.readlink(f"/proc/self/fd/{handle}").endswith(JOURNAL)
            os.ftruncate(handle, os.fstat(handle).st_size - 20 if appended else 10)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    words = ["run", "digits", *TINY, f"runtime.checkpoint_seconds={seconds}", "--out", "out", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert "the disk is full" in run_here(*words).refusal()
    for path in tmp_path.glob("out/checkpoints/*.pt"):
        assert torch.load(path, weights_only=True)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    result = run_here(*words)
    assert result.code == 0, result.err
    assert results(tmp_path / "out") == results(finished_run)


def test_a_full_disk_in_the_middle_of_a_line_of_metrics(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, count = RunFolder.append_metrics, 0

    def half(self: RunFolder, entry: MetricsEntry) -> None:
        nonlocal count
        count += 1
        if count == 4:  # clustering, epoch 1
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write('{"stage": "clustering", "ep')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, entry)

    words = ["run", "digits", *TINY, "--out", "out", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_metrics", half)
        assert "the disk is full" in run_here(*words).refusal()
    assert run_here(*words).code == 0
    assert results(tmp_path / "out") == results(finished_run)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(finished: Path) -> None:
    finished.chmod(0o555)
    try:
        assert "not writable" in run_here("run", finished).refusal()
    finally:
        finished.chmod(0o755)


def test_refusals_in_a_process_of_their_own(tmp_path: Path) -> None:
    fill(tmp_path / "images", 8)
    shutil.copy(tmp_path / "images" / "000.png", tmp_path / "images" / "zzz.png")
    (tmp_path / "images" / "bad.jpg").write_bytes(b"bad")
    words = ["run", "--data", tmp_path / "images", "--clusters", 2, "--out", tmp_path / "out", *TINY_FOLDER]
    assert "bad.jpg" in Process(*words, log=tmp_path / "log").result().refusal()
