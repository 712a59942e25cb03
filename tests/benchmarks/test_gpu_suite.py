"""What the GPU suite runs, concludes and keeps, and that no kernel can take the others with it."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import cases, checks, conclusions, jobs, suite
from benchmarks.gpu.jobs import Job
from scan_fast.ops import native

ROOT = Path(__file__).resolve().parents[2]
needs_module = pytest.mark.skipif(not native.is_available(), reason="scan_fast._C is not built")
SETS = tuple(conclusions.kernel_sets())
# What a rented machine may lack.
BLOCKED = """
import sys
class Blocked:
    names = {names}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names or name.startswith("nvidia.dali"):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
"""
LACKING = {"pydantic", "pydantic_core", "rich", "hypothesis", "pytest", "torchvision", "PIL", "yaml", "matplotlib"}
LACKING |= {"sklearn", "scipy", "faiss", "jinja2", "lightly", "pytorch_metric_learning", "timm", "tensorboard"}


def rehearsal(folder: Path, out: Path, *words: str) -> list[str]:
    """The command of a rehearsal without the packages that a bare machine lacks."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(BLOCKED.format(names=LACKING))
    return [sys.executable, "-m", "benchmarks.gpu.suite", "--rehearse", str(out), *words]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "SCAN_FAST_COMMIT": "the commit of a tree without git"}


# ---- whole runs ----------------------------------------------------------------------------------------------------


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
    stages = {name: stage["status"] for name, stage in summary["stages"].items()}
    assert stages.pop("initcheck") == stages.pop("racecheck") == "not here"
    assert set(stages) == {stage.name for stage in suite.STAGES} - {"initcheck", "racecheck"}
    assert set(stages.values()) == {"passed"}, summary["notes"]
    for name in SETS:
        known = summary["sets"][name]["stages"]
        for stage in conclusions.gating(name):
            assert known[stage]["done"] and known[stage]["cases"] and known[stage]["ran"] == ["cpu"], (name, stage)
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
    assert left["sets"]["self_label:portable"]["stages"]["smoke"]["cases"] > 0
    assert left["kernels"]["self_label/self_label_cuda"]["status"] == conclusions.PARTLY
    assert left["kernels"]["scan_loss/scan_loss_cuda"]["status"] == conclusions.NEVER
    assert left["environment"]["torch"] == torch.__version__


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "benchmarks.gpu.suite", str(tmp_path), "--no-build"]
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
    assert suite.chosen("nt_xent") == ([], ["nt_xent:portable", "nt_xent:sm90"])


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


def stage_of(action: str, name: str = "smoke", patience: float = 60.0) -> suite.Stage:
    """A stage whose one process does something in place of the SCAN loss; the neighbours are wrong in it."""

    def jobs_of(_: suite.Suite, sets: tuple[str, ...], seconds: float) -> list[Job]:
        command = (sys.executable, "-c", SCRIPT.replace("ACTION", action), name, *sets)
        return [Job(command, sets, patience=patience)] if sets else []

    return suite.Stage(name, 60, 1, jobs_of)


@pytest.mark.parametrize("action, said", [("time.sleep(60)", "hung after 2 s"), ("sys.exit(3)", "failed (3)")])
def test_a_kernel_that_hangs_or_crashes_takes_no_other_with_it(run: suite.Suite, action: str, said: str) -> None:
    begin = time.monotonic()
    suite.run_stage(run, stage_of(action, patience=2.0), SETS)
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
    suite.run_stage(run, stage_of("raise SystemExit('it ran again')", "accuracy"), SETS)
    assert run.summary["stages"]["accuracy"]["status"] == "failed"  # the neighbours
    assert "accuracy" not in run.summary["sets"]["scan_loss:portable"]["stages"]
    assert run.summary["sets"]["neighbors:portable"]["stages"]["accuracy"]["done"]


def test_time_that_ends_is_no_failure(run: suite.Suite) -> None:
    run.end = time.monotonic() + suite.RESERVE + 6
    suite.run_stage(run, stage_of("time.sleep(60)"), ("self_label:portable", "scan_loss:portable", "nt_xent:sm90"))
    assert run.summary["stages"]["smoke"]["status"] == "cut off"
    status = {name: kernel["status"] for name, kernel in run.summary["kernels"].items()}
    assert status["self_label/self_label_cuda"] == conclusions.PARTLY
    assert status["scan_loss/scan_loss_cuda"] == status["nt_xent/nt_xent_sm90"] == conclusions.NEVER
    suite.run_stage(run, stage_of("pass", "repeat"), SETS)
    assert run.summary["stages"]["repeat"]["status"] == "no time left"


def test_a_sanitizer_that_does_not_work_says_nothing_of_the_kernel(run: suite.Suite) -> None:
    sets = ("self_label:portable", "scan_loss:portable")
    suite.run_stage(
        run, stage_of("print('========= Error: the device is not supported'); sys.exit(1)", "memcheck"), sets
    )
    assert run.summary["kernels"]["scan_loss/scan_loss_cuda"]["status"] == conclusions.NEVER
    assert any("the device is not supported" in text for text in run.summary["notes"])
    suite.run_stage(run, stage_of("print('========= ERROR SUMMARY: 4 errors'); sys.exit(9)", "memcheck"), sets)
    kernel = run.summary["kernels"]["scan_loss/scan_loss_cuda"]
    assert kernel["status"] == conclusions.FAILED and "4 errors" in kernel["reason"]


