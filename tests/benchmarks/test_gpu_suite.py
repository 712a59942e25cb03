"""What the GPU suite concludes from its steps, and that no step can take the others with it."""

import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_checks, gpu_suite
from benchmarks.gpu_suite import FAMILIES, Step
from scan_fast.ops import native


def case(family: str, name: str, inner: str = "") -> str:
    return f'<testcase classname="tests.ops.test_{family}" name="{name}">{inner}</testcase>'


def junit(folder: Path, *cases: str) -> None:
    (folder / "junit.xml").write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")


def outcome(passed: bool, output: str = "", status: str = "failed (1)") -> dict[str, Any]:
    status = "passed" if passed else status
    return {"name": "step", "status": status, "passed": passed, "seconds": 1.0, "output": output}


def summary(folder: Path, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The summary of a rehearsal in which every step passed but those given."""
    steps = gpu_suite.plan(rehearse=True, out=folder, build=False)
    return gpu_suite.summarize(
        steps, [results.get(s.name, outcome(True)) | {"name": s.name} for s in steps], folder, True
    )


def passed(folder: Path, results: dict[str, dict[str, Any]] | None = None) -> set[str]:
    return {name.split("/")[0] for name, k in summary(folder, results or {})["kernels"].items() if k["passed"]}


@pytest.fixture
def all_ran(tmp_path: Path) -> Path:
    junit(tmp_path, *(case(family, "test_a[cuda]") for family in FAMILIES))
    return tmp_path


def test_all_passed(all_ran: Path) -> None:
    assert passed(all_ran) == set(FAMILIES)


def test_a_family_without_tests_is_not_verified(tmp_path: Path) -> None:
    junit(tmp_path, case("nt_xent", "test_a[cuda]"), case("scan_loss", "test_a[cuda]", "<skipped/>"))
    assert passed(tmp_path) == {"nt_xent"}


def test_a_failed_test_counts_against_its_family(tmp_path: Path) -> None:
    cases = [case(family, "test_a[cuda]") for family in FAMILIES]
    junit(tmp_path, *cases, case("self_label", "test_b[cuda]", "<failure/>"))
    assert passed(tmp_path, {"tests": outcome(False)}) == set(FAMILIES) - {"self_label"}
    # Out of time, nobody knows what the rest would have said.
    assert passed(tmp_path, {"tests": outcome(False, status="timed out after 9 s")}) == set()


def test_a_failed_check_counts_against_the_families_it_names(all_ran: Path) -> None:
    lines = [json.dumps({"family": f, "passed": f != "neighbors", "failures": []}) for f in FAMILIES]
    result = outcome(False, "seed 1\n" + "\n".join(lines))
    assert passed(all_ran, {"accuracy": result}) == set(FAMILIES) - {"neighbors"}
    assert any('"neighbors"' in note for note in summary(all_ran, {"accuracy": result})["notes"])
    assert passed(all_ran, {"accuracy": outcome(False, "\n".join(lines[:2]) + "\nSegmentation fault")}) == set()
    assert passed(all_ran, {"graph": outcome(False, "\n".join(lines[:-1]))}) == set(FAMILIES) - {"neighbors"}
    assert passed(all_ran, {"graph": outcome(False)}) == {"augment"}


def test_a_failed_step_of_one_family_leaves_the_others(all_ran: Path) -> None:
    assert passed(all_ran, {"tiny scan_loss": outcome(False)}) == set(FAMILIES) - {"scan_loss"}
    assert passed(all_ran, {"benchmark scan_loss": outcome(False)}) == set(FAMILIES)


def test_kernels_for_sm90_are_verified_by_steps_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "architecture", lambda: "90a")
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: f"/usr/bin/{name}")
    steps = gpu_suite.plan(rehearse=False, out=tmp_path, build=True)
    assert len({step.name for step in steps}) == len(steps)
    for name, family in gpu_suite.SM90.items():
        gating = [step for step in steps if name in step.families and step.name != "build"]
        checks = {"tests", "accuracy", "repeat", "graph", "memcheck", "initcheck"}
        assert {step.name.split()[0] for step in gating} == checks
        assert all(step.environment["SCAN_FAST_GPU_KERNELS"] == "sm90" for step in gating)
        assert all(family in " ".join(step.command) for step in gating)
    rest = [step for step in steps if set(step.families) & set(FAMILIES) and step.name != "build"]
    assert all(step.environment["SCAN_FAST_GPU_KERNELS"] == "portable" for step in rest)

    # What passed with one set of kernels says nothing about the other.
    junit(tmp_path, *(case(family, "test_a[cuda]") for family in FAMILIES))
    for name, family in gpu_suite.SM90.items():
        text = f"<testsuites><testsuite>{case(family, 'test_a[cuda]')}</testsuite></testsuites>"
        (tmp_path / gpu_suite.junit(name)).write_text(text)
    for failed, expected in (("memcheck nt_xent sm90", (True, False)), ("memcheck nt_xent", (False, True))):
        results = [outcome(step.name != failed) | {"name": step.name} for step in steps]
        kernels = gpu_suite.summarize(steps, results, tmp_path, True)["kernels"]
        assert (kernels["nt_xent/nt_xent_cuda"]["passed"], kernels["nt_xent/nt_xent_sm90"]["passed"]) == expected


def test_a_step_that_hangs_is_ended_with_its_children() -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    log = io.StringIO()
    begin = time.monotonic()
    result = gpu_suite.run(Step("hangs", (sys.executable, "-c", child), 60), 6, log)
    assert time.monotonic() - begin < 30
    assert result["status"] == "timed out after 6 s" and not result["passed"]
    assert gpu_suite.run(Step("late", (sys.executable, "-c", ""), 60), 1, log)["status"] == "no time left"


def test_a_crash_is_told_and_its_output_kept() -> None:
    log = io.StringIO()
    result = gpu_suite.run(Step("dies", (sys.executable, "-c", "print('last words'); exit(3)"), 60), 60, log)
    assert result["status"] == "failed (3)" and "last words" in result["output"] and "last words" in log.getvalue()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On shapes this small, threads that wait for each other are all there is to wait for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not native.is_available(), reason="scan_fast._C is not built")
def test_the_checks_find_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    assert not any(gpu_checks.accuracy("cpu", 3, tiny=True).values())
    assert not any(gpu_checks.repeat("cpu", 3, tiny=True).values())
    right = gpu_checks.scan_fast.scan_loss

    def slightly_off(*arguments: Any, **options: Any) -> Any:
        total, consistency, entropy = right(*arguments, **options)
        return total * 1.001, consistency, entropy

    monkeypatch.setattr(gpu_checks.scan_fast, "scan_loss", slightly_off)
    failures = gpu_checks.accuracy("cpu", 3, tiny=True)
    assert [family for family, found in failures.items() if found] == ["scan_loss"]
    assert any("float32" in line for line in failures["scan_loss"])


@pytest.mark.skipif(not native.is_available(), reason="scan_fast._C is not built")
def test_the_checks_find_a_layer_that_forgets_its_statistics(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    right = gpu_checks.batch_norm

    def forgets(x: torch.Tensor, *arguments: Any, impl: str, **options: Any) -> torch.Tensor:
        if impl == "native":
            arguments = (*arguments[:3], arguments[3].clone())
        return right(x, *arguments, impl=impl, **options)

    monkeypatch.setattr(gpu_checks, "batch_norm", forgets)
    failures = gpu_checks.accuracy("cpu", 6, tiny=True)
    assert [family for family, found in failures.items() if found] == ["batch_norm"]
    assert all("training" in line for line in failures["batch_norm"])


@pytest.mark.skipif(not native.is_available(), reason="scan_fast._C is not built")
def test_the_checks_find_a_view_that_depends_on_its_batch(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    right = gpu_checks.augment

    def off_in_batches(images: torch.Tensor, recipes: torch.Tensor, *arguments: Any) -> torch.Tensor:
        views = right(images, recipes, *arguments)
        if len(views) > 1:
            views[1, 0, 0, 0] += 1
        return views

    monkeypatch.setattr(gpu_checks, "augment", off_in_batches)
    failures = gpu_checks.accuracy("cpu", 4, tiny=True)
    assert [family for family, found in failures.items() if found] == ["augment"]


@pytest.mark.skipif(not native.is_available(), reason="scan_fast._C is not built")
def test_a_replay_must_follow_its_inputs(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    assert not any(gpu_checks.graph("cpu", 5, tiny=True).values())
    right = gpu_checks.scan_fast.topk_neighbors
    calls = []

    def remembers(x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        calls.append(right(x, *arguments, **options))
        return calls[0] if len(calls) > 1 else calls[-1]

    monkeypatch.setattr(gpu_checks.scan_fast, "topk_neighbors", remembers)
    failures = gpu_checks.graph("cpu", 5, tiny=True)
    assert [family for family, found in failures.items() if found] == ["neighbors"]
