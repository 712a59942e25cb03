"""Decisions about trust in kernels: when they are tested, and which verdicts are stored.

No GPU is needed: the tests treat the CPU as a device whose kernels must be trusted, and the same code decides.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import scan_fast
from scan_fast import gpu_status
from scan_fast.cli import main
from scan_fast.ops import check, dispatch, native, reference, self_test, trust, verdicts
from scan_fast.ops.batch_norm import batch_norm
from scan_fast.ops.families import FAMILIES, GPU_FAMILIES
from scan_fast.views.render_fused import FusedRenderer
from scan_fast.views.render_torch import TorchRenderer
from scan_fast.views.renderers import automatic_renderer, renderer_for

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no compiled module")
CPU = torch.device("cpu")
FAMILY = "self_label"  # has the shortest test


def forget_this_process() -> None:
    """Clear the state of this process, so that only what a later process would find remains."""
    for memory in (trust._decided, verdicts._of_process, trust._sm90, trust._warned):
        memory.clear()


class SelfTests(list[tuple[str, str]]):
    """Self-tests that ran, as (family, kernels); `results` overrides the results of some."""

    def __init__(self) -> None:
        self.results: dict[tuple[str, str], self_test.Result | BaseException] = {}


@pytest.fixture
def tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SelfTests]:
    """Treat the CPU as a device whose kernels must be trusted, with an empty cache, and count the self-tests."""
    ran = SelfTests()
    run = self_test.run

    def counted(family: str, kernels: str, device: torch.device) -> self_test.Result:
        ran.append((family, kernels))
        result = ran.results.get((family, kernels))
        if isinstance(result, BaseException):
            raise result
        return result or run(family, kernels, device)

    monkeypatch.setattr(trust, "DEVICE_TYPES", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(self_test, "run", counted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SCAN_FAST_SELF_TEST", raising=False)
    monkeypatch.setattr(native, "KERNEL_CHOICE", "auto")
    forget_this_process()
    yield ran
    forget_this_process()
    for family in native.GPU_KERNELS:
        native.take_sm90(family, False)


FAILED = self_test.Result(False, "5x7 float32: error 1e-01, allowed 1e-06", 1e5, 1.0)


def decide(family: str = FAMILY, index: int = 0) -> bool:
    """Decide without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return trust.takes_kernel(family, "cpu", index)


