"""What the GPU suite runs, concludes and keeps, and that no kernel can take the others with it."""

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scan_fast.ops import native
from tools.gpu import about, cases, checks, conclusions, jobs, stages, suite
from tools.gpu.jobs import Job
from tools.gpu.stages import Stage, Where

ROOT = Path(__file__).resolve().parents[2]
needs_module = pytest.mark.skipif(not native.is_available(), reason="scan_fast._C is not built")
SETS = tuple(conclusions.kernel_sets())
# What a rented machine may lack.
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
    """The command of a rehearsal without the packages that a bare machine lacks."""
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
        for stage in conclusions.gating(name):
            assert conclusions.is_through(known[stage]), (name, stage)
            assert all(case["ran"] == ["cpu"] for case in known[stage]["cases"].values())
    assert all(kernel["status"] == conclusions.VERIFIED for kernel in summary["kernels"].values())
    assert {timing["family"] for timing in summary["timings"] if timing["stage"] == "timings"} == set(cases.FAMILIES)
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
    answer: dict[str, Any] = {"problem": "", "mendable": False, "wait_limit": True, "environment": {"device": "a GPU"}}
    hashes = {known["source"]: known["sha256"] for known in run.summary["sets"].values()}

    def say(job: Job, seconds: float, log: Any, take: Any) -> jobs.Outcome:
        take(answer)
        return jobs.Outcome("passed", None, [])

    monkeypatch.setattr(suite.jobs, "run", say)
    run.device = "cuda"
    answer["sources"] = hashes
    assert suite.look_around(run) == ("", False)
    answer["sources"] = hashes | {"nt_xent/nt_xent_sm90": "0" * 64}
    problem, mendable = suite.look_around(run)
    assert "of other sources than this tree: nt_xent/nt_xent_sm90" in problem and mendable
    answer["sources"] = {name: value for name, value in hashes.items() if not name.endswith("_sm90")}
    assert suite.look_around(run) == ("", False)  # built for GPUs that have none of those
    answer["sources"] = {}
    assert "does not say which sources" in suite.look_around(run)[0]
    answer["wait_limit"], answer["sources"] = False, hashes
    assert suite.look_around(run) == ("", False) and "wait without a limit" in run.summary["notes"][-1]


@pytest.mark.parametrize("builds", [True, False])
def test_where_no_module_fits_one_is_built(run: suite.Suite, monkeypatch: pytest.MonkeyPatch, builds: bool) -> None:
    """For this GPU alone, and with limited waits; a build that fails is one line."""
    hashes = {known["source"]: known["sha256"] for known in run.summary["sets"].values()}
    answer: dict[str, Any] = {"problem": "no module", "mendable": True, "wait_limit": True, "sources": hashes}
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

    monkeypatch.setattr(suite.jobs, "run", say)
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


def test_every_result_is_written_at_once(run: suite.Suite) -> None:
    """While a process goes on, the file has what it said before."""
    thread = threading.Thread(
        target=go, args=(run, stage_of("time.sleep(60)", patience=5.0), ("self_label:portable", "scan_loss:portable"))
    )
    thread.start()
    end, found = time.monotonic() + 4, {}
    while time.monotonic() < end and not found.get("cases"):
        time.sleep(0.05)
        with contextlib.suppress(FileNotFoundError):
            known = json.loads((run.out / "summary.json").read_text())
            found = known["sets"]["self_label:portable"]["stages"].get("smoke", {})
    thread.join()
    assert list(found["cases"]) == ["5x7"] and known["stages"]["smoke"]["status"] == "running"


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


