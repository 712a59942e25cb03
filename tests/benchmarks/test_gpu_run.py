"""The run in given minutes: its plan, its images, its results, and how it resumes."""

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks.gpu_run import archive, schedule
from benchmarks.gpu_run import run as gpu_run
from benchmarks.gpu_run.watch import EXIT_TIME
from scan_fast.errors import DataError
from scan_fast.runs.config import find_config, load_config

FULL = {"pretext": 200, "clustering": 30, "selflabel": 100}

# -- the plan --------------------------------------------------------------------------------------------------------

seconds = st.floats(0.01, 100)
speeds = st.builds(
    lambda a, b, c, once: schedule.Speeds({"pretext": a, "clustering": b, "selflabel": c}, once),
    seconds,
    seconds,
    seconds,
    st.floats(0, 100),
)


@given(speeds, st.floats(0, 50_000), st.floats(0, 5_000))
def test_a_plan_fits_the_time_and_grows_with_it(measured: schedule.Speeds, available: float, more: float) -> None:
    needed = measured.seconds(dict.fromkeys(FULL, 1))
    if available < needed:
        with pytest.raises(schedule.TooShort, match="one epoch of each stage takes"):
            schedule.plan_epochs(FULL, measured, available)
        return
    plan = schedule.plan_epochs(FULL, measured, available)
    assert measured.seconds(plan) <= available
    assert all(1 <= plan[name] <= FULL[name] for name in FULL)
    # What is left would not pay for an epoch of the dearest stage, unless nothing is left to do.
    assert plan == FULL or available - measured.seconds(plan) < max(measured.epochs.values()) + 1e-6
    longer = schedule.plan_epochs(FULL, measured, available + more)
    assert all(longer[name] >= plan[name] for name in FULL)


def test_the_plan_of_a_known_machine() -> None:
    measured = schedule.Speeds({"pretext": 4.0, "clustering": 5.0, "selflabel": 3.0}, once=30.0)
    # 30 s and 800, 150 and 300 s at full length: a quarter of them is 312.5 s.
    assert schedule.plan_epochs(FULL, measured, 30 + 1250) == FULL
    plan = schedule.plan_epochs(FULL, measured, 30 + 312.5)
    assert plan == {"pretext": 50, "clustering": 7, "selflabel": 25}


def test_a_dear_epoch_that_does_not_fit_leaves_no_place_to_cheap_ones() -> None:
    full = {"dear": 2, "cheap": 10}
    measured = schedule.Speeds({"dear": 10.0, "cheap": 1.0}, once=0.0)
    plans = [schedule.plan_epochs(full, measured, available) for available in range(11, 40)]
    assert all(later[name] >= former[name] for former, later in pairwise(plans) for name in full)
    assert plans[0] == {"dear": 1, "cheap": 1} and plans[-1] == full


def test_the_warm_up_is_scaled_along() -> None:
    config = load_config(find_config("cifar10"), (), {"preset": "fast"})
    assert schedule.learned_stages(config) == FULL
    assert config.pretext.schedule.warmup_epochs == 10
    changes = schedule.scaled(config, {"pretext": 50, "clustering": 7, "selflabel": 25})
    assert changes == {
        "pretext.epochs": 50,
        "pretext.schedule.warmup_epochs": 2,  # of 2.5, rounded to even
        "clustering.epochs": 7,
        "selflabel.epochs": 25,
    }
    assert schedule.scaled(config, {"pretext": 200})["pretext.schedule.warmup_epochs"] == 10
    assert schedule.scaled(config, {"pretext": 2})["pretext.schedule.warmup_epochs"] == 1
    assert schedule.scaled(config, {"pretext": 1})["pretext.schedule.warmup_epochs"] == 0


# -- the archive -----------------------------------------------------------------------------------------------------

CLASSES = ("cat", "dog", "frog")