def test_a_process_ends_with_its_children(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    begin = time.monotonic()
    outcome = jobs.run(Job((sys.executable, "-c", child)), 2, io.StringIO(), lambda line: None)
    assert outcome.status == "cut off" and time.monotonic() - begin < 30
    log = io.StringIO()
    outcome = jobs.run(Job((sys.executable, "-c", "print('last words'); exit(3)")), 60, log, lambda line: None)
    assert outcome.status == "failed (3)" and outcome.tail == ["last words"] and "last words" in log.getvalue()


# ---- conclusions ---------------------------------------------------------------------------------------------------


def passed_all(name: str) -> dict[str, Any]:
    return {stage: conclusions.empty() | {"cases": 2, "done": True} for stage in conclusions.gating(name)}


def summary_of(hashes: str = "a", device: str = "a GPU", **stages: dict[str, Any]) -> dict[str, Any]:
    """A summary in which every set passed everything, but for what is given of the SCAN loss."""
    sets = {
        name: {"source": source, "sha256": hashes * 64, "stages": passed_all(name)}
        for name, source in conclusions.kernel_sets().items()
    }
    sets["scan_loss:portable"]["stages"] |= stages
    found: dict[str, Any] = {"rehearsal": False, "date": "2030-01-02", "environment": {"device": device, "commit": "c"}}
    found |= {"stages": {}, "sets": sets, "timings": [], "step": [], "notes": []}
    conclusions.conclude(found)
    return found


def scan_loss_of(summary: dict[str, Any]) -> dict[str, Any]:
    kernel: dict[str, Any] = summary["kernels"]["scan_loss/scan_loss_cuda"]
    return kernel


def test_verified_is_what_passed_everything() -> None:
    assert {kernel["status"] for kernel in summary_of()["kernels"].values()} == {conclusions.VERIFIED}
    assert len(summary_of()["kernels"]) == len(SETS)
    for stage in conclusions.gating("scan_loss:portable"):
        for gap in ({"done": False}, {"cases": 0}):
            kernel = scan_loss_of(summary_of(**{stage: conclusions.empty() | {"cases": 2, "done": True} | gap}))
            assert (kernel["status"], kernel["reason"]) == (conclusions.PARTLY, f"not finished: {stage}")
    wrong = conclusions.empty() | {"cases": 2, "done": True, "failed": ["5x7: nan", "9x9: nan"]}
    kernel = scan_loss_of(summary_of(timings=wrong))
    assert (kernel["status"], kernel["reason"]) == (conclusions.FAILED, "timings: 5x7: nan and 1 more")
    assert conclusions.gating("augment:portable") == ("smoke", "accuracy", "repeat", "memcheck")


def test_a_stage_that_a_machine_cannot_run_is_waived_and_named() -> None:
    without = conclusions.empty()
    summary = summary_of(memcheck=without)
    assert scan_loss_of(summary)["status"] == conclusions.PARTLY
    summary["stages"]["memcheck"] = {"status": "not here: compute-sanitizer is missing", "seconds": 0.0}
    conclusions.conclude(summary)
    assert scan_loss_of(summary)["status"] == conclusions.VERIFIED and scan_loss_of(summary)["waived"] == ["memcheck"]


def test_merging_lets_the_later_run_speak() -> None:
    wrong = conclusions.empty() | {"cases": 2, "done": True, "failed": ["5x7: nan"]}
    right = conclusions.empty() | {"cases": 2, "done": True}
    first, second = summary_of(accuracy=wrong), summary_of(accuracy=right)
    second["sets"]["scan_loss:portable"]["stages"] = {"accuracy": right}  # only this ran again
    assert scan_loss_of(first)["status"] == conclusions.FAILED
    merged = conclusions.merge([first, second])
    assert scan_loss_of(merged)["status"] == conclusions.VERIFIED
    assert scan_loss_of(first)["status"] == conclusions.FAILED, "merging changed what it was given"
    # Another source starts anew: what the former passed does not count.
    second["sets"]["scan_loss:portable"]["sha256"] = "b" * 64
    merged = conclusions.merge([summary_of(), second])
    assert scan_loss_of(merged)["status"] == conclusions.PARTLY and scan_loss_of(merged)["sha256"] == "b" * 64
    with pytest.raises(ValueError, match="a GPU, another"):
        conclusions.merge([first, summary_of(device="another")])


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


def test_sizes_go_round_on_a_large_gpu() -> None:
    """On 132 multiprocessors a block of the kernels for sm_90a has several tiles at the sizes of smoke and accuracy."""
    for size in ("smoke", "full"):
        nt_xent = [c.shape for c in cases.gradient_cases(size) if c.family == "nt_xent"]
        # A triangle of 128 x 128 tiles over 2N rows.
        tiles = [(2 * n // 128) * (2 * n // 128 + 1) // 2 for n, _ in nt_xent]
        assert max(tiles) >= 8 * 132
        assert max((case.rows // 128) ** 2 for case in cases.neighbor_cases(size)) >= 8 * 132
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