def test_a_process_ends_with_its_children(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    begin = time.monotonic()
    outcome = jobs.run(Job((sys.executable, "-c", child)), 2, io.StringIO(), lambda line: None)
    assert outcome.status == "cut off" and time.monotonic() - begin < 30
    log = io.StringIO()
    outcome = jobs.run(Job((sys.executable, "-c", "print('last words'); exit(3)")), 60, log, lambda line: None)
    assert outcome.status == "failed (3)" and outcome.tail == ["last words"] and "last words" in log.getvalue()


def test_a_process_may_take_longer_to_start_than_between_two_lines() -> None:
    text = "import time; time.sleep(1.5); print('{}', flush=True); time.sleep(60)"
    job = Job((sys.executable, "-c", text), patience=1.0, startup=20.0)
    assert jobs.run(job, 60, io.StringIO(), lambda line: None).status == "hung after 1 s"
    job = Job((sys.executable, "-c", text), patience=20.0, startup=1.0)
    assert jobs.run(job, 60, io.StringIO(), lambda line: None).status == "hung after 1 s"


def test_a_child_that_holds_the_output_does_not_hold_the_suite() -> None:
    text = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    begin = time.monotonic()
    outcome = jobs.run(Job((sys.executable, "-c", text)), 50, io.StringIO(), lambda line: None)
    assert outcome.status == "passed" and time.monotonic() - begin < 30


# ---- conclusions ---------------------------------------------------------------------------------------------------


def stage_record(*problems: str, done: bool = True) -> dict[str, Any]:
    """What is known of a stage whose cases 0, 1, ... had these problems, "" for none."""
    cases = {str(i): {"problem": text, "ran": [], "seconds": 0.1} for i, text in enumerate(problems)}
    return conclusions.empty() | {"cases": cases, "done": done}


def summary_of(hashes: str = "a", device: str = "a GPU", **of_scan_loss: dict[str, Any]) -> dict[str, Any]:
    """A summary in which every set passed everything, but for what is given of the SCAN loss."""
    sets = {
        name: {
            "source": source,
            "sha256": hashes * 64,
            "stages": {stage: stage_record("", "") for stage in conclusions.gating(name)},
        }
        for name, source in conclusions.kernel_sets().items()
    }
    sets["scan_loss:portable"]["stages"] |= of_scan_loss
    found: dict[str, Any] = {"rehearsal": False, "date": "2030-01-02", "environment": {"device": device, "commit": "c"}}
    found |= {"stages": {}, "sets": sets, "timings": [], "step": [], "notes": [], "finished": True}
    conclusions.conclude(found)
    return found


def scan_loss_of(summary: dict[str, Any]) -> dict[str, Any]:
    kernel: dict[str, Any] = summary["kernels"]["scan_loss/scan_loss_cuda"]
    return kernel


def test_verified_is_what_passed_everything() -> None:
    assert {kernel["status"] for kernel in summary_of()["kernels"].values()} == {conclusions.VERIFIED}
    assert len(summary_of()["kernels"]) == len(SETS)
    for stage in conclusions.gating("scan_loss:portable"):
        for gap in (stage_record("", "", done=False), stage_record()):
            kernel = scan_loss_of(summary_of(**{stage: gap}))
            assert (kernel["status"], kernel["reason"]) == (conclusions.PARTLY, f"not finished: {stage}")
    kernel = scan_loss_of(summary_of(timings=stage_record("", "nan", "inf")))
    assert (kernel["status"], kernel["reason"]) == (conclusions.FAILED, "timings: 1: nan (and 1 more)")
    assert conclusions.gating("augment:portable") == ("smoke", "accuracy", "repeat", "memcheck")


def test_a_stage_that_a_machine_cannot_run_is_waived_and_named() -> None:
    summary = summary_of(memcheck=conclusions.empty())
    assert scan_loss_of(summary)["status"] == conclusions.PARTLY
    summary["stages"]["memcheck"] = {"status": "not here", "seconds": 0.0}
    conclusions.conclude(summary)
    assert scan_loss_of(summary)["status"] == conclusions.VERIFIED and scan_loss_of(summary)["waived"] == ["memcheck"]


def test_merging_lets_the_later_run_speak() -> None:
    first, second = summary_of(accuracy=stage_record("", "nan")), summary_of()
    second["sets"]["scan_loss:portable"]["stages"] = {"accuracy": stage_record("", "")}  # only this ran again
    assert scan_loss_of(first)["status"] == conclusions.FAILED
    merged = conclusions.merge([first, second])
    assert scan_loss_of(merged)["status"] == conclusions.VERIFIED
    assert scan_loss_of(first)["status"] == conclusions.FAILED, "merging changed what it was given"
    assert scan_loss_of(conclusions.merge([second, first]))["status"] == conclusions.FAILED
    # A run that was cut off before it came to the failure says nothing about it.
    second["sets"]["scan_loss:portable"]["stages"] = {"accuracy": stage_record("", done=False)}
    assert scan_loss_of(conclusions.merge([first, second]))["reason"] == "accuracy: 1: nan"
    # Another source starts anew: neither what the former passed counts, nor what failed.
    second["sets"]["scan_loss:portable"]["sha256"] = "b" * 64
    merged = conclusions.merge([first, second])
    assert scan_loss_of(merged)["status"] == conclusions.PARTLY and scan_loss_of(merged)["sha256"] == "b" * 64
    with pytest.raises(ValueError, match="a GPU, another"):
        conclusions.merge([first, summary_of(device="another")])


def test_a_hang_counts_until_the_stage_has_come_to_its_end() -> None:
    hung = stage_record("", done=False) | {"lost": "hung after 20 s in 1"}
    first, cut_off, right = (summary_of(smoke=s) for s in (hung, stage_record("", done=False), stage_record("", "")))
    assert scan_loss_of(first)["reason"] == "smoke: hung after 20 s in 1"
    assert scan_loss_of(conclusions.merge([first, cut_off]))["status"] == conclusions.FAILED
    assert scan_loss_of(conclusions.merge([first, cut_off, right]))["status"] == conclusions.VERIFIED


def test_merged_summaries_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("one.json", "two.json")]
    for file in files:
        file.write_text(json.dumps(summary_of()))
    assert suite.main([str(tmp_path / "out"), "--merge", *map(str, files)]) == 0
    assert "verified    scan_loss/scan_loss_cuda" in capsys.readouterr().out
    merged = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert scan_loss_of(merged)["status"] == conclusions.VERIFIED


