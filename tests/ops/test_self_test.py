"""Self-tests pass for correct kernels, fail for one wrong value, and leave the caller's state unchanged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from scan_fast.ops import native, self_test
from scan_fast.ops.families import FAMILIES, GPU_FAMILIES

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no compiled module")
CPU = torch.device("cpu")


def test_the_table_covers_every_family_with_gpu_kernels() -> None:
    assert all(callable(self_test.findings_of(family.name)) for family in GPU_FAMILIES)
    assert {family.operator for family in FAMILIES.values()} == set(native.OPERATORS)


@pytest.mark.parametrize("family", [family.name for family in GPU_FAMILIES])
def test_the_cpu_kernels_pass(family: str) -> None:
    result = self_test.run(family, "portable", CPU)
    assert result.passed and result.reason == ""
    assert 0 <= result.worst <= 1 and result.milliseconds > 0


# Family, operator, and which of its results is wrong.
WRONG = [
    *(("nt_xent", "nt_xent_forward", output) for output in range(4)),
    *(("nt_xent", "nt_xent_backward", output) for output in range(2)),
    *(("scan_loss", "scan_loss_forward", output) for output in range(5)),
    *(("scan_loss", "scan_loss_backward", output) for output in range(2)),
    *(("self_label", "self_label_forward", output) for output in range(5)),
    ("self_label", "self_label_backward", 0),
    *(("batch_norm", "batch_norm_forward", output) for output in range(4)),
    *(("batch_norm", "batch_norm_backward", output) for output in range(4)),
    *(("neighbors", "topk_neighbors", output) for output in range(2)),
    ("augment", "augment", 0),
]


def test_every_family_has_outputs_to_corrupt() -> None:
    assert {family for family, _, _ in WRONG} == {family.name for family in GPU_FAMILIES}


def corrupt(
    monkeypatch: pytest.MonkeyPatch, operator: str, change: Callable[[tuple[Any, ...], tuple[Any, ...]], object]
) -> None:
    """Change the results of an operator in place by calling `change` with its arguments and results."""
    right = getattr(torch.ops.scan_fast, operator)

    def wrong(*arguments: Any) -> Any:
        results = right(*arguments)
        change(arguments, results if isinstance(results, tuple) else (results,))
        return results

    monkeypatch.setattr(torch.ops.scan_fast, operator, wrong)


def change_one_value(x: torch.Tensor) -> None:
    """Change one large value by about a tenth."""
    flat = x.permute(0, 2, 3, 1).reshape(-1) if x.ndim == 4 and not x.is_contiguous() else x.view(-1)
    at = int((flat.abs() >= flat.abs().float().mean()).nonzero()[-1]) if x.is_floating_point() else flat.numel() - 1
    flat[at] = flat[at] * 1.1 + 0.01 if x.is_floating_point() else flat[at] ^ 1


@pytest.mark.parametrize(("family", "operator", "output"), WRONG)
def test_one_wrong_value_is_found(family: str, operator: str, output: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def change(arguments: tuple[Any, ...], results: tuple[Any, ...]) -> None:
        if results[output].numel():
            calls.append(operator)
            change_one_value(results[output])

    corrupt(monkeypatch, operator, change)
    if operator == "augment":
        # On the CPU the test compares a batch with single images, so only batches are corrupted here.
        monkeypatch.undo()
        corrupt(monkeypatch, operator, lambda a, r: change_one_value(r[0]) if a[0].shape[0] > 1 else None)
    result = self_test.run(family, "portable", CPU)
    assert not result.passed
    assert result.reason and result.worst >= 1


def test_nan_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt(monkeypatch, "scan_loss_backward", lambda _, results: results[1].view(-1)[3:4].fill_(float("nan")))
    result = self_test.run("scan_loss", "portable", CPU)
    assert not result.passed and result.worst == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_lost_tile_of_a_long_run_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 448 to 511 do not see the block whose rows lie near coordinate 20."""

    def change(arguments: tuple[Any, ...], results: tuple[Any, ...]) -> None:
        if results[0].shape == (3072, 96) and results[0].dtype == dtype:
            results[0][448:512, 20] = 0

    corrupt(monkeypatch, "nt_xent_backward", change)
    result = self_test.run("nt_xent", "portable", CPU)
    assert not result.passed and result.reason.startswith("gradients of 3072x96")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_lost_tile_of_a_long_sum_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of rows 448 to 511 lack the exponentials of one block, 64 of 6,144 columns."""

    def change(arguments: tuple[Any, ...], results: tuple[Any, ...]) -> None:
        if arguments[0].shape == (3072, 96) and arguments[0].dtype == dtype:
            results[0][448:512] += torch.tensor(1 - 64 / 7500).log()

    corrupt(monkeypatch, "nt_xent_forward", change)
    result = self_test.run("nt_xent", "portable", CPU)
    assert not result.passed and result.reason.startswith("losses of 3072x96")


def test_a_lost_tile_of_a_long_search_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries 512 to 639 do not see rows 1,280 to 1,407."""

    def change(arguments: tuple[Any, ...], results: tuple[Any, ...]) -> None:
        index = results[1]
        if index.shape == (6144, 40):
            tile = index[512:640]
            tile[(tile >= 1280) & (tile < 1408)] = 0

    corrupt(monkeypatch, "topk_neighbors", change)
    result = self_test.run("neighbors", "portable", CPU)
    assert not result.passed and result.reason.startswith("6144x128")


def test_errors_of_kernels_propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.ops.scan_fast, "self_label_forward", broken)
    with pytest.raises(RuntimeError, match="no kernel image"):
        self_test.run("self_label", "portable", CPU)


# ---- the caller's state ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def medium() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


STATES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "default dtype": default_dtype,
    "deterministic": deterministic,
    "medium precision": medium,
    "fake tensors": FakeTensorMode,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("family", ["augment", "batch_norm", "scan_loss", "self_label"])
def test_the_callers_state_changes_nothing(family: str, state: str) -> None:
    plain = self_test.run(family, "portable", CPU)
    with STATES[state]():
        assert self_test.run(family, "portable", CPU).worst == plain.worst
    assert plain.passed


@pytest.mark.parametrize("family", ["nt_xent", "neighbors"])
def test_the_slower_families_in_the_hardest_states(family: str) -> None:
    with medium(), torch.inference_mode(), torch.device("meta"), FakeTensorMode():
        assert self_test.run(family, "portable", CPU).passed


def test_transformations_of_functions() -> None:
    found = []

    def function(x: torch.Tensor) -> torch.Tensor:
        found.append(self_test.run("self_label", "portable", CPU).passed)
        return x.sum()

    torch.func.vmap(torch.func.grad(function))(torch.ones(3, 2))
    assert found == [True]


def test_float32_is_tested_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    corrupt(monkeypatch, "nt_xent_forward", lambda *_: seen.add(torch.get_float32_matmul_precision()))
    with medium():
        self_test.run("nt_xent", "portable", CPU)
    assert seen == {"highest"}


def test_generators_and_threads_stay_as_they_are() -> None:
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    for family in (family.name for family in GPU_FAMILIES):
        self_test.run(family, "portable", CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    counts = []
    import threading

    thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert counts == [threads]