def refuse(match: str, family: str = FAMILY, index: int = 0) -> str:
    """Expect the reference with one warning of one line, and none for a second call; return the warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert trust.takes_kernel(family, "cpu", index) is False
        assert trust.takes_kernel(family, "cpu", index) is False
    (warning,) = caught
    text = str(warning.message)
    assert warning.category is RuntimeWarning and "\n" not in text
    assert match in text and family in text and "plain PyTorch" in text and trust._name(CPU) in text
    return text


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "scan-fast" / "gpu-verdicts").glob("*"))


# ---- every family ----------------------------------------------------------------------------------------------------


def calls() -> dict[str, Callable[[str], tuple[torch.Tensor, ...]]]:
    """Return one call of every family, by impl."""
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    image = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1)).contiguous(
        memory_format=torch.channels_last
    )
    one = torch.ones(4)
    return {
        "nt_xent": lambda impl: (scan_fast.nt_xent(x, x.flip(0), 0.5, impl=impl),),
        "scan_loss": lambda impl: tuple(scan_fast.scan_loss(x, x.flip(0), 5.0, impl=impl)),
        "self_label": lambda impl: tuple(scan_fast.self_label_loss(9 * x, x, 0.9, impl=impl)),
        "neighbors": lambda impl: scan_fast.topk_neighbors(x, 2, impl=impl),
        "batch_norm": lambda impl: (batch_norm(image, one, one, None, None, training=True, impl=impl),),
    }


@pytest.mark.parametrize("family", [family.name for family in GPU_FAMILIES])
def test_a_wrong_kernel_is_not_used(family: str, tests: SelfTests, monkeypatch: pytest.MonkeyPatch) -> None:
    """impl="auto" gives the result of the reference and warns once; impl="native" still runs the wrong kernel."""
    operator = FAMILIES[family].operator
    right = getattr(torch.ops.scan_fast, operator)
    through = []

    def wrong(*arguments: Any) -> Any:
        results = right(*arguments)
        first = results[0] if isinstance(results, tuple) else results
        # For augment, only batches are wrong: on the CPU the test compares them with single images.
        if family != "augment" or len(first) > 1:
            through.append(operator)
            first.copy_(first.flip(-1) + 1)
        return results

    monkeypatch.setattr(torch.ops.scan_fast, operator, wrong)
    with pytest.warns(RuntimeWarning, match=f"{family} takes plain PyTorch on .* failed their self-test") as caught:
        if family == "augment":
            assert automatic_renderer("cpu") == "torch"
            assert isinstance(renderer_for("auto", (0.5,) * 3, (0.5,) * 3, CPU), TorchRenderer)
            assert isinstance(renderer_for("fused", (0.5,) * 3, (0.5,) * 3, CPU), FusedRenderer)
        else:
            call = calls()[family]
            for _ in range(2):
                assert all(map(torch.equal, call("auto"), call("reference")))
    assert len(caught) == 1 and tests == [(family, "portable")] and through


@pytest.mark.parametrize("family", [family.name for family in GPU_FAMILIES])
def test_a_right_kernel_is_tested_once_and_used(family: str, tests: SelfTests) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if family == "augment":
            assert automatic_renderer("cpu") == automatic_renderer("cpu") == "fused"
        else:
            call = calls()[family]
            assert all(map(torch.equal, call("auto"), call("native")))
            assert all(map(torch.equal, call("auto"), call("native")))
    assert tests == [(family, "portable")]


def test_an_explicit_choice_tests_nothing(tests: SelfTests) -> None:
    for call in calls().values():
        call("native")
        call("reference")
    scan_fast.nt_xent(torch.ones(2, 2).double(), torch.ones(2, 2).double())
    assert tests == []


def test_cpu_kernels_are_not_tested(tests: SelfTests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "DEVICE_TYPES", frozenset({"cuda"}))
    for call in calls().values():
        call("auto")
    assert automatic_renderer("cpu") == "fused"
    assert tests == [] and trust._decided == {}


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_a_later_process_finds_the_verdict(tests: SelfTests, tmp_path: Path) -> None:
    assert decide()
    tests.results["scan_loss", "portable"] = FAILED
    refuse("failed their self-test (5x7 float32: error 1e-01, allowed 1e-06)", "scan_loss")
    assert len(files(tmp_path)) == len(tests) == 2
    tests.results.clear()
    forget_this_process()
    assert decide()
    refuse("5x7 float32", "scan_loss")
    assert len(tests) == 2
    assert trust.standing(FAMILY, "portable", CPU) == "self-test passed"
    assert trust.standing("scan_loss", "portable", CPU) == f"self-test failed: {FAILED.reason}"
    assert trust.standing("nt_xent", "portable", CPU) == "not tested yet"


@pytest.mark.parametrize("what", ["source", "module", "gpu", "driver", "torch"])
def test_another_build_gpu_driver_or_torch_is_tested_again(
    what: str, tests: SelfTests, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert decide() and len(tests) == 1
    right = trust.key_of
    monkeypatch.setattr(trust, "key_of", lambda *place: right(*place) | {what: "another"})
    forget_this_process()
    assert decide() and len(tests) == 2


def test_the_key_has_the_hash_of_the_source_that_was_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"sources": {"neighbors/neighbors_cuda": "one", "neighbors/neighbors_sm90": "two"}}
    monkeypatch.setattr(native, "build_info", lambda: facts)
    keys = [trust.key_of("neighbors", kernels, CPU) for kernels in ("portable", "sm90")]
    assert [key["source"] for key in keys] == ["one", "two"]
    assert all(value for key in keys for value in key.values())


@pytest.mark.parametrize("wrong", ["source", "gpu", "status", "unreadable"])
def test_the_record_counts_for_its_own_source_and_gpu(
    wrong: str, tests: SelfTests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "build_info", lambda: {"sources": {"self_label/self_label_cuda": "abc"}})
    record: dict[str, Any] = {"status": "verified", "passed": {"sha256": "abc", "device": trust._name(CPU)}}
    monkeypatch.setattr(gpu_status, "records", lambda: {"self_label/self_label_cuda": record})
    assert decide() and tests == []
    assert trust.standing(FAMILY, "portable", CPU) == "verified"
    if wrong == "status":
        record["status"] = "unverified"
    elif wrong == "unreadable":
        monkeypatch.setattr(gpu_status, "records", lambda: json.loads("{"))
    else:
        record["passed"]["sha256" if wrong == "source" else "device"] = "another"
    forget_this_process()
    assert decide() and tests == [(FAMILY, "portable")]


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "null", '{"key": 1}', "\x00\xff", "[" * 100_000, "passed without details", "key of another"],
    ids=lambda text: text[:12],
)
def test_a_damaged_cache_is_ignored(damage: str, tests: SelfTests, tmp_path: Path) -> None:
    assert decide()
    (file,) = files(tmp_path)
    entry = json.loads(file.read_text())
    if damage == "passed without details":
        damage = json.dumps({"key": entry["key"], "verdict": "passed"})
    elif damage == "key of another":
        damage = json.dumps(entry | {"key": entry["key"] | {"gpu": "another"}})
    file.write_bytes(damage.encode("latin-1"))
    forget_this_process()
    assert decide() and len(tests) == 2
    assert json.loads(file.read_text())["verdict"] == "passed"


@pytest.mark.parametrize("obstacle", ["a file in the way", "no permission", "no home"])
def test_a_cache_that_cannot_be_written_is_ignored(
    obstacle: str, tests: SelfTests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if obstacle == "a file in the way":
        (tmp_path / "scan-fast").write_text("")
    elif obstacle == "no permission":
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert decide()
    forget_this_process()
    assert decide() and len(tests) == 2
    assert [file for file in tmp_path.rglob("*") if file.is_file() and file.name != "scan-fast"] == []


# ---- crashes, and several processes at once --------------------------------------------------------------------------


SCRIPT = """
import os, sys, time, warnings
warnings.simplefilter("error")
from scan_fast.ops import native, self_test, trust
trust.DEVICE_TYPES = frozenset({"cpu"})
run = self_test.run
def watched(*arguments):
    print("tests", flush=True)
    if sys.argv[1] == "crash":
        os._exit(9)
    time.sleep(float(sys.argv[1]))  # the others come meanwhile
    return run(*arguments)