def test_the_kernels_that_ran_must_be_those_asked_for() -> None:
    assert checks.wrong_kernels("sm90", ["prepare<float>", "forward_sm90_kernel<8>"], "cuda") == ""
    assert "portable kernels ran" in checks.wrong_kernels("sm90", ["prepare<float>", "forward_kernel"], "cuda")
    assert "sm_90a ran" in checks.wrong_kernels("portable", ["forward_sm90_kernel<8>"], "cuda")
    assert "no kernel" in checks.wrong_kernels("portable", [], "cuda")
    assert checks.wrong_kernels("sm90", [], "cpu") == ""


def test_the_kernels_for_sm90_are_asked_only_for_what_they_cover() -> None:
    """csrc/nt_xent/nt_xent_sm90.cu: 128 dimensions in float32 accuracy, 256 else; csrc/neighbors: not most rows."""
    for size in cases.SIZES:
        for case in (case for case in cases.gradient_cases(size) if case.family == "nt_xent"):
            dim = case.shape[1]
            assert case.runs_on("sm90", torch.float32) == (dim <= 128)
            assert case.runs_on("sm90", torch.bfloat16) == (dim <= 256)
            assert case.runs_on("portable", torch.float32)
        wide = [case.runs_on("sm90") for case in cases.neighbor_cases(size) if 2 * case.k >= case.rows]
        assert not any(wide)
        assert any(case.runs_on("sm90") for case in cases.neighbor_cases(size))
    labels = [label for label, _ in checks.accuracy("neighbors", "sm90", "cpu", 1, "tiny")]
    assert labels == ["70x9 k=3 cosine", "70x9 k=3 cosine, queries"]


