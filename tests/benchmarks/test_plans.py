"""Plans of trials: what is refused, how they stop and go on, and what must stay once there is a result."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from benchmarks.trials import command, running
from benchmarks.trials.plan import check_same, hidden, read_plan, resolve
from scan_fast.runs.artifacts import CONFIG, PRETEXT_MODEL
from scan_fast.runs.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
PLAN: dict[str, Any] = {
    "title": "Small images",
    "config": "digits",
    "set": [
        "data.source=folder",
        "data.root=FOLDER",
        "data.image_size=8",
        "model.width=0.25",
        "pretext.epochs=2",
        "pretext.batch_size=16",
        "clustering.n_clusters=2",
        "mining.k=3",
        "runtime.threads=1",
    ],
    "until": "mining",
    "seeds": [0],
    "trials": [
        {"name": "base", "predicted": "the best"},
        {"name": "far", "changes": ["mining.k=5"], "predicted": "a point less"},
    ],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 60 noisy images of two classes, of which one is a little brighter."""
    folder = tmp_path_factory.mktemp("somewhere")
    generator = np.random.default_rng(0)
    for label in (0, 1):
        (folder / str(label)).mkdir()
        for number in range(30):
            pixels = generator.integers(20 * label, 20 * label + 236, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / str(label) / f"{number}.png")
    return folder


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**PLAN, **changes}))
    return path


def words(plan: Path, images: Path, *more: str) -> list[str]:
    folder = plan.parent
    given = ["--plan", str(plan), "--work", str(folder / "work"), "--json", str(folder / "result.json")]
    return [*given, "--set", f"data.root={images}", "runtime.checkpoint_seconds=0", *more]


def run(plan: Path, images: Path, *more: str) -> int:
    return command.main(words(plan, images, *more), time.monotonic())


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("trials: ")
    return captured.err


# -- bad plans -------------------------------------------------------------------------------------------------------