def jpeg(number: int, size: int = 32) -> bytes:
    """Return an image whose color depends on its number."""
    pixels = np.random.default_rng(number).integers(0, 60, (size, size, 3))
    pixels[..., number % 3] += 120 + number
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an archive with 16 training and 6 test images of each class, out of order."""
    path = tmp_path_factory.mktemp("data") / "small.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        for split, count in (("test", 6), ("train", 16)):
            for row in reversed(range(count)):
                for label, name in enumerate(CLASSES):
                    add(tar, f"{split}/{name}/{row:04d}.jpg", jpeg(3 * row + label))
        add(tar, "README.md", b"no image")
    return path


def said(lines: list[str]) -> Callable[[str], None]:
    return lines.append


def test_the_archive_is_read_in_order(small: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    splits = archive.open_archive(small, tmp_path / "kept", say=said(lines))
    assert splits.test is not None
    assert len(splits.train) == 48 and len(splits.test) == 18
    assert splits.train.class_names == list(CLASSES)
    assert splits.train.labels is not None and splits.train.labels.tolist() == [i // 16 for i in range(48)]
    assert splits.train.paths[17] == "train/dog/0001.jpg" and splits.test.paths[-1] == "test/frog/0005.jpg"
    expected = np.asarray(Image.open(io.BytesIO(jpeg(3 * 1 + 1))))
    assert torch.equal(splits.train.read(torch.tensor([17]))[0], torch.from_numpy(expected.copy()))
    assert "48 training and 18 test images decoded in" in lines[0]


def test_what_was_decoded_is_kept(small: Path, tmp_path: Path) -> None:
    first = archive.open_archive(small, tmp_path, say=said([]))
    lines: list[str] = []
    again = archive.open_archive(small, tmp_path, say=said(lines))
    assert "read from an earlier decoding" in lines[0]
    rows = torch.arange(48)
    assert torch.equal(first.train.read(rows), again.train.read(rows))
    assert again.train.paths == first.train.paths


def test_a_part_of_the_images(small: Path, tmp_path: Path) -> None:
    part = archive.open_archive(small, tmp_path, 20, said([]))
    assert part.test is not None
    assert len(part.train) == 20 and len(part.test) == 18
    assert part.train.paths == archive.open_archive(small, tmp_path, 20, said([])).train.paths
    assert part.train.paths == sorted(set(part.train.paths))
    assert part.train.labels is not None and len(part.train.labels.unique()) == 3


def test_archives_that_cannot_be_used(small: Path, tmp_path: Path) -> None:
    def refused(path: Path, line: str) -> None:
        with pytest.raises(DataError, match=line):
            archive.open_archive(path, tmp_path / "kept", say=said([]))

    refused(tmp_path / "none.tar.xz", "cannot be read: No such file")
    cut = tmp_path / "cut.tar.xz"
    cut.write_bytes(small.read_bytes()[: small.stat().st_size // 2])
    refused(cut, "is damaged")
    text = tmp_path / "text.tar"
    text.write_text("no archive")
    refused(text, "is damaged")

    def packed(name: str, *files: tuple[str, bytes]) -> Path:
        with tarfile.open(tmp_path / name, "w") as tar:
            for file, content in files:
                add(tar, file, content)
        return tmp_path / name

    refused(packed("flat.tar", ("0.jpg", jpeg(0))), "it holds 0.jpg")
    refused(packed("train.tar", ("train/a/0.jpg", jpeg(0))), "of the same classes, it has 1 and 0")
    files = (("train/a/0.jpg", jpeg(0)), ("train/a/1.jpg", b"\xff\xd8 no more"), ("test/a/0.jpg", jpeg(0)))
    refused(packed("broken.tar", *files), "train/a/1.jpg in the archive is no image")
    files = (("train/a/0.jpg", jpeg(0)), ("train/a/1.jpg", jpeg(0, 40)), ("test/a/0.jpg", jpeg(0)))
    refused(packed("sizes.tar", *files), "train/a/0.jpg has 32 x 32, train/a/1.jpg has 40 x 40")
    assert not (tmp_path / "kept").exists()


# -- the run ---------------------------------------------------------------------------------------------------------

SMALL = [
    *("model.width=0.0625", "mining.k=5", "clustering.n_clusters=3", "clustering.heads=2"),
    *("pretext.batch_size=16", "clustering.batch_size=16", "selflabel.batch_size=16", "selflabel.evaluate_every=1"),
]
EPOCHS = ["pretext.epochs=15", "clustering.epochs=3", "selflabel.epochs=3"]


def arguments(small: Path, folder: Path, *more: str, minutes: float = 10) -> list[str]:
    options = ["--minutes", str(minutes), "--device", "cpu", "--archive", str(small)]
    options += ["--out", str(folder / "out"), "--run-folder", str(folder / "run")]
    return [*options, *more, *SMALL]


def result(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "out" / "gpu_run.json").read_text())
    return content


def start(small: Path, folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "benchmarks.gpu_run", *arguments(small, folder, *EPOCHS)]
    return subprocess.Popen(command, cwd=gpu_run.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(folder: Path, process: "subprocess.Popen[str]", stage: str) -> None:
    """Wait until a stage has recorded an epoch."""
    metrics = folder / "run" / "run" / "metrics.jsonl"
    begin = time.monotonic()
    while not (metrics.is_file() and f'"stage": "{stage}"' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() - begin < 240
        time.sleep(0.02)


@pytest.mark.slow
def test_stopped_and_killed_it_goes_on_to_the_same_result(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCAN_FAST_COMMIT", "c0ffee")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert gpu_run.main(arguments(small, whole, *EPOCHS), time.monotonic()) == 0

    first = start(small, cut)
    wait_for(cut, first, "pretext")
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=240)
    assert first.returncode == 128 + signal.SIGTERM, output
    assert "interrupted by SIGTERM, no stage is finished, pretext is in epoch" in output.splitlines()[-1]
    stopped = result(cut)
    assert stopped["status"] == "interrupted by SIGTERM" and stopped["stages"] == {}
    assert stopped["unfinished"]["pretext"]["epoch"] >= 1
    # The checkpoint holds every step until then, not those of 20 seconds ago.
    state = torch.load(cut / "run" / "run" / "checkpoints" / "pretext.pt", weights_only=True)
    assert state["epoch"] >= stopped["unfinished"]["pretext"]["epoch"]

    second = start(small, cut)
    wait_for(cut, second, "clustering")
    second.kill()
    output, _ = second.communicate(timeout=240)
    assert "pretext: going on after epoch" in output and "plan: going on with pretext 15," in output
    killed = result(cut)
    assert killed["status"] == "running" and list(killed["stages"]) == ["pretext", "mining"]

    assert gpu_run.main(arguments(small, cut, *EPOCHS), time.monotonic()) == 0
    one, other = result(whole), result(cut)
    assert one["status"] == other["status"] == "finished"
    assert one["environment"]["commit"] == "c0ffee" and one["dataset"] == "CIFAR-10 (JPEG)"
    assert one["plan"]["epochs"] == {"pretext": 15, "clustering": 3, "selflabel": 3}
    for content in (one, other):
        for entry in content["stages"].values():
            assert entry.pop("seconds") >= 0
    assert one["stages"] == other["stages"]
    assert set(one["stages"]) == {"pretext", "mining", "clustering", "selflabel"}
    assert 0 <= one["stages"]["pretext"]["knn_acc"] <= 1 and 0 <= one["stages"]["mining"]["purity"] <= 1
    assert {"acc", "nmi", "ari"} <= one["stages"]["selflabel"]["test"].keys()
    models = [torch.load(f / "run" / "run" / "model.pt", weights_only=True)["state_dict"] for f in (whole, cut)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.serial
@pytest.mark.slow
def test_time_that_ends_in_the_middle(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = ["pretext.epochs=100000"]
    # A plan first: of a run that is stopped as soon as it trains.
    handler = signal.getsignal(signal.SIGTERM)
    run = tmp_path / "run" / "run" / "metrics.jsonl"
    first = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_run", *arguments(small, tmp_path, *many, minutes=100_000)],
        cwd=gpu_run.ROOT,
    )
    wait_for(tmp_path, first, "pretext")  # type: ignore[arg-type]
    first.terminate()
    first.wait(timeout=240)
    before = result(tmp_path)["unfinished"]["pretext"]["epoch"]

    capsys.readouterr()
    begin = time.monotonic()
    assert gpu_run.main(arguments(small, tmp_path, *many, minutes=0.2), begin) == EXIT_TIME
    assert time.monotonic() - begin < 30
    content = result(tmp_path)
    assert content["status"].startswith("time is up after 0.2 minutes")
    assert content["unfinished"]["pretext"]["epoch"] > before
    assert f"is in epoch {content['unfinished']['pretext']['epoch'] + 1} of" in capsys.readouterr().out
    assert run.is_file() and signal.getsignal(signal.SIGTERM) is handler


def test_too_few_minutes_say_how_many_are_needed(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_run.main(arguments(small, tmp_path, minutes=0.001), time.monotonic()) == gpu_run.EXIT_USAGE
    line = capsys.readouterr().out.splitlines()[-1]
    assert "--minutes 0.001 is too short: 0 s are left, but one epoch of each stage takes" in line
    assert line.endswith("minutes are needed")
    assert not (tmp_path / "run" / "plan.json").exists() and not (tmp_path / "run" / "measure").exists()
    # It says the same in the log.
    assert (tmp_path / "out" / "gpu_run.log").read_text().splitlines()[-1] == line


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_no_gpu(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = arguments(small, tmp_path)
    options[options.index("cpu")] = "cuda"
    assert gpu_run.main(options, time.monotonic()) == gpu_run.EXIT_USAGE
    assert "there is no GPU that torch can use; --device cpu rehearses" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            ["--archive", "nothing.tar.xz"],
            "there is no archive nothing.tar.xz; name cifar10-jpeg.tar.xz with --archive",
        ),
        (["pretext.epoch=3"], "unknown key pretext.epoch: did you mean pretext.epochs?"),
        (["nonsense"], "expected section.key=value, got 'nonsense'"),
    ],
)
def test_other_mistakes_are_one_line(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], line: str
) -> None:
    assert gpu_run.main(arguments(small, tmp_path, *more), time.monotonic()) == gpu_run.EXIT_USAGE
    assert capsys.readouterr().out.splitlines()[-1] == f"gpu_run: {line}"


def test_a_folder_of_another_run_is_one_line(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "run").mkdir(parents=True)
    (tmp_path / "run" / "run" / "notes.txt").write_text("something else")
    assert gpu_run.main(arguments(small, tmp_path, *EPOCHS), time.monotonic()) == gpu_run.EXIT_USAGE
    assert "is not empty and is no run folder" in capsys.readouterr().out.splitlines()[-1]
