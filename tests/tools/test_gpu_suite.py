"""The GPU suite runs its stages, keeps every result, and isolates kernels that crash or hang."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from scan_fast.ops import native
from scan_fast.ops.families import GPU_FAMILIES
from tools.gpu import about, conclusions, jobs, stages, suite
from tools.gpu.jobs import Job
from tools.gpu.stages import Stage, Where

ROOT = Path(__file__).resolve().parents[2]
needs_module = pytest.mark.skipif(not native.is_available(), reason="scan_fast._C is not built")
SETS = tuple(conclusions.kernel_sets())
# Packages that a rented machine may lack are hidden.
HIDDEN = """
import sys
from importlib.machinery import PathFinder
class Hidden:
    names = {names}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names or name.startswith("nvidia.dali"):
            return None
        return PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hidden()
"""
LACKING = {"pydantic", "pydantic_core", "rich", "hypothesis", "pytest", "torchvision", "PIL", "yaml", "matplotlib"}
LACKING |= {"sklearn", "scipy", "faiss", "jinja2", "lightly", "pytorch_metric_learning", "timm", "tensorboard"}


def rehearsal(folder: Path, out: Path, *words: str) -> list[str]:
    """Return the command of a rehearsal without the packages that a bare machine lacks."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(HIDDEN.format(names=LACKING))
    return [sys.executable, "-m", "tools.gpu.suite", "--rehearse", str(out), *words]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "SCAN_FAST_COMMIT": "the commit of a tree without git"}


# ---- whole runs ----------------------------------------------------------------------------------------------------


def test_a_bare_machine_lacks_what_is_hidden(tmp_path: Path) -> None:
    rehearsal(tmp_path, tmp_path)
    code = "import importlib.util; print([importlib.util.find_spec(n) is None for n in ('pydantic', 'PIL', 'torch')])"
    command = [sys.executable, "-c", code]
    finished = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[True, True, False]"