def test_sizes_go_round_on_a_large_gpu() -> None:
    """On 132 multiprocessors a block of the kernels for sm_90a has several tiles at the sizes of smoke and accuracy."""
    for size in ("smoke", "full"):
        nt_xent = [c.shape for c in cases.gradient_cases(size) if c.family == "nt_xent"]
        # A triangle of 128 x 128 tiles over 2N rows.
        tiles = [(2 * n // 128) * (2 * n // 128 + 1) // 2 for n, _ in nt_xent]
        assert max(tiles) >= 8 * 132
        assert max((case.rows // 128) ** 2 for case in cases.neighbor_cases(size)) >= 8 * 132
    # A search of nearly all rows has no fast form, whose kernels alone are different on sm_90a.
    tiny = {kernels: [c.k for c in cases.neighbor_cases("tiny", kernels)] for kernels in ("portable", "sm90")}
    assert tiny == {"portable": [3, 39], "sm90": [3]}
    sides = {case.side for case in cases.view_cases("full")}
    assert {17, 19, 22, 111, 113} <= sides


# ---- the checks themselves -----------------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On shapes this small, threads that wait for each other are all there is to wait for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problems(check: str, family: str, seed: int = 3) -> dict[str, str]:
    """What a check finds in a family at tiny sizes, by case."""
    found = checks.CHECKS[check](family, "portable", "cpu", seed, "tiny")
    results = {label: checks.run_case({}, "portable", "cpu", body) for label, body in found}
    assert results
    return {label: result["problem"] for label, result in results.items() if not result["passed"]}


@pytest.mark.parametrize("both", [True, False])
def test_the_oracle_of_nt_xent_is_the_reference_block_by_block(both: bool) -> None:
    z0, z1 = (torch.randn(2, 37, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).unbind()
    z1[3] = 0
    upstream = torch.linspace(-1, 2, 74 if both else 37, dtype=torch.float64)
    expected = cases._nt_xent(both, "reference")(z0, z1, upstream)
    found = cases.exact_nt_xent(z0, z1, upstream, both, rows_per_block=16)
    # A row of zeros has no direction; the reference differentiates its clamped length, which is of no use to a test.
    for ours, theirs in zip(found, expected, strict=True):
        rows = theirs.abs() < 1e6
        torch.testing.assert_close(ours[rows], theirs[rows], rtol=1e-11, atol=1e-12)


@needs_module
def test_the_checks_find_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    assert problems("accuracy", "scan_loss") == {}
    right = cases.scan_fast.scan_loss

    def slightly_off(*arguments: Any, **options: Any) -> Any:
        total, consistency, entropy = right(*arguments, **options)
        return total * 1.001, consistency, entropy

    monkeypatch.setattr(cases.scan_fast, "scan_loss", slightly_off)
    assert any("float32" in label and "allowed" in text for label, text in problems("accuracy", "scan_loss").items())

    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("an illegal memory access\nand more")

    monkeypatch.setattr(cases.scan_fast, "scan_loss", broken)
    assert set(problems("accuracy", "scan_loss").values()) == {"RuntimeError: an illegal memory access"}


@needs_module
def test_the_checks_find_a_layer_that_forgets_its_statistics(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    assert problems("accuracy", "batch_norm", 6) == {}
    right = cases.batch_norm

    def forgets(x: torch.Tensor, *arguments: Any, impl: str, **options: Any) -> torch.Tensor:
        if impl == "native":
            arguments = (*arguments[:3], arguments[3].clone())
        return right(x, *arguments, impl=impl, **options)

    monkeypatch.setattr(cases, "batch_norm", forgets)
    found = problems("accuracy", "batch_norm", 6)
    assert found and all("training" in label for label in found)


@needs_module
def test_the_checks_find_a_view_that_depends_on_its_batch(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    assert problems("accuracy", "augment", 4) == {}
    right = cases.augment

    def off_in_batches(images: torch.Tensor, recipes: torch.Tensor, *arguments: Any) -> torch.Tensor:
        views = right(images, recipes, *arguments)
        if len(views) > 1:
            views[1, 0, 0, 0] += 1
        return views

    monkeypatch.setattr(cases, "augment", off_in_batches)
    assert problems("accuracy", "augment", 4)


@needs_module
def test_a_search_of_many_rows_is_compared_on_some(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    many = cases.NeighborCase(900, 16, 7, "cosine", 90)
    monkeypatch.setitem(cases._NEIGHBORS, "tiny", [many])
    assert problems("accuracy", "neighbors") == {}
    right = cases.scan_fast.topk_neighbors

    def swaps(x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        value, index = right(x, *arguments, **options)
        if options["impl"] == "native":
            index[450, :2] = index[450, [1, 0]]  # a row among the duplicates, which are always compared
        return value, index

    monkeypatch.setattr(cases.scan_fast, "topk_neighbors", swaps)
    assert "2 of" in problems("accuracy", "neighbors")[many.label]


@needs_module
def test_a_replay_must_follow_its_inputs(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    assert problems("graph", "neighbors", 5) == {}
    right = cases.scan_fast.topk_neighbors
    calls = []

    def remembers(x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        calls.append(right(x, *arguments, **options))
        return calls[0] if len(calls) > 1 else calls[-1]

    monkeypatch.setattr(cases.scan_fast, "topk_neighbors", remembers)
    assert problems("graph", "neighbors", 5)


@needs_module
def test_the_same_call_must_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    assert problems("repeat", "self_label") == {}
    right = cases.scan_fast.self_label_loss
    calls = iter(range(1000))

    def drifts(*arguments: Any, **options: Any) -> Any:
        loss, count = right(*arguments, **options)
        return loss * (1 + 1e-6 * (next(calls) % 2)), count

    monkeypatch.setattr(cases.scan_fast, "self_label_loss", drifts)
    assert "the same call gave other bits" in problems("repeat", "self_label").values()