TRIAL = {"name": "a", "predicted": "b"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [0]}, "unknown key seed: did you mean seeds?"),
        ({"until": "end"}, "until: input should be 'pretext'"),
        ({"seeds": [1, 1]}, "seeds: must be different numbers from 0, got 1, 1"),
        ({"seeds": []}, "seeds: "),
        ({"trials": []}, "trials: "),
        ({"trials": ["base"]}, "trial 1: must have name, changes, predicted, outcome, got 'base'"),
        ({"trials": [{"name": "a"}]}, "trial 'a': predicted is missing"),
        ({"trials": [{**TRIAL, "change": []}]}, "trial 'a': unknown key change: did you mean changes?"),
        ({"trials": [TRIAL, TRIAL]}, "two trials have the name 'a'"),
        ({"trials": [TRIAL, {"name": "c", "predicted": "d"}]}, "the trials 'a' and 'c' have the same settings"),
        ({"trials": [{**TRIAL, "changes": ["pretext.epoch=3"]}]}, "trial 'a': unknown key pretext.epoch: did you mean"),
        ({"trials": [{**TRIAL, "changes": ["mining.k=0"]}]}, "trial 'a': mining.k: "),
        ({"trials": [{**TRIAL, "changes": ["mining.k"]}]}, "expected section.key=value, got 'mining.k'"),
        ({"trials": [{**TRIAL, "changes": ["seed=3"]}]}, "seed cannot be set; a plan has seeds for it"),
        ({"trials": [{**TRIAL, "changes": ["pretext.method=none"]}]}, "trial 'a': pretext.method=none takes the"),
        ({"trials": [{**TRIAL, "changes": ["mining.k=80"]}]}, "trial 'a': mining.k=80 must be below the number of"),
        ({"set": ["data.root=/home/images"]}, "write data.root=FOLDER, and give --set data.root=PATH"),
        ({"config": "digit"}, "there is no configuration 'digit' (did you mean digits?)"),
        ({"config": "/home/digits.yaml"}, "config names a file of one machine"),
        ({"until": "selflabel", "set": [*PLAN["set"], "selflabel=null"]}, "there is no stage until selflabel"),
    ],
)
def test_a_mistake_in_a_plan_is_one_line_before_anything_runs(
    changes: dict[str, Any], message: str, tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(write(tmp_path, **changes), images) == 2
    assert message in refused(capsys)
    assert not (tmp_path / "work").exists() and not (tmp_path / "result.json").exists()


def test_a_plan_that_leaves_the_images_open_needs_their_folder(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write(tmp_path)
    assert command.main(["--plan", str(plan), "--work", str(tmp_path / "work")]) == 2
    assert "the plan leaves the images open: give --set data.root=PATH" in refused(capsys)
    assert run(plan, images, "pretext.epochs=9") == 2
    assert "--set pretext.epochs: with --plan only data.root" in refused(capsys)
    assert command.main(["--plan", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml cannot be read" in refused(capsys)
    assert hidden(["a=1", "data.root=/x"]) == ["a=1", "data.root=FOLDER"]


@pytest.mark.parametrize(
    "given",
    [[], ["--plan", "p.yaml", "base"], ["--plan", "p.yaml", "--until", "mining"], ["--metric", "acc", "base"]],
)
def test_options_that_exclude_each_other_are_refused(given: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.parse(given)
    assert stopped.value.code == 2


def test_the_plans_here_are_valid() -> None:
    plans = sorted((ROOT / "benchmarks" / "plans").glob("*.yaml"))
    assert plans
    for path in plans:
        assert resolve(read_plan(path), path, [])


# -- what must stay --------------------------------------------------------------------------------------------------


def test_what_has_a_result_stays(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = write(tmp_path)
    assert run(plan, images) == 0
    text = (tmp_path / "result.json").read_text()
    assert str(images) not in text and "data.root=FOLDER" in text
    result = json.loads(text)
    first, second = (result["trials"][name]["seeds"]["0"] for name in ("base", "far"))
    assert first["pretext"] == second["pretext"] and first["mining"] != second["mining"]
    # One network, whose purity depends on the number of neighbours.
    starts = [result["untrained"][trial["untrained"]]["0"] for trial in result["trials"].values()]
    assert starts[0]["pretext"] == starts[1]["pretext"] and starts[0]["mining"] != starts[1]["mining"]

    # An outcome and a trial that has not run may be added, and what is known is not measured again.
    trials = [{**PLAN["trials"][0], "outcome": "the best"}, PLAN["trials"][1]]
    trials += [{"name": "farther", "changes": ["mining.k=7"], "predicted": "less"}]
    assert run(write(tmp_path, trials=trials), images) == 0
    again = json.loads((tmp_path / "result.json").read_text())
    assert again["trials"]["base"] == {**result["trials"]["base"], "outcome": "the best"}
    assert again["trials"]["farther"]["seeds"]["0"]["pretext"] == first["pretext"]
    capsys.readouterr()

    rising = [{**trials[0], "predicted": "the worst"}, *trials[1:]]
    changed = [{**trials[0], "changes": ["mining.k=4"]}, *trials[1:]]
    others: list[tuple[dict[str, Any], str]] = [
        ({"trials": rising}, "so its prediction must stay 'the best', got 'the worst'"),
        ({"trials": changed}, "so its changes must stay '', got 'mining.k=4'"),
        ({"trials": trials[1:]}, "has results of the trial 'base', which"),
        ({"trials": trials, "seeds": [1]}, "has results of seed 0, which"),
        ({"trials": trials, "until": "pretext"}, "is of another plan: its until is 'mining', that of"),
        ({"trials": trials, "set": [*PLAN["set"], "pretext.epochs=3"]}, "is of another plan: its set is"),
    ]
    for changes, message in others:
        assert run(write(tmp_path, **changes), images) == 2
        assert message in refused(capsys)
    # A work folder of another plan is refused without its result file, too.
    (tmp_path / "result.json").unlink()
    assert run(write(tmp_path, trials=rising), images) == 2
    assert "work" in refused(capsys)
    (tmp_path / "result.json").write_text("[1]")
    assert run(write(tmp_path, trials=trials), images) == 2
    assert "is no result of benchmarks.trials" in refused(capsys)
    (tmp_path / "result.json").write_text("{")
    assert run(write(tmp_path, trials=trials), images) == 2
    assert "is no result of trials that can be read" in refused(capsys)


def test_a_trial_without_a_result_may_change(tmp_path: Path) -> None:
    path = write(tmp_path)
    plan = read_plan(path)
    known = {**plan.model_dump(mode="json"), "trials": {"gone": {"changes": ["a=1"], "predicted": "x", "seeds": {}}}}
    check_same(known, plan, path, tmp_path / "result.json")


# -- stopping and going on -------------------------------------------------------------------------------------------


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not condition():
        assert process.poll() is None, "the process ended by itself"
        time.sleep(0.02)


def test_a_killed_plan_goes_on_within_the_stage(tmp_path: Path, images: Path) -> None:
    """It ends in the same bits as one that was never interrupted, and its CPU seconds add up."""
    settings = {"set": [*PLAN["set"], "pretext.epochs=8"], "until": "pretext", "trials": PLAN["trials"][:1]}
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, killed = write(tmp_path / "whole", **settings), write(tmp_path / "killed", **settings)
    assert run(whole, images) == 0

    code = [sys.executable, "-m", "benchmarks.trials", *words(killed, images)]
    with subprocess.Popen(code, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        wait_for(
            lambda: any("epoch 2" in file.read_text() for file in killed.parent.glob("work/*/seconds.json")), process
        )
        process.send_signal(signal.SIGKILL)
    assert not json.loads((killed.parent / "result.json").read_text())["trials"]["base"]["seeds"]
    (notes,) = killed.parent.glob("work/*/seconds.json")
    noted = json.loads(notes.read_text())
    assert "end" not in noted

    before = time.process_time()
    assert run(killed, images) == 0
    spent = time.process_time() - before
    ours, theirs = (
        json.loads((plan.parent / "result.json").read_text())["trials"]["base"]["seeds"]["0"]["pretext"]
        for plan in (killed, whole)
    )
    assert {**ours, "cpu_seconds": 0} == {**theirs, "cpu_seconds": 0}
    assert min(noted.values()) < ours["cpu_seconds"] <= max(noted.values()) + spent + 0.01
    (first,), (second,) = (list(plan.parent.glob("work/*/checkpoints/pretext.pt")) for plan in (killed, whole))
    weights, others = (torch.load(file, weights_only=True)["model"] for file in (first, second))
    assert weights.keys() == others.keys() and all(torch.equal(weights[key], others[key]) for key in weights)


def test_the_note_of_the_checkpoint_at_hand_counts(tmp_path: Path) -> None:
    """A kill between the note and the checkpoint leaves the checkpoint before, whose note is kept."""
    folder = running.MeasuredFolder(tmp_path, "pretext", running.clock_of("cpu"))
    folder.begin()
    for position in ("epoch 0, step 1", "epoch 0, step 2", "epoch 0, step 3"):
        folder._note(position)
    notes = json.loads((tmp_path / running.SECONDS).read_text())
    assert list(notes) == ["epoch 0, step 2", "epoch 0, step 3"]
    assert 0 <= notes["epoch 0, step 2"] <= notes["epoch 0, step 3"]


@pytest.mark.slow
def test_a_plan_stops_with_a_checkpoint_when_its_minutes_are_over(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write(tmp_path, set=[*PLAN["set"], "pretext.epochs=1000000"])
    assert run(plan, images, "--minutes", "0.25") == 0
    text = capsys.readouterr().out
    assert "time is up" in text and "0 of 2 runs are done; left: base (seed 0), far (seed 0)" in text
    assert "of base (seed 0), pretext has a checkpoint in epoch" in text and "the same command goes on" in text
    assert len(list(tmp_path.glob("work/*/checkpoints/pretext.pt"))) == 1


def test_no_time_is_no_training(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(write(tmp_path), images, "--minutes", "0.0001") == 0
    text = capsys.readouterr().out
    assert "time is up" in text and "pretext has no checkpoint yet" in text


# -- seeds and networks ----------------------------------------------------------------------------------------------


def test_the_seeds_come_in_turn_and_each_network_has_its_start(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = [*PLAN["trials"][:1], {"name": "narrow", "changes": ["model.width=0.125"], "predicted": "less"}]
    trials += [{"name": "longer", "changes": ["pretext.epochs=3"], "predicted": "more"}]
    assert run(write(tmp_path, trials=trials, seeds=[3, 1], until="pretext"), images) == 0
    lines = [line.partition(": {")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("seed")]
    assert lines == [f"seed {seed}, {name}" for seed in (3, 1) for name in ("base", "narrow", "longer")]
    result = json.loads((tmp_path / "result.json").read_text())
    starts = {name: trial["untrained"] for name, trial in result["trials"].items()}
    assert starts["base"] == starts["longer"] != starts["narrow"]
    assert {key: sorted(seeds) for key, seeds in result["untrained"].items()} == {
        key: ["1", "3"] for key in set(starts.values())
    }


def test_the_start_of_a_whitened_stem_is_whitened(tmp_path: Path, images: Path) -> None:
    """The untrained network is the one that training starts from."""
    trials: list[dict[str, Any]] = [
        {"name": "random", "predicted": "less"},
        {"name": "whitened", "changes": ["model.stem=whitened"], "predicted": "more"},
    ]
    assert run(write(tmp_path, trials=trials, until="pretext"), images) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["trials"]["whitened"]["untrained"] != result["trials"]["random"]["untrained"]
    runs = [RunFolder(folder) for folder in (tmp_path / "work").glob("untrained-*")]
    stems = {str(run.read(CONFIG).model.stem): run.read(PRETEXT_MODEL).model["backbone.conv1.weight"] for run in runs}
    pairs = len(stems["whitened"]) // 2
    for name, is_white in (("whitened", True), ("random", False)):
        assert stems[name][:pairs].equal(-stems[name][pairs : 2 * pairs]) is is_white