@needs_module
@pytest.mark.serial
@pytest.mark.slow
def test_a_rehearsal_on_a_bare_machine(tmp_path: Path) -> None:
    command = rehearsal(tmp_path / "site", tmp_path / "out")
    begin = time.monotonic()
    finished = subprocess.run(
        command, cwd=ROOT, env=environment(tmp_path / "site"), capture_output=True, text=True, check=False, timeout=600
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
    assert time.monotonic() - begin < 240
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["finished"] and summary["rehearsal"]
    assert summary["environment"]["commit"] == "the commit of a tree without git"
    ends = {name: stage["status"] for name, stage in summary["stages"].items()}
    assert ends.pop("initcheck") == ends.pop("racecheck") == "not here"
    assert set(ends) == {"build", *stages.NAMES} - {"initcheck", "racecheck"}
    assert set(ends.values()) == {"passed"}, summary["notes"]
    for name in SETS:
        known = summary["sets"][name]["stages"]
        for stage in conclusions.GATING:
            assert conclusions.is_through(known[stage]), (name, stage)
            assert all(case["ran"] == ["cpu"] for case in known[stage]["cases"].values())
    assert all(kernel["status"] == conclusions.VERIFIED for kernel in summary["kernels"].values())
    assert {timing["family"] for timing in summary["timings"] if timing["stage"] == "timings"} == {
        family.name for family in GPU_FAMILIES
    }
    assert {entry["way"] for entry in summary["step"] if "seconds" in entry} >= {"PyTorch", "ours", "ours, compiled"}
    assert any(entry.get("profile") for entry in summary["step"])
    assert len(list((tmp_path / "out").iterdir())) <= 8


@needs_module
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_cut_off_leaves_what_it_found(tmp_path: Path, how: signal.Signals) -> None:
    out = tmp_path / "out"
    command = rehearsal(tmp_path / "site", out, "--only", "smoke,accuracy,repeat,self_label,nt_xent:portable")
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(tmp_path / "site"), stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        end = time.monotonic() + 120
        while True:
            assert time.monotonic() < end and process.poll() is None, "it ended, or got nowhere"
            time.sleep(0.05)
            try:
                found = json.loads((out / "summary.json").read_text())
            except FileNotFoundError:
                continue
            if found["sets"]["self_label:portable"]["stages"].get("smoke", {}).get("cases"):
                break
        process.send_signal(how)
        process.wait(timeout=30)
    finally:
        if process.poll() is None:
            process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    left = json.loads((out / "summary.json").read_text())
    assert not left["finished"]
    assert left["sets"]["self_label:portable"]["stages"]["smoke"]["cases"]
    assert left["kernels"]["self_label/self_label_cuda"]["status"] == conclusions.PARTLY
    assert left["kernels"]["scan_loss/scan_loss_cuda"]["status"] == conclusions.NEVER
    assert left["environment"]["torch"] == torch.__version__


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "tools.gpu.suite", str(tmp_path), "--no-build"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 2
    assert "torch sees no GPU; --rehearse" in finished.stdout and "Traceback" not in finished.stdout + finished.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["notes"] != []


def test_what_is_no_stage_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main([str(tmp_path), "--only", "smoke,nt_xnet"])
    assert "'nt_xnet' is neither a stage nor a family" in capsys.readouterr().err
    assert suite.chosen("accuracy,nt_xent:sm90,scan_loss") == (["accuracy"], ["scan_loss:portable", "nt_xent:sm90"])
    assert suite.chosen("smoke") == (["smoke"], list(SETS))
    assert suite.chosen("nt_xent") == (list(stages.NAMES), ["nt_xent:portable", "nt_xent:sm90"])


def test_a_module_for_another_gpu_is_known() -> None:
    assert about.runs_on(9, 0, ["90a"]) and about.runs_on(9, 0, ["80", "90a", "100"])
    assert about.runs_on(8, 6, ["80"]) and about.runs_on(8, 9, ["80", "90a"])  # machine code of the same generation
    assert about.runs_on(12, 0, ["80", "90a", "100"]) and about.runs_on(9, 0, ["80"])  # PTX of the newest
    assert not about.runs_on(8, 0, ["90a"]) and not about.runs_on(10, 0, ["90a"])
    assert not about.runs_on(9, 0, ["80", "100"])
    assert not about.runs_on(7, 5, ["80", "90a", "100"]) and not about.runs_on(8, 0, ["86"])


def test_a_module_of_other_sources_is_refused(run: suite.Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    answer: dict[str, Any] = {
        "problem": "",
        "build_helps": False,
        "wait_limit": True,
        "environment": {"device": "a GPU"},
    }
    hashes = {known["source"]: known["sha256"] for known in run.summary["sets"].values()}

    def say(job: Job, seconds: float, log: Any, take: Any) -> jobs.Outcome:
        take(answer)
        return jobs.Outcome("passed", None, [])

    monkeypatch.setattr(jobs, "run", say)
    run.device = "cuda"
    answer["sources"] = hashes
    assert suite.inspect_machine(run) == ("", False)
    answer["sources"] = hashes | {"nt_xent/nt_xent_sm90": "0" * 64}
    problem, build_helps = suite.inspect_machine(run)
    assert "of other sources than this tree: nt_xent/nt_xent_sm90" in problem and build_helps
    answer["sources"] = {name: value for name, value in hashes.items() if not name.endswith("_sm90")}
    assert suite.inspect_machine(run) == ("", False)  # built for GPUs that have none of those
    answer["sources"] = {}
    assert "does not say which sources" in suite.inspect_machine(run)[0]
    answer["wait_limit"], answer["sources"] = False, hashes
    assert suite.inspect_machine(run) == ("", False) and "wait without a limit" in run.summary["notes"][-1]


@pytest.mark.parametrize("builds", [True, False])
def test_where_no_module_fits_one_is_built(run: suite.Suite, monkeypatch: pytest.MonkeyPatch, builds: bool) -> None:
    """For this GPU alone, and with limited waits; a build that fails is one line."""
    hashes = {known["source"]: known["sha256"] for known in run.summary["sets"].values()}
    answer: dict[str, Any] = {"problem": "no module", "build_helps": True, "wait_limit": True, "sources": hashes}
    answer |= {"environment": {"device": "a GPU"}, "capability": "9.0"}
    built: list[Job] = []

    def say(job: Job, seconds: float, log: Any, take: Any) -> jobs.Outcome:
        if "setup.py" not in job.command:
            take(answer)
            return jobs.Outcome("passed", None, [])
        built.append(job)
        assert seconds <= 150
        if not builds:
            return jobs.Outcome("failed (1)", None, ["nvcc", "k.cu(7): error: expected a ;", "ninja: build stopped"])
        answer["problem"] = ""
        return jobs.Outcome("passed", None, [])

    monkeypatch.setattr(jobs, "run", say)
    run.device, run.folder = "cuda", run.out / "nothing was carried"
    assert suite.provide_module(run, build=False) == "no module" and not built
    problem = suite.provide_module(run, build=True)
    assert problem == ("" if builds else "the build failed (1): k.cu(7): error: expected a ;")
    assert [job.environment for job in built] == [
        {"SCAN_FAST_WAIT_LIMIT": "1", "SCAN_FAST_CUDA": "on", "SCAN_FAST_CUDA_ARCHS": "90a"}
    ]
    assert any("no module was carried" in text for text in run.summary["notes"])
    assert run.summary["stages"]["build"]["status"] == ("passed" if builds else "failed")


def test_peers_that_were_carried_along_can_be_imported(tmp_path: Path) -> None:
    assert stages.peers_path(None) == stages.peers_path(tmp_path) == {}
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "memeff-0.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("memeff/__init__.py", "here = True\n")
        wheel.writestr("memeff-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: memeff\nVersion: 0.1\n")
        wheel.writestr("memeff-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("memeff-0.1.dist-info/RECORD", "")
    where = Where("cuda", 40.0, tmp_path)
    (job,) = next(stage for stage in stages.STAGES if stage.name == "peers").jobs(where, ("nt_xent:portable",))
    assert "--peers" in job.command
    lines: list[dict[str, Any]] = []
    text = "import json, memeff, benchmarks; print(json.dumps({'here': memeff.here}))"
    outcome = jobs.run(Job((sys.executable, "-c", text), (), job.environment), 60, io.StringIO(), lines.append)
    assert outcome.status == "passed" and lines == [{"here": True}], outcome
    (other,) = next(stage for stage in stages.STAGES if stage.name == "more").jobs(where, ("nt_xent:portable",))
    assert "PYTHONPATH" not in other.environment


# ---- stages of several processes -----------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> suite.Suite:
    return suite.Suite(tmp_path, rehearse=True, budget=300.0, log=io.StringIO())


SCRIPT = """
import json, sys, time
for text in sys.argv[2:]:
    family, kernels = text.split(":")
    about = {"stage": sys.argv[1], "family": family, "kernels": kernels}
    print(json.dumps({"begin": "5x7", **about}), flush=True)
    if family == "scan_loss":
        ACTION
    print(json.dumps({"case": "5x7", "passed": family != "neighbors", "problem": "off by one", "ran": [], **about}))
    print(json.dumps({"done": True, **about}), flush=True)
"""


def stage_of(action: str, name: str = "smoke", patience: float = 60.0, complaints: str = "") -> Stage:
    """A stage whose one process does something in place of the SCAN loss; the neighbours are wrong in it."""

    def jobs_of(_: Where, sets: tuple[str, ...]) -> list[Job]:
        command = (sys.executable, "-c", SCRIPT.replace("ACTION", action), name, *sets)
        return [Job(command, sets, patience=patience, complaints=complaints)] if sets else []

    return Stage(name, 60, 0, 1, jobs_of)


def go(run: suite.Suite, stage: Stage, sets: tuple[str, ...] = SETS) -> None:
    suite.run_stage(run, stage, sets, stages.NAMES)


@pytest.mark.serial
@pytest.mark.parametrize("action, said", [("time.sleep(60)", "hung after 2 s"), ("sys.exit(3)", "failed (3)")])
def test_a_kernel_that_hangs_or_crashes_takes_no_other_with_it(run: suite.Suite, action: str, said: str) -> None:
    begin = time.monotonic()
    go(run, stage_of(action, patience=2.0))
    assert time.monotonic() - begin < 30
    kernels = run.summary["kernels"]
    assert kernels["scan_loss/scan_loss_cuda"]["status"] == conclusions.FAILED
    assert kernels["scan_loss/scan_loss_cuda"]["reason"].startswith(f"smoke: {said} in 5x7")
    assert kernels["neighbors/neighbors_sm90"]["reason"] == "smoke: 5x7: off by one"
    assert kernels["self_label/self_label_cuda"]["status"] == conclusions.PARTLY
    assert run.summary["sets"]["self_label:portable"]["stages"]["smoke"]["done"]
    assert any(said in text and "scan_loss portable, 5x7" in text for text in run.summary["notes"])
    # From then on it is left out; what was merely wrong goes on.
    assert set(run.alive(SETS)) == set(SETS) - {"scan_loss:portable"}
    go(run, stage_of("raise SystemExit('it ran again')", "accuracy"))
    assert run.summary["stages"]["accuracy"]["status"] == "failed"  # the neighbours
    assert "accuracy" not in run.summary["sets"]["scan_loss:portable"]["stages"]
    assert run.summary["sets"]["neighbors:portable"]["stages"]["accuracy"]["done"]


@pytest.mark.serial
def test_every_result_is_written_at_once(run: suite.Suite) -> None:
    """While a process goes on, the file has what it said before."""
    thread = threading.Thread(
        target=go, args=(run, stage_of("time.sleep(60)", patience=5.0), ("self_label:portable", "scan_loss:portable"))
    )
    thread.start()
    end = time.monotonic() + 4
    found: dict[str, Any] = {}
    while time.monotonic() < end and not found.get("cases"):
        time.sleep(0.05)
        with contextlib.suppress(FileNotFoundError):
            known = json.loads((run.out / "summary.json").read_text())
            found = known["sets"]["self_label:portable"]["stages"].get("smoke", {})
    thread.join()
    assert list(found["cases"]) == ["5x7"] and known["stages"]["smoke"]["status"] == "running"


@pytest.mark.serial
def test_time_that_ends_is_no_failure(run: suite.Suite) -> None:
    run.end = time.monotonic() + suite.RESERVE + 6
    go(run, stage_of("time.sleep(60)"), ("self_label:portable", "scan_loss:portable", "nt_xent:sm90"))
    assert run.summary["stages"]["smoke"]["status"] == "cut off"
    status = {name: kernel["status"] for name, kernel in run.summary["kernels"].items()}
    assert status["self_label/self_label_cuda"] == conclusions.PARTLY
    assert status["scan_loss/scan_loss_cuda"] == status["nt_xent/nt_xent_sm90"] == conclusions.NEVER
    go(run, stage_of("pass", "repeat"))
    assert run.summary["stages"]["repeat"]["status"] == "no time left"


UNDER_TOOL = ("self_label:portable", "scan_loss:portable", "batch_norm:portable")


def test_what_a_sanitizer_complains_of_counts_against_the_case_at_hand(run: suite.Suite) -> None:
    said = "print('========= Invalid __global__ read of size 4 bytes'); print('========= ERROR SUMMARY: 1 error')"
    code = "import atexit, os; atexit.register(os._exit, 9)"
    go(run, stage_of(f"{said}; {code}", "memcheck", complaints=stages.COMPLAINTS), UNDER_TOOL)
    kernels = run.summary["kernels"]
    assert kernels["scan_loss/scan_loss_cuda"]["status"] == conclusions.FAILED
    assert kernels["scan_loss/scan_loss_cuda"]["reason"] == "memcheck: 5x7: Invalid __global__ read of size 4 bytes"
    assert kernels["self_label/self_label_cuda"]["status"] == conclusions.PARTLY
    assert run.summary["sets"]["batch_norm:portable"]["stages"]["memcheck"]["done"]
    assert run.summary["stages"]["memcheck"]["status"] == "failed"
    # What only informs is kept, and fails nothing.
    run.summary["sets"]["scan_loss:portable"]["stages"] = {}
    go(run, stage_of(f"{said}; {code}", "racecheck", complaints=stages.COMPLAINTS), UNDER_TOOL)
    known = run.summary["sets"]["scan_loss:portable"]["stages"]["racecheck"]
    assert known["complaints"] == ["5x7: Invalid __global__ read of size 4 bytes"]
    assert run.summary["kernels"]["scan_loss/scan_loss_cuda"]["status"] == conclusions.PARTLY


def test_errors_that_a_sanitizer_only_counts_count_against_all(run: suite.Suite) -> None:
    action = "print('========= ERROR SUMMARY: 4 errors'); import atexit, os; atexit.register(os._exit, 9)"
    go(run, stage_of(action, "memcheck", complaints=stages.COMPLAINTS), UNDER_TOOL)
    for name in UNDER_TOOL:
        kernel = run.summary["kernels"][run.summary["sets"][name]["source"]]
        assert kernel["status"] == conclusions.FAILED and "4 errors" in kernel["reason"]


@pytest.mark.parametrize("action", ["print('========= Error: Device not supported'); sys.exit(1)", "sys.exit(7)"])
def test_a_sanitizer_that_does_not_work_says_nothing_of_the_kernels(run: suite.Suite, action: str) -> None:
    refuses = "Device not supported" in action
    go(run, stage_of(action, "memcheck", complaints=stages.COMPLAINTS), UNDER_TOOL)
    kernel = run.summary["kernels"]["scan_loss/scan_loss_cuda"]
    assert run.summary["stages"]["memcheck"]["status"] == ("not here" if refuses else "failed")
    assert kernel["status"] == (conclusions.NEVER if refuses else conclusions.PARTLY) or not kernel["cases"]
    assert kernel["waived"] == (["memcheck"] if refuses else [])
    if not refuses:  # it ended in the midst of one: that one is not finished, and the others go on
        assert run.summary["sets"]["batch_norm:portable"]["stages"]["memcheck"]["done"]
        assert "failed (7)" in run.summary["sets"]["scan_loss:portable"]["stages"]["memcheck"]["lost"]


def test_a_process_that_does_not_come_to_its_first_case_fails_its_one_kernel_set(run: suite.Suite) -> None:
    def jobs_of(_: Where, sets: tuple[str, ...]) -> list[Job]:
        return [Job((sys.executable, "-c", "import sys; sys.exit('no such symbol')"), (s,)) for s in sets]

    go(run, Stage("smoke", 60, 0, 2, jobs_of), ("self_label:portable", "nt_xent:sm90"))
    reasons = {name: run.summary["kernels"][name]["reason"] for name in ("self_label/self_label_cuda",)}
    assert reasons == {"self_label/self_label_cuda": "smoke: failed (1) in no case: no such symbol"}


def test_a_crash_among_the_timings_has_an_owner_and_the_rest_goes_on(run: suite.Suite) -> None:
    script = """
import json, sys
for text in sys.argv[1:]:
    family, kernels = text.split(":")
    about = {"stage": "timings", "family": family}
    owners = [text, "nt_xent:sm90"] if family == "nt_xent" else [text]
    print(json.dumps({**about, "case": "8x8", "begin": "8x8, scan-fast", "sets": owners}), flush=True)
    if family == "nt_xent":
        sys.exit("an illegal memory access")
    timing = {"timing": "8x8", "kernels": kernels, "contenders": [{"name": "scan-fast", "seconds": 1e-5}]}
    print(json.dumps({**about, "kernels": kernels, "case": "8x8", "passed": True, "problem": ""}))
    print(json.dumps({**about, **timing}), flush=True)
"""

    def jobs_of(_: Where, sets: tuple[str, ...]) -> list[Job]:
        return [Job((sys.executable, "-c", script, *sets), sets)] if sets else []

    go(run, Stage("timings", 60, 0, 1, jobs_of), ("nt_xent:portable", "nt_xent:sm90", "scan_loss:portable"))
    kernels = run.summary["kernels"]
    for name in ("nt_xent/nt_xent_cuda", "nt_xent/nt_xent_sm90"):
        assert kernels[name]["status"] == conclusions.FAILED and "an illegal memory access" in kernels[name]["reason"]
    assert [timing["family"] for timing in run.summary["timings"]] == ["scan_loss"]
    assert kernels["scan_loss/scan_loss_cuda"]["status"] == conclusions.PARTLY


def test_what_decides_about_a_kernel_keeps_its_time() -> None:
    """Timings and the step leave to the later checks what those need; with a short budget they are left out first."""
    later = {stage.name: stage.need for stage in stages.STAGES}
    assert stages.kept_for_later("timings", stages.NAMES) == sum(later[n] for n in ("repeat", "graph", "memcheck"))
    assert stages.kept_for_later("step", stages.NAMES) == later["memcheck"] > 30
    assert stages.kept_for_later("timings", ("timings",)) == 0
    assert stages.kept_for_later("accuracy", stages.NAMES) == 0
    first = [stage for stage in stages.STAGES if stage.name in ("smoke", "accuracy")]
    assert sum(s.seconds for s in first) + stages.kept_for_later("timings", stages.NAMES) < suite.DEFAULT_BUDGET
