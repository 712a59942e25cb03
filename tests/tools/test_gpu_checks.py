"""Cases and checks of the GPU suite: they cover every family, pass for right kernels and find wrong ones."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import scan_fast
from benchmarks import augment as benchmark
from scan_fast.ops import native
from scan_fast.ops.augment import augment as fused_augment
from scan_fast.ops.batch_norm import batch_norm as fused_batch_norm
from scan_fast.ops.dispatch import Impl
from tools.gpu import checks, process
from tools.gpu.cases import SIZES, augment, batch_norm, exempt, neighbors, nt_xent

needs_module = pytest.mark.skipif(not native.is_available(), reason="scan_fast._C is not built")


def test_the_kernels_that_ran_must_be_those_asked_for() -> None:
    assert checks.wrong_kernels("sm90", ["prepare<float>", "forward_sm90_kernel<8>"], "cuda") == ""
    assert "portable kernels ran" in checks.wrong_kernels("sm90", ["prepare<float>", "forward_kernel"], "cuda")
    assert "sm_90a ran" in checks.wrong_kernels("portable", ["forward_sm90_kernel<8>"], "cuda")
    assert "no kernel" in checks.wrong_kernels("portable", [], "cuda")
    assert checks.wrong_kernels("sm90", [], "cpu") == ""


def labels(check: str, family: str, kernels: str, size: str = "tiny") -> list[str]:
    return [label for label, _ in checks.bodies(check, family, kernels, "cpu", 1, size)]


@pytest.mark.parametrize(("family", "kernels"), process.SETS)
def test_every_kernel_set_has_cases_of_every_check_and_size(family: str, kernels: str) -> None:
    for check in checks.CHECKS:
        for size in SIZES:
            found = labels(check, family, kernels, size)
            assert len(found) == len(set(found))
            assert bool(found) != bool(exempt(family, check)), "cases, or a reason for none"
    assert kernels == "portable" or not any(exempt(family, check) for check in checks.CHECKS)
    assert set(labels("repeat", family, kernels)) <= set(labels("accuracy", family, kernels))


def test_the_kernels_for_sm90_are_asked_only_for_what_they_cover() -> None:
    """csrc/nt_xent/nt_xent_sm90.cu: 1,024 dimensions; csrc/neighbors: not most rows."""
    for dtype in (torch.float32, torch.bfloat16):
        assert nt_xent.covers("sm90", 1024, dtype) and not nt_xent.covers("sm90", 1025, dtype)
    assert nt_xent.covers("portable", 4096, torch.float32)
    for size in SIZES:
        searches = neighbors.SEARCHES[size]
        assert all(search.is_for("portable") for search in searches)
        assert not any(search.is_for("sm90") for search in searches if 2 * search.k >= search.rows)
    assert labels("accuracy", "neighbors", "sm90") == ["70x9 k=3 cosine", "70x9 k=3 cosine, queries"]


def test_sizes_go_round_on_a_large_gpu() -> None:
    """On 132 multiprocessors a block of the kernels for sm_90a has several tiles at the sizes of smoke and accuracy."""
    for size in ("smoke", "full"):
        # A triangle of 128 x 128 tiles over 2N rows.
        tiles = [(2 * n // 128) * (2 * n // 128 + 1) // 2 for n, _ in nt_xent.SHAPES[size]]
        assert max(tiles) >= 8 * 132
        assert max((search.rows // 128) ** 2 for search in neighbors.SEARCHES[size]) >= 8 * 132
    # A search of nearly all rows has no fast form, whose kernels alone are different on sm_90a.
    tiny = {kernels: [s.k for s in neighbors.SEARCHES["tiny"] if s.is_for(kernels)] for kernels in ("portable", "sm90")}
    assert tiny == {"portable": [3, 39], "sm90": [3]}
    assert {17, 19, 22, 111, 113} <= {side for _, _, side in augment.SHAPES["full"]}


# ---- the checks themselves -----------------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread: on shapes this small, threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problems(check: str, family: str, seed: int = 3) -> dict[str, str]:
    """Return the problems that a check finds in a family at tiny sizes, by case."""
    found = checks.bodies(check, family, "portable", "cpu", seed, "tiny")
    results = {label: checks.run_case({}, "portable", "cpu", body) for label, body in found}
    assert results
    return {label: result["problem"] for label, result in results.items() if not result["passed"]}


@needs_module
def test_the_checks_find_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    assert problems("accuracy", "scan_loss") == {}
    right = scan_fast.scan_loss

    def slightly_off(*arguments: Any, **options: Any) -> Any:
        total, consistency, entropy = right(*arguments, **options)
        return total * 1.001, consistency, entropy

    monkeypatch.setattr(scan_fast, "scan_loss", slightly_off)
    assert any("float32" in label and "allowed" in text for label, text in problems("accuracy", "scan_loss").items())

    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("an illegal memory access\nand more")

    monkeypatch.setattr(scan_fast, "scan_loss", broken)
    assert set(problems("accuracy", "scan_loss").values()) == {"RuntimeError: an illegal memory access"}


@needs_module
def test_the_checks_find_a_layer_that_forgets_its_statistics(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    assert problems("accuracy", "batch_norm", 6) == {}
    right = fused_batch_norm

    def forgets(x: torch.Tensor, *arguments: Any, impl: Impl, **options: Any) -> torch.Tensor:
        if impl == "native":
            arguments = (*arguments[:3], arguments[3].clone())
        return right(x, *arguments, impl=impl, **options)

    monkeypatch.setattr(batch_norm, "batch_norm", forgets)
    found = problems("accuracy", "batch_norm", 6)
    assert found and all("training" in label for label in found)


@needs_module
def test_the_checks_find_a_view_that_depends_on_its_batch(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    assert problems("accuracy", "augment", 4) == {}
    right = fused_augment

    def off_in_batches(images: torch.Tensor, recipes: torch.Tensor, *arguments: Any) -> torch.Tensor:
        views = right(images, recipes, *arguments)
        if len(views) > 1:
            views[1, 0, 0, 0] += 1
        return views

    monkeypatch.setattr(benchmark, "augment", off_in_batches)
    assert problems("accuracy", "augment", 4)


@needs_module
def test_a_search_of_many_rows_is_compared_on_some(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    many = neighbors.Search(900, 16, 7, "cosine", 90)
    monkeypatch.setitem(neighbors.SEARCHES, "tiny", [many])
    assert problems("accuracy", "neighbors") == {}
    right = scan_fast.topk_neighbors

    def swaps(x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        value, index = right(x, *arguments, **options)
        if options["impl"] == "native":
            index[450, :2] = index[450, [1, 0]]  # a row among the duplicates, which are always compared
        return value, index

    monkeypatch.setattr(scan_fast, "topk_neighbors", swaps)
    assert "2 of" in problems("accuracy", "neighbors")[str(many)]


@needs_module
def test_a_replay_must_follow_its_inputs(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    assert problems("graph", "neighbors", 5) == {}
    right = scan_fast.topk_neighbors
    calls = []

    def remembers(x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        calls.append(right(x, *arguments, **options))
        return calls[0] if len(calls) > 1 else calls[-1]

    monkeypatch.setattr(scan_fast, "topk_neighbors", remembers)
    assert problems("graph", "neighbors", 5)


@needs_module
def test_the_same_call_must_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    assert problems("repeat", "self_label") == {}
    right = scan_fast.self_label_loss
    calls = iter(range(1000))

    def drifts(*arguments: Any, **options: Any) -> Any:
        loss, count = right(*arguments, **options)
        return loss * (1 + 1e-6 * (next(calls) % 2)), count

    monkeypatch.setattr(scan_fast, "self_label_loss", drifts)
    assert "the same call gave other bits" in problems("repeat", "self_label").values()