self_test.run = watched
print("ready", flush=True)
sys.stdin.readline()
print(trust.takes_kernel("self_label", "cpu", 0))
"""


def process(argument: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, argument],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_crash_in_the_self_test_is_known_next_time(tests: SelfTests, tmp_path: Path) -> None:
    child = process("crash")
    output, errors = child.communicate("go\n", timeout=120)
    assert child.returncode == 9 and output.split() == ["ready", "tests"], errors
    (file,) = files(tmp_path)
    assert json.loads(file.read_text())["verdict"] == "running"
    assert "scan-fast info --check" in refuse("an earlier process crashed or hung")
    assert tests == []
    assert "crashed" in trust.standing(FAMILY, "portable", CPU)
    assert trust.run_test(FAMILY, "portable", CPU).passed  # what --check does
    forget_this_process()
    assert decide() and len(tests) == 1


def test_processes_at_once_each_test_by_themselves(tests: SelfTests, tmp_path: Path) -> None:
    """Neither process takes the other's "running" entry for a crash, and a third one uses their verdict."""
    children = [process("3"), process("0")]
    first, second = children
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n", child.communicate()
    assert first.stdin is not None and first.stdout is not None
    first.stdin.write("go\n")
    first.stdin.flush()
    assert first.stdout.readline() == "tests\n"
    output, errors = second.communicate("go\n", timeout=120)  # while the first still tests
    assert output.split() == ["tests", "True"], errors
    output, errors = first.communicate(timeout=120)
    assert output.split() == ["True"], errors
    assert decide() and tests == []
    (file,) = files(tmp_path)
    assert file.suffix == ".json"


def running(**changes: object) -> None:
    """Write a "running" entry of this process, with changes."""
    key = trust.key_of(FAMILY, "portable", CPU)
    verdicts.keep_running(key)
    path = verdicts.path_of(key)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_which_running_entries_count(tests: SelfTests) -> None:
    for alive in ({}, {"host": "another", "pid": 1}, {"host": "another", "time": time.time() + 30}):
        running(**alive)
        forget_this_process()
        assert decide(), alive
    assert len(tests) == 3
    child = subprocess.Popen(["true"])
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    dead = (
        {"time": time.time() - 1000},  # hangs
        {"host": "another", "time": time.time() - 1000},
        {"started": "1"},  # the process id was reused
        {"pid": child.pid, "started": "1"},
        {"pid": None},
    )
    for changes in dead:
        running(**changes)
        forget_this_process()
        refuse("crashed or hung")
    started = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
    running(pid=child.pid, started=started)  # a zombie
    child.wait()
    forget_this_process()
    refuse("crashed or hung")
    assert len(tests) == 3


