"""The measuring itself: wrong results are not timed, figures mean what they say, peers may be missing."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import (
    batch_norm,
    convolution,
    eager,
    harness,
    memory,
    neighbors,
    nt_xent,
    scan_loss,
    self_label,
    targets,
)
from benchmarks.ceilings import Work, limit
from benchmarks.harness import Case, Contender, Effort
from scan_fast.ops import native, reference
from tools.docs import benchmarks as pages

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = [module.FAMILY for module in (nt_xent, scan_loss, self_label, neighbors, batch_norm, convolution)]
BRIEF = Effort(rounds=5, sample_seconds=1e-4, case_seconds=5, least_rounds=5)
CEILINGS = {"gemm_float32": 1e12, "gemm_bfloat16": 4e12, "copy_bytes": 1e10}


def double(x: Tensor) -> tuple[Tensor, ...]:
    return (2 * x,)


def case_of(*contenders: Contender) -> Case:
    return Case("case", lambda seed: (torch.full((3,), seed + 1.0),), lambda x: (2 * x.double(),), contenders)


def measured(*contenders: Contender) -> dict[str, dict[str, Any]]:
    return {r["name"]: r for r in harness.measure(case_of(*contenders), "cpu", BRIEF, CEILINGS)}


def test_a_wrong_or_broken_contender_is_not_timed() -> None:
    def broken(x: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("out of luck\nmore")

    results = measured(
        Contender("right", double, 1e-6),
        Contender("wrong", lambda x: (2.1 * x,), 1e-2),
        Contender("nan", lambda x: (x * float("nan"),), 1e9),
        Contender("broken", broken, 1e-6),
        Contender("shape", lambda x: (x[:1],), 1e9),
        Contender("absent", double, 1e-6, skipped="not installed"),
    )
    assert "seconds" in results["right"]
    assert all("seconds" not in results[name] for name in ("wrong", "nan", "broken", "shape", "absent"))
    assert results["wrong"]["failed"].startswith("wrong: error 5.0e-02")
    assert results["broken"]["failed"] == "RuntimeError: out of luck"
    assert results["absent"]["skipped"] == "not installed"
    assert "not installed" in harness.table(list(results.values()))


def test_medians_tell_a_slow_contender_from_a_fast_one() -> None:
    def slow(x: Tensor) -> tuple[Tensor, ...]:
        time.sleep(0.01)
        return double(x)

    results = measured(Contender("fast", double, 1e-6), Contender("slow", slow, 1e-6))
    assert 0.01 <= results["slow"]["seconds"] < 0.1
    assert results["fast"]["seconds"] < results["slow"]["seconds"]
    assert results["slow"]["seconds_p10"] <= results["slow"]["seconds"] <= results["slow"]["seconds_p90"]
    assert results["slow"]["rounds"] == 5


def test_every_round_runs_every_contender_and_starts_elsewhere() -> None:
    class Recorded:
        def __init__(self, name: str) -> None:
            self.name = name

        def sample(self) -> None:
            order.append(self.name)

    order: list[str] = []
    timers: Any = [Recorded(name) for name in "abc"]
    harness._run_rounds(timers, Effort(rounds=4))
    assert "".join(order) == "abcbcacababc"


def test_the_limit_is_the_longest_of_what_must_be_done() -> None:
    assert limit(Work(flops=1e12, bytes=1e9), CEILINGS) == (1.0, "products")
    assert limit(Work(flops=1e12, bytes=1e9, unit="gemm_bfloat16"), CEILINGS) == (0.25, "products")
    assert limit(Work(flops=1e9, bytes=1e10, exponentials=1e30), CEILINGS) == (1.0, "memory")
    assert limit(Work(flops=0, bytes=0, exponentials=2e12), CEILINGS | {"exp": 1e12}) == (2.0, "exponentials")


def test_precision_holds_only_while_a_contender_runs() -> None:
    seen = []

    def run(x: Tensor) -> tuple[Tensor, ...]:
        seen.append(torch.get_float32_matmul_precision())
        return double(x)

    before = torch.get_float32_matmul_precision()
    measured(Contender("medium", run, 1e-6, precision="medium"))
    assert set(seen) == {"medium"}
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_beyond_counts_temporaries_and_not_outputs() -> None:
    # Eager NT-Xent holds several (2N, 2N) matrices of 16 MiB; the gradients are 1 MiB and do not count.
    peak = memory.peak_beyond("nt_xent", "2048x128", "eager", "cpu")
    assert peak is not None
    matrix = 4 * 2048 * 2048
    assert 2 * matrix < peak < 8 * matrix


@pytest.mark.skipif(not native.is_available(), reason="scan_fast._C is not built")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_measures_ours_and_eager(family: harness.Family, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    size = family.quick_sizes[0]
    result = harness.run_family(family, "cpu", [size], harness.QUICK, ["scan-fast", "eager"], file=file)
    assert json.loads(file.read_text()) == result
    ours, plain = result["cases"][0]["contenders"]
    assert (ours["name"], plain["name"]) == ("scan-fast", "eager")
    if "AMX" in ours.get("skipped", ""):
        pytest.skip(ours["skipped"])
    assert ours["seconds"] > 0 and plain["seconds"] > 0 and ours["limit_seconds"] > 0
    # Of results in bfloat16, half a unit in the last of eight bits.
    assert ours["error"] < (0.004 if family is convolution.FAMILY else 1e-5)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_names_of_contenders_do_not_depend_on_what_is_installed(family: harness.Family) -> None:
    names = [contender.name for contender in family.case(family.quick_sizes[0], "cpu").contenders]
    assert names[0] == "scan-fast" and "eager" in names and len(set(names)) == len(names)
    for target in (*targets.CPU_TARGETS, *targets.CUDA_TARGETS):
        if target.family == family.name:
            on_cuda_only = {nt_xent.INF_CL, neighbors.FAISS_GPU}
            assert {target.contender, target.peer} <= {*names, *on_cuda_only}


def test_the_checked_reference_agrees_with_autograd_in_float64() -> None:
    z = [torch.randn(9, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    loss = reference.nt_xent(*z, nt_xent.TEMPERATURE, True).mean()
    expected = (loss, *torch.autograd.grad(loss, z))
    assert harness.relative_error(nt_xent._exact(*z), expected) < 1e-12


def test_the_neighbor_check_rejects_what_is_not_a_nearest_neighbor() -> None:
    case = neighbors.case("60x8x4", "cpu")
    (x,) = case.inputs(0)
    exact = case.reference(x)
    value, index = eager.topk_neighbors(x, 4)
    assert case.error((value, index), exact) < 1e-6
    itself = index.clone()
    itself[0, 0] = 0
    repeated = index.clone()
    repeated[:, 1] = repeated[:, 0]
    worse = index.clone()
    worse[3, 3] = int(eager.topk_neighbors(x, 20)[1][3, 19])
    assert case.error((value, itself), exact) == float("inf")
    assert case.error((value, repeated), exact) == float("inf")
    assert case.error((value, worse), exact) > 1e-3
    assert case.error((value + 1e-3, index), exact) > 9e-4


def test_the_tiled_search_is_the_plain_one() -> None:
    x = torch.randn(50, 6)
    value, index = eager.topk_neighbors(x, 5)
    tiled_value, tiled_index = eager.topk_neighbors_tiled(x, 5, query_tile=7, column_tile=9)
    torch.testing.assert_close(tiled_value, value)
    assert torch.equal(tiled_index, index)


def test_targets_are_met_by_ratio_and_by_memory() -> None:
    contenders = [{"name": "scan-fast", "seconds": 1.0, "memory_bytes": 31e6}, {"name": "eager", "seconds": 2.5}]
    faster = targets.Target("f", "s", times=2.2)
    assert faster.value(contenders) == 2.5 and faster.is_met(2.5) and not faster.is_met(2.1)
    smaller = targets.Target("f", "s", megabytes=32.0)
    assert smaller.value(contenders) == 31.0 and smaller.is_met(31.0) and not smaller.is_met(33.0)
    missing = targets.Target("f", "s", peer="nobody", times=1.0)
    assert missing.value(contenders) is None and not missing.is_met(None)
    quick = targets.Target("f", "s", microseconds=12.0)
    assert quick.value(contenders) == 1e6 and quick.is_met(12.0) and not quick.is_met(12.1)
    near = targets.Target("f", "s", share=0.6)
    assert near.value([{"name": "scan-fast", "of_limit": 0.7}]) == 0.7 and near.is_met(0.6) and not near.is_met(0.59)
    assert near.value(contenders) is None


def test_targets_of_views_read_the_kernel_alone() -> None:
    rates = {"fused": {"views_per_second": 1e6}, "fused, recipes given": {"views_per_second": 2e7}}
    result = {"results": [{"view": "simclr", "side": 32, "rates": rates}]}
    (target,) = targets.VIEW_TARGETS["cuda"]
    assert target.value(result) == 2e7 and target.is_met(2e7) and not target.is_met(9e6)
    assert target.value({"results": []}) is None and not target.is_met(None)


def result_file(folder: Path, **changes: Any) -> None:
    entry = {"error": 0.0, "seconds_p10": 1e-3, "seconds_p90": 3e-3, "rounds": 5}
    ours = entry | {"name": "scan-fast", "seconds": 1e-3, "limit_seconds": 5e-4, "of_limit": 0.5, "bound": "memory"}
    plain = entry | {"name": "eager", "seconds": 2e-3, "memory_bytes": 3 * 2**20}
    absent = {"name": "peer", "skipped": "not | installed"}
    environment = {"device": "a CPU", "threads": 2, "torch": "9", "commit": "abc"}
    result = {
        "benchmark": "scan_loss",
        "title": "SCAN",
        "device": "cpu",
        "environment": environment,
        "ceilings": CEILINGS,
        "quick": False,
        "cases": [{"size": size, "contenders": [ours, plain, absent]} for size in ("8x2", "9x3")],
    }
    (folder / "cpu-scan_loss.json").write_text(json.dumps(result | changes))


def test_the_report_shows_what_the_files_say(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    result_file(tmp_path)
    pages.write(tmp_path, page)
    text = page.read_text()
    assert "| scan-fast | 1 ms | 1 ms - 3 ms | 2.00 | 50% (memory) |  |" in text
    assert "| eager | 2 ms | 1 ms - 3 ms | 1.00 |  | 3.0 MiB |" in text
    assert "not / installed" in text
    picture = page.parent / "benchmarks" / "cpu-scan_loss.svg"
    assert "(benchmarks/cpu-scan_loss.svg)" in text
    drawn = picture.read_bytes()
    pages.write(tmp_path, page)
    assert picture.read_bytes() == drawn
    result_file(tmp_path, quick=True)
    with pytest.raises(SystemExit, match="--quick"):
        pages.write(tmp_path, page)


def test_the_committed_page_shows_the_committed_results(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    pages.write(pages.RESULTS, page)
    assert page.read_text() == pages.PAGE.read_text()


BLOCKED = """
import sys
class Only:
    blocked = {names}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.blocked:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Only())
import torch, scan_fast
from benchmarks import batch_norm
from tools.gpu import about, checks, status, step, suite, timings
from benchmarks import neighbors, nt_xent, scan_loss, self_label, targets
print(scan_fast.scan_loss(torch.zeros(2, 3), torch.zeros(2, 3))[1].item())
"""


def test_the_kernels_and_their_benchmarks_need_torch_alone() -> None:
    names = {"pydantic", "pydantic_core", "torchvision", "sklearn", "scipy", "rich", "jinja2", "PIL", "matplotlib"}
    names |= {"faiss", "lightly", "pytorch_metric_learning", "timm", "tensorboard"}
    command = [sys.executable, "-c", BLOCKED.format(names=names)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert abs(float(finished.stdout) - 1.0986123) < 1e-5
