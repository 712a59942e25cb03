"""A run that is killed at any moment and started again ends in the same bits as one that was left alone."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from driving import TINY, Death, Process, contents, metrics, results, run_here, tiny_config, wait_for

from scan_fast.models.heads import PretextModel
from scan_fast.runs.artifacts import SUMMARY
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.tracker import Tracker
from scan_fast.stages.handover import Handover
from scan_fast.stages.pretext import Pretext
from scan_fast.training.context import open_context
from scan_fast.training.loop import train
from scan_fast.views import render_dali

EVERY_STEP = "runtime.checkpoint_seconds=0"
KMEANS = "clustering.initialize=kmeans"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    process = Process("run", "digits", *TINY, KMEANS, "--out", folder, log=folder.parent / "log")
    assert process.result().code == 0
    return folder


def restart_until_done(words: list[object], tmp_path: Path, deaths: list[Death]) -> int:
    """Run a command with one death after another until it ends by itself; return how often it died."""
    for count in range(60):
        death = deaths[count % len(deaths)]
        result = Process(*words, log=tmp_path / "log", death=death).result()
        if result.code == 0:
            return count
        assert result.code == -signal.SIGKILL, result.err
    raise AssertionError("no progress in 60 starts")


def test_killed_at_renamings_all_along(undisturbed: Path, tmp_path: Path) -> None:
    generator = random.Random(0)
    deaths = [Death(generator.randint(2, 14), before=bool(generator.getrandbits(1))) for _ in range(60)]
    words = ["run", "digits", *TINY, KMEANS, EVERY_STEP, "--out", tmp_path / "run", "--quiet"]
    count = restart_until_done(words, tmp_path, deaths)
    assert count >= 5
    assert results(tmp_path / "run") == results(undisturbed)
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_killed_at_renamings_in_bfloat16(tmp_path: Path) -> None:
    words = ["run", "digits", *TINY, "precision=bfloat16", "--quiet", "--out"]
    assert run_here(*words, tmp_path / "whole").code == 0
    generator = random.Random(2)
    deaths = [Death(generator.randint(4, 14), before=bool(generator.getrandbits(1))) for _ in range(60)]
    assert restart_until_done([*words, tmp_path / "run", EVERY_STEP], tmp_path, deaths) >= 2
    assert results(tmp_path / "run") == results(tmp_path / "whole")


@pytest.mark.skipif(not render_dali.is_installed(), reason=f"DALI is not installed: {render_dali.INSTALL}")
def test_views_by_dali_are_the_same_after_a_death(tmp_path: Path) -> None:
    words = ["run", "digits", *TINY, "data.renderer=dali", "--quiet", "--out"]
    assert run_here(*words, tmp_path / "whole").code == 0
    deaths = [Death(12, before=False), Death(9, before=True)] + [Death(1000, before=True)] * 58
    assert restart_until_done([*words, tmp_path / "run", EVERY_STEP], tmp_path, deaths) == 2
    assert results(tmp_path / "run") == results(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("config.yaml", True),
        ("pretext-final.pt", False),
        ("embeddings.npz", False),
        ("neighbors.npz", True),
        ("clustering.pt", True),
        ("selflabel-final.pt", False),
        ("model.pt", False),
        ("report.html", True),
    ],
)
def test_killed_at_a_file(name: str, before: bool, undisturbed: Path, tmp_path: Path) -> None:
    words = ["run", "digits", *TINY, KMEANS, "--out", tmp_path / "run", "--quiet"]
    # Checkpoints are rare here, so that the stage's last one is the first.
    result = Process(*words, log=tmp_path / "log", death=Death(1, before, name)).result()
    assert result.code == -signal.SIGKILL, result.err
    assert bool(list((tmp_path / "run").rglob(name))) != before
    again = run_here(*words)
    assert again.code == 0, again.err
    assert results(tmp_path / "run") == results(undisturbed)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in undisturbed.iterdir()}


def test_killed_between_metrics_and_summary(undisturbed: Path, tmp_path: Path) -> None:
    # Each stage enters its metrics first and itself into summary.json then; the second stage is mining.
    words = ["run", "digits", *TINY, KMEANS, "--out", tmp_path / "run", "--quiet"]
    death = Death(2, before=True, name="summary.json")
    assert Process(*words, log=tmp_path / "log", death=death).result().code == -signal.SIGKILL
    assert "mining" in {entry["stage"] for entry in metrics(tmp_path / "run")}
    assert run_here(*words).code == 0
    assert results(tmp_path / "run") == results(undisturbed)


@pytest.mark.slow
def test_killed_at_random_moments_with_two_threads(tmp_path: Path) -> None:
    words = ["run", "digits", *TINY, "pretext.epochs=4"]
    words += ["runtime.threads=2", EVERY_STEP, "--quiet"]
    assert Process(*words, "--out", tmp_path / "whole", log=tmp_path / "log").result().code == 0
    generator = random.Random(1)
    for _ in range(6):
        process = Process(*words, "--out", tmp_path / "run", log=tmp_path / "log")
        process.process.join(generator.uniform(0.3, 3.0))
        process.signal(signal.SIGKILL)
        assert process.result().code in (0, -signal.SIGKILL)
    assert Process(*words, "--out", tmp_path / "run", log=tmp_path / "log").result().code == 0
    assert results(tmp_path / "run") == results(tmp_path / "whole")


def test_goes_on_in_mid_epoch(tmp_path: Path) -> None:
    config = tiny_config(EVERY_STEP, "pretext.epochs=1", "pretext.batch_size=20")

    class Stop(Exception):
        pass

    class Interrupted(Pretext):
        steps = 0
        stop_at = 0

        def step(self, batch):  # type: ignore[no-untyped-def]
            self.steps += 1
            if self.steps == self.stop_at:
                raise Stop
            return super().step(batch)

    def attempt(folder: str, stop_at: int) -> Interrupted:
        run = RunFolder.open(tmp_path / folder, config)
        with run:
            context = open_context(config, run, Tracker(run, quiet=True))
            torch.manual_seed(0)
            model = PretextModel(context.model_config)
            method = context.config.pretext.method.build(model, context.splits.train.size)
            stage = Interrupted(context, model, method, Handover())
            stage.stop_at = stop_at
            with contextlib.suppress(Stop):
                train(stage, context)
        return stage

    whole = attempt("whole", 0)
    assert whole.steps == 8
    first = attempt("parts", 4)
    assert first.steps == 4
    second = attempt("parts", 0)
    # Three steps were saved before the fourth was interrupted, so five are left, not eight.
    assert second.steps == 5
    state, other = whole.model.state_dict(), second.model.state_dict()
    assert all(state[key].equal(other[key]) for key in state)
    (one,), (two,) = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert {k: v for k, v in one.items() if k != "time"} == {k: v for k, v in two.items() if k != "time"}


def test_interrupt_is_one_line_and_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["run", "digits", *TINY, KMEANS, EVERY_STEP, "--out", run, "--quiet"]
    interrupt = Death(2, name="pretext.pt", signal=signal.SIGINT)
    result = Process(*words, log=tmp_path / "log", death=interrupt).result()
    assert result.code == 130
    early = "and with --finish it groups by what was learned so far"
    assert result.err == f"scan-fast: interrupted; the same command continues, {early}\n"
    assert not (run / "report.html").exists()
    assert run_here(*words).code == 0
    assert results(run) == results(undisturbed)


def test_a_finished_run_is_left_alone(finished: Path) -> None:
    before = contents(finished)
    for words in (["run", finished], ["run", "digits", *TINY, "--out", finished], ["cluster", finished]):
        result = run_here(*words)
        assert result.code == 0, result.err
        assert "finished before" in result.out
        assert contents(finished) == before


def test_an_unfinished_run_continues_from_its_folder(finished: Path, finished_run: Path) -> None:
    # Stages that are finished are not done again: their files keep their time.
    before = contents(finished)
    assert run_here("selflabel", finished, "--again", "--quiet").code == 0
    folder = RunFolder(finished)
    content = folder.summary()
    del content.stages["selflabel"]
    folder.write(SUMMARY, content)
    (finished / "report.html").unlink()
    assert run_here("run", finished, "--quiet").code == 0
    assert results(finished) == results(finished_run)
    after = contents(finished)
    for name in ("checkpoints/pretext-final.pt", "neighbors.npz", "checkpoints/clustering-final.pt"):
        assert after[name] == before[name]


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["run", "digits", *TINY, "pretext.epochs=5000", EVERY_STEP, "--out", run, "--quiet"]
    process = Process(*words, log=tmp_path / "log")
    wait_for((run / "checkpoints" / "pretext.pt").exists)
    config = (run / "config.yaml").read_text()
    second = Process(*words, "runtime.threads=2", log=tmp_path / "second").result()
    process.signal(signal.SIGKILL)
    process.result()
    assert str(run) in second.refusal()
    assert "in use" in second.err
    assert (run / "config.yaml").read_text() == config


def test_the_report_is_written_again_where_it_is_missing(finished: Path) -> None:
    (finished / "report.html").unlink()
    model = (finished / "model.pt").read_bytes()
    assert run_here("run", finished, "--quiet").code == 0
    assert (finished / "report.html").stat().st_size > 10_000
    assert (finished / "model.pt").read_bytes() == model
    shutil.rmtree(finished)