def test_threads_wait_for_one_test(tests: SelfTests) -> None:
    answers: list[bool] = []
    threads = [threading.Thread(target=lambda: answers.append(decide())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 8 and len(tests) == 1


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_gpu_of_another_architecture(tests: SelfTests, tmp_path: Path) -> None:
    text = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be ..."
    tests.results[FAMILY, "portable"] = RuntimeError(text)
    architectures = native.build_info().get("cuda_architectures")
    refuse(f"this build has kernels for {architectures}, the GPU is 00: build on this machine")
    assert len(files(tmp_path)) == 1


def test_out_of_memory_is_not_a_verdict(tests: SelfTests, tmp_path: Path) -> None:
    tests.results[FAMILY, "portable"] = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
    refuse("could not be tested (CUDA out of memory. Tried to allocate 2.00 MiB.)")
    assert files(tmp_path) == []
    tests.results.clear()
    forget_this_process()
    assert decide()


def test_an_interruption_is_not_a_crash(tests: SelfTests, tmp_path: Path) -> None:
    tests.results[FAMILY, "portable"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        decide()
    assert files(tmp_path) == []
    tests.results.clear()
    assert decide()


def test_unexpected_devices_raise_nothing(tests: SelfTests, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(device: torch.device) -> str:
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check.")

    monkeypatch.setattr(trust, "_name", odd)
    with pytest.warns(RuntimeWarning, match="could not be tested .Found no NVIDIA driver on your system"):
        assert trust.takes_kernel(FAMILY, "cpu", 0) is False


def test_in_a_cuda_graph_the_reference_runs_until_there_is_a_verdict(
    tests: SelfTests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "_capturing", lambda device: True)
    refuse("nothing can be tested in a CUDA graph")
    assert tests == []
    monkeypatch.setattr(trust, "_capturing", lambda device: False)
    assert decide() and tests == [(FAMILY, "portable")]
    forget_this_process()
    monkeypatch.setattr(trust, "_capturing", lambda device: True)
    assert decide() and len(tests) == 1  # from the cache


def test_the_environment_can_trust_everything(tests: SelfTests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCAN_FAST_SELF_TEST", "off")
    assert all(decide(family.name) for family in GPU_FAMILIES)
    assert tests == []


# ---- kernels for sm_90a ----------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(tests: SelfTests, monkeypatch: pytest.MonkeyPatch) -> SelfTests:
    """Pretend that the device is a GPU of compute capability 9.0 and that the build has kernels for it."""
    monkeypatch.setattr(trust, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(native, "has_sm90", lambda family: family in native.GPU_KERNELS)
    return tests


@pytest.mark.parametrize("family", sorted(native.GPU_KERNELS))
def test_sm90_kernels_are_used_if_both_sets_pass(family: str, hopper: SelfTests) -> None:
    assert decide(family) and native.takes_sm90(family)
    assert hopper == [(family, "portable"), (family, "sm90")]
    forget_this_process()
    native.take_sm90(family, False)
    assert decide(family) and native.takes_sm90(family)  # of a later process
    assert len(hopper) == 2


@pytest.mark.parametrize(
    "finding", [FAILED, RuntimeError("CUDA error: unspecified launch failure")], ids=["wrong", "raises"]
)
def test_wrong_kernels_for_sm90_leave_the_portable_ones(finding: object, hopper: SelfTests) -> None:
    hopper.results["neighbors", "sm90"] = finding  # type: ignore[assignment]
    with pytest.warns(
        RuntimeWarning, match="neighbors takes its portable kernels on .* its sm90 kernels failed"
    ) as caught:
        assert trust.takes_kernel("neighbors", "cpu", 0) and trust.takes_kernel("neighbors", "cpu", 0)
    assert len(caught) == 1 and not native.takes_sm90("neighbors")


def test_wrong_portable_kernels_leave_the_reference(hopper: SelfTests) -> None:
    """The sm_90a kernels do not cover every problem; the portable ones would run for the rest."""
    hopper.results["neighbors", "portable"] = FAILED
    refuse("its portable kernels failed", "neighbors")
    assert hopper == [("neighbors", "portable")] and not native.takes_sm90("neighbors")
    x = torch.randn(9, 4)
    assert torch.equal(
        scan_fast.topk_neighbors(x, 2)[1], reference.topk_neighbors(x, x, 2, normalize=True, exclude_self=True)[1]
    )


def test_the_environment_picks_the_kernel_set(hopper: SelfTests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "KERNEL_CHOICE", "portable")
    assert decide("neighbors") and hopper == [("neighbors", "portable")] and not native.takes_sm90("neighbors")
    forget_this_process()
    monkeypatch.setattr(native, "KERNEL_CHOICE", "sm90")
    hopper.results["nt_xent", "sm90"] = hopper.results["nt_xent", "portable"] = FAILED
    assert decide("nt_xent") and len(hopper) == 1
    hopper.results[FAMILY, "portable"] = FAILED  # this family has no sm_90a kernels
    refuse("failed")


def test_trusting_everything_uses_the_sm90_kernels(hopper: SelfTests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCAN_FAST_SELF_TEST", "off")
    assert decide("neighbors") and native.takes_sm90("neighbors") and hopper == []
    monkeypatch.setattr(native, "KERNEL_CHOICE", "portable")
    native.take_sm90("nt_xent", False)
    assert decide("nt_xent") and not native.takes_sm90("nt_xent")


def test_other_gpus_use_no_sm90_kernels(hopper: SelfTests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_capability", lambda device: (10, 0))
    assert decide("neighbors") and hopper == [("neighbors", "portable")] and not native.takes_sm90("neighbors")


def test_two_models_in_a_process(hopper: SelfTests, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one switch per process: a second, unknown GPU model turns it off without a test."""
    monkeypatch.setattr(trust, "_name", lambda device: f"GPU {device.index // 2}")
    assert decide("neighbors", 0) and decide("neighbors", 1) and len(hopper) == 2 and native.takes_sm90("neighbors")
    assert decide("neighbors", 2) and not native.takes_sm90("neighbors")
    assert hopper[2:] == [("neighbors", "portable")]
    assert decide("neighbors", 3) and not native.takes_sm90("neighbors") and len(hopper) == 3


def test_the_self_test_runs_the_kernel_set_it_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "has_sm90", lambda family: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: FakeTensorMode())  # any context
    switch = []
    monkeypatch.setattr(native, "take_sm90", lambda family, on: switch.append((family, on)))
    with self_test._kernel_set("nt_xent", "sm90", torch.device("cuda", 0)):
        assert switch == [("nt_xent", True)]
    assert switch == [("nt_xent", True), ("nt_xent", False)]


# ---- torch.compile and the caller's state ----------------------------------------------------------------------------


def objective(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return scan_fast.scan_loss(x, y, 5.0)[0] * 2


@pytest.mark.parametrize("right", [True, False])
def test_the_decision_is_a_constant_under_torch_compile(right: bool, tests: SelfTests) -> None:
    if not right:
        tests.results["scan_loss", "portable"] = FAILED
    x, y = torch.randn(2, 8, 5).unbind()
    found: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(objective, backend=backend, fullgraph=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = compiled(x, y)
        compiled(x + 1, y)
    assert tests == [("scan_loss", "portable")]
    assert any("scan_fast.scan_loss" in name for name in found) is right
    told = [w for w in caught if "scan_fast:" in str(w.message)]
    assert len(told) == (0 if right else 1)
    expected = scan_fast.scan_loss(x, y, 5.0, impl="native" if right else "reference")[0] * 2
    torch.testing.assert_close(value, expected)


def test_compiled_with_gradients(tests: SelfTests) -> None:
    x, y = (z.requires_grad_() for z in torch.randn(2, 8, 5).unbind())
    torch._dynamo.reset()
    (grad,) = torch.autograd.grad(torch.compile(objective, backend="aot_eager", fullgraph=True)(x, y), x)
    (expected,) = torch.autograd.grad(objective(x, y), x)
    torch.testing.assert_close(grad, expected)
    assert tests == [("scan_loss", "portable")]


@pytest.mark.parametrize("state", ["inference", "no_grad", "autocast", "default device", "fake", "grad transform"])
def test_a_first_use_in_any_state(state: str, tests: SelfTests) -> None:
    x = torch.randn(2, 8, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if state == "grad transform":
            seen = []

            def objective(z: torch.Tensor) -> torch.Tensor:
                seen.append(dispatch.use_native("auto", z, "scan_loss_forward"))
                return z.sum()

            torch.func.grad(objective)(x)
            assert seen == [True]
        elif state == "fake":
            with FakeTensorMode():
                y = torch.randn(8, 5)
                assert type(scan_fast.scan_loss(y, y, 5.0)[0]) is type(y) is not torch.Tensor
        else:
            contexts: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
                "inference": torch.inference_mode,
                "no_grad": torch.no_grad,
                "autocast": lambda: torch.autocast("cpu"),
                "default device": lambda: torch.device("meta"),
            }
            with contexts[state]():
                scan_fast.scan_loss(x[0], x[1], 5.0)
    assert tests == [("scan_loss", "portable")] and trust._decided["scan_loss", "cpu", 0] is True


# ---- scan-fast info --check ------------------------------------------------------------------------------------------


@pytest.mark.serial
def test_a_crash_or_a_hang_is_one_line_and_the_next_test_runs(tests: SelfTests) -> None:
    passed = json.dumps({"passed": True, "how": "self-test passed", "worst": 0.5, "milliseconds": 12.0})
    words = {
        "augment": "import os; os.kill(os.getpid(), 11)",
        "batch_norm": "import time; time.sleep(600)",
        "neighbors": "raise SystemExit('no such thing')",
        "nt_xent": "print('hello')",
    }
    begin = time.perf_counter()
    rows = list(
        check.check(CPU, 3.0, lambda name, _: [sys.executable, "-S", "-c", words.get(name, f"print({passed!r})")])
    )
    assert time.perf_counter() - begin < 60
    assert [family for family, _, _ in rows] == [family.name for family in GPU_FAMILIES]
    reasons = [verdict.reason for _, _, verdict in rows]
    assert reasons == [
        "its process ended with signal 11",
        "no result after 3 s",
        "its process ended with 1: no such thing",
        "its process printed no verdict",
        "",
        "",
    ]
    assert [verdict.passed for _, _, verdict in rows] == [False] * 4 + [True] * 2
    refuse("crashed or hung", "batch_norm")
    assert tests == []
    text = check.table(rows, CPU).splitlines()
    assert len(text) == 2 + len(rows)
    assert "no result after 3 s" in text[3] and "12.0" in text[-1] and "0.50" in text[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_check_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--check"]) == 2
    output, error = capsys.readouterr()
    assert output == "" and error.splitlines() == [
        "scan-fast: no GPU is usable here, so there is nothing to check (--device cpu tests the CPU kernels)"
    ]
    for words in (["--check", "--device", "tpu"], ["--check", "--device", "meta"], ["--device", "cpu"]):
        assert main(["info", *words]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_check_on_the_processor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--check", "--device", "cpu", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["family"] for row in rows] == [family.name for family in GPU_FAMILIES]
    assert all(row["passed"] and row["milliseconds"] > 0 and 0 <= row["worst"] <= 1 for row in rows)


def test_check_fails_if_a_kernel_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = json.dumps({"passed": False, "how": "self-test failed", "reason": "5x7: error 1", "worst": 9.0})
    monkeypatch.setattr(check, "_command", lambda device: lambda *_: [sys.executable, "-S", "-c", f"print({wrong!r})"])
    assert main(["info", "--check", "--device", "cpu"]) == 1
    assert capsys.readouterr().out.count("5x7: error 1") == len(GPU_FAMILIES)


# ---- scan-fast info, and what is asked of a GPU ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:10:15 UTC 2025\nGCC version: 12.2.0",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs)\nGCC version: 12.2.0",
    ],
)
def test_the_drivers_version(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    trust._driver.cache_clear()
    try:
        assert trust._driver() == "580.65.06"
    finally:
        trust._driver.cache_clear()


@pytest.mark.skipif(not native.has_kernel("nt_xent_forward", "cuda"), reason="no CUDA kernels in this build")
def test_info_shows_the_record_of_this_gpu(
    tests: SelfTests, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (
        ("is_available", True),
        ("current_device", 0),
        ("get_device_name", "Some GPU"),
        ("get_device_capability", (9, 0)),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    gpu = torch.device("cuda", 0)
    verdicts.keep(trust.key_of("nt_xent", "portable", gpu), trust.verdict_of(FAILED))
    verdicts.keep(trust.key_of("scan_loss", "portable", gpu), verdicts.Verdict(True, "self-test passed"))
    assert main(["info"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["scan_loss", "portable", "self-test", "passed"] in lines
    assert ["nt_xent", "portable", "self-test", "failed:", *FAILED.reason.split()] in lines
    assert ["self_label", "portable", "not", "tested", "yet"] in lines
    sm90 = [line for line in lines if line[1:] == ["sm90", "not", "tested", "yet"]]
    assert len(sm90) == (len(native.GPU_KERNELS) if native.build_info()["sm90_kernels"] else 0)
    assert tests == []
