"""The measuring itself: wrong results are not timed, figures mean what they say, peers may be missing."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import ceilings, eager, environment, family, harness, memory, neighbors, nt_xent, targets
from benchmarks.ceilings import Work, limit
from benchmarks.family import Target
from benchmarks.harness import Case, Contender, Effort
from scan_fast.ops import native, reference
from scan_fast.ops.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = list(family.load_all().values())
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
    assert "not installed" in family.table(list(results.values()))


@pytest.mark.serial
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


@pytest.mark.parametrize(
    ("rate", "expected"), [(1e6, [256]), (2.0 * 1024**3, [256, 512, 1024]), (1e15, [256, 512, 1024, 2048])]
)
def test_slow_products_are_measured_at_a_smaller_size(
    rate: float, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def measured(amount: float, *_: object) -> float:
        sizes.append(round((amount / 2) ** (1 / 3)))
        return rate

    monkeypatch.setattr(ceilings, "_best_rate", measured)
    assert ceilings._product_rate(torch.float32, 2048, "cpu", 8) == rate
    assert sizes == expected


@pytest.mark.parametrize(("enough", "expected"), [(0.0, 2), (60.0, 6)])
def test_a_slow_call_is_not_repeated(enough: float, expected: int) -> None:
    calls: list[float] = []
    assert ceilings.best_seconds(lambda: calls.append(time.perf_counter()), "cpu", 5, enough) >= 0
    assert len(calls) == expected


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
@pytest.mark.parametrize("of", BENCHMARKS, ids=lambda of: of.name)
def test_every_family_measures_ours_and_eager(of: family.Family, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    size = of.quick_sizes[0]
    result = family.run_family(of, "cpu", [size], harness.QUICK, ["scan-fast", "eager"], file=file)
    assert json.loads(file.read_text()) == result
    ours, *plain = result["cases"][0]["contenders"]
    assert ours["name"] == "scan-fast" and [r["name"] for r in plain] == ["eager"] * (of.name != "augment")
    if "AMX" in ours.get("skipped", ""):
        pytest.skip(ours["skipped"])
    assert ours["seconds"] > 0 and ours["limit_seconds"] > 0 and all(r["seconds"] > 0 for r in plain)
    # Of results in bfloat16, half a unit in the last of eight bits.
    assert ours["error"] < (0.004 if of.name == "convolution" else 1e-5)


@pytest.mark.parametrize("of", BENCHMARKS, ids=lambda of: of.name)
def test_names_of_contenders_do_not_depend_on_what_is_installed(of: family.Family) -> None:
    names = [contender.name for contender in of.case(of.quick_sizes[0], "cpu").contenders]
    assert names[0] == "scan-fast" and len(set(names)) == len(names)
    on_cuda_only = {nt_xent.INF_CL, neighbors.FAISS_GPU}
    for target in (target for of_device in of.targets.values() for target in of_device):
        assert target.contender in names
        assert target.times is None or target.peer in {*names, *on_cuda_only}


@pytest.mark.parametrize("of", BENCHMARKS, ids=lambda of: of.name)
def test_every_family_has_the_sizes_that_others_ask_for(of: family.Family) -> None:
    of_family = FAMILIES[of.name]
    assert len(of.sizes["cpu"]) > 0 and set(of.memory_sizes) == set(of.sizes) == {"cpu", "cuda"}
    has_cuda = of_family.portable is not None
    assert bool(of.sizes["cuda"]) == bool(of.suite_sizes) == has_cuda
    assert not has_cuda or (len(of.suite_sizes) >= 2 and len(of.quick_sizes) >= 2)


def test_the_checked_reference_agrees_with_autograd_in_float64() -> None:
    z = [torch.randn(9, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    loss = reference.nt_xent(z[0], z[1], nt_xent.TEMPERATURE, True).mean()
    expected = (loss, *torch.autograd.grad(loss, z))
    assert harness.relative_error(nt_xent._exact(*z), expected) < 1e-12


@pytest.mark.parametrize("both", [True, False])
def test_the_oracle_of_nt_xent_is_the_reference_block_by_block(both: bool) -> None:
    z = [x.requires_grad_() for x in torch.randn(2, 37, 11, dtype=torch.float64).unbind()]
    with torch.no_grad():
        z[1][3] = 0
    upstream = torch.linspace(-1, 2, 74 if both else 37, dtype=torch.float64)
    losses = reference.nt_xent(z[0], z[1], nt_xent.TEMPERATURE, both)
    expected = (losses.detach(), *torch.autograd.grad(losses, z, upstream))
    found = nt_xent.exact_losses(z[0].detach(), z[1].detach(), upstream, both, rows_per_block=16)
    # A row of zeros has no direction; the reference differentiates its clamped length, which says nothing here.
    for ours, theirs in zip(found, expected, strict=True):
        rows = theirs.abs() < 1e6
        torch.testing.assert_close(ours[rows], theirs[rows], rtol=1e-11, atol=1e-12)


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


@pytest.mark.parametrize("peer", [neighbors.USEARCH, neighbors.SIMSIMD])
def test_peers_of_the_search_find_the_neighbors(peer: str) -> None:
    case = neighbors.case("5000x24x7", "cpu")
    contender = next(contender for contender in case.contenders if contender.name == peer)
    if contender.skipped:
        pytest.skip(contender.skipped)
    (x,) = case.inputs(0)
    assert case.error(contender.run(x), case.reference(x)) < 1e-6


FAISS_BLAS = """
import threadpoolctl, torch
from benchmarks import neighbors
torch.set_num_threads(2)
neighbors._faiss(torch.randn(50, 8), 3)
blas, = (p for p in threadpoolctl.threadpool_info() if "faiss" in p["filepath"] and p["user_api"] == "blas")
print(blas["architecture"], blas["num_threads"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_blas_of_faiss_is_that_of_the_processor() -> None:
    pytest.importorskip("threadpoolctl")
    pytest.importorskip("faiss")
    command = [sys.executable, "-c", FAISS_BLAS]
    here = {**os.environ, "OMP_NUM_THREADS": "2"}
    set_elsewhere = {"OPENBLAS_CORETYPE": "Prescott", "OPENBLAS_NUM_THREADS": "1"}
    outputs = [
        subprocess.run(command, cwd=ROOT, env={**here, **more}, capture_output=True, text=True, check=True).stdout
        for more in ({}, set_elsewhere)
    ]
    assert outputs[0] == outputs[1] and outputs[1].split()[1] == "2"


def test_the_tiled_search_is_the_plain_one() -> None:
    x = torch.randn(50, 6)
    value, index = eager.topk_neighbors(x, 5)
    tiled_value, tiled_index = eager.topk_neighbors_tiled(x, 5, query_tile=7, column_tile=9)
    torch.testing.assert_close(tiled_value, value)
    assert torch.equal(tiled_index, index)


def test_targets_are_met_by_ratio_and_by_memory() -> None:
    contenders = [{"name": "scan-fast", "seconds": 1.0, "memory_bytes": 31e6}, {"name": "eager", "seconds": 2.5}]
    faster = Target("s", times=2.2)
    assert faster.value(contenders) == 2.5 and faster.is_met(2.5) and not faster.is_met(2.1)
    smaller = Target("s", megabytes=32.0)
    assert smaller.value(contenders) == 31.0 and smaller.is_met(31.0) and not smaller.is_met(33.0)
    missing = Target("s", peer="nobody", times=1.0)
    assert missing.value(contenders) is None and not missing.is_met(None)
    quick = Target("s", microseconds=12.0)
    assert quick.value(contenders) == 1e6 and quick.is_met(12.0) and not quick.is_met(12.1)
    near = Target("s", share=0.6)
    assert near.value([{"name": "scan-fast", "of_limit": 0.7}]) == 0.7 and near.is_met(0.6) and not near.is_met(0.59)
    assert near.value(contenders) is None


def test_the_class_of_a_processor_is_that_of_its_kernels() -> None:
    builds: dict[str, dict[str, Any]] = {
        "cpu-amx": {"cpu_isa": "avx512", "cpu_amx_bf16": True},
        "cpu-avx512": {"cpu_isa": "avx512", "cpu_amx_bf16": False},
        "cpu-avx2": {"cpu_isa": "avx2", "cpu_amx_bf16": False},
        "cpu-baseline": {"error": "there is no compiled module"},
    }
    for kind, build in builds.items():
        assert environment.kind_of("cpu", build) == kind
        assert environment.kind_of("cuda", build) == "cuda"
    # A misspelt kind would be a target that nobody measures.
    of_targets = [*(of.targets for of in BENCHMARKS), targets.VIEW_TARGETS, targets.STAGE_TARGETS]
    found = {kind for kinds in of_targets for kind in kinds}
    assert found == {"cuda", "cpu-amx", "cpu-avx512", "cpu-avx2"}


def test_each_class_of_processor_has_its_own_targets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command judges by the targets of the class that it runs on, and of no other."""
    times = {"scan-fast": 1.0, "scan-fast 16-bit": 1.0, "eager": 2.4}
    contenders = [{"name": name, "seconds": seconds, "memory_bytes": 8e6} for name, seconds in times.items()]
    monkeypatch.setattr(family, "run_family", lambda *given: {"cases": [{"contenders": contenders}]})
    file = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["targets", "--device", "cpu", "--family", "nt_xent", "--json", str(file)])

    def judged(build: dict[str, Any]) -> dict[str, bool]:
        monkeypatch.setattr(native, "build_info", lambda: build)
        with pytest.raises(SystemExit) as stopped:
            targets.main()
        assert stopped.value.code == 1
        result = json.loads(file.read_text())
        assert result["environment"]["build"] == build
        return {line["target"]: line["met"] for line in result["targets"]}

    with_amx = judged({"cpu_isa": "avx512", "cpu_amx_bf16": True})
    assert with_amx["nt_xent 1024x128, scan-fast: 2.2 x eager"] and len(with_amx) == 5
    for isa in ("avx512", "avx2"):
        without = judged({"cpu_isa": isa, "cpu_amx_bf16": False})
        assert not without["nt_xent 1024x128, scan-fast: 2.5 x eager"]
        assert without["nt_xent 8192x128, scan-fast: at most 32 MB beyond inputs and gradients"]
        assert not any("16-bit" in target for target in without)
    assert "Targets of processors with AVX2" in capsys.readouterr().out
    # Nothing is measured, so nothing may pass.
    for build, options in (({"cpu_isa": "baseline"}, []), ({"cpu_isa": "avx2"}, ["--family", "augment"])):
        monkeypatch.setattr(native, "build_info", lambda build=build: build)
        monkeypatch.setattr(sys, "argv", ["targets", "--device", "cpu", *options])
        with pytest.raises(SystemExit) as stopped:
            targets.main()
        assert stopped.value.code == 2


def test_targets_of_views_read_the_kernel_alone() -> None:
    rates = {"fused": {"views_per_second": 1e6}, "fused, recipes given": {"views_per_second": 2e7}}
    result = {"results": [{"view": "simclr", "side": 32, "rates": rates}]}
    (target,) = targets.VIEW_TARGETS["cuda"]
    assert target.value(result) == 2e7 and target.is_met(2e7) and not target.is_met(9e6)
    assert target.value({"results": []}) is None and not target.is_met(None)


BLOCKED = """
import sys
class Only:
    blocked = {names}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.blocked:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Only())
import torch, scan_fast
from benchmarks import family, targets
from tools.gpu import about, cases, checks, status, step, suite, timings
family.load_all()
for name, kernels in checks.SETS:
    assert list(cases.cases_of(name, "tiny", kernels))
print(scan_fast.scan_loss(torch.zeros(2, 3), torch.zeros(2, 3))[1].item())
"""


def test_the_kernels_and_their_benchmarks_need_torch_alone() -> None:
    names = {"pydantic", "pydantic_core", "torchvision", "sklearn", "scipy", "rich", "jinja2", "PIL", "matplotlib"}
    names |= {"faiss", "lightly", "pytorch_metric_learning", "timm", "tensorboard"}
    command = [sys.executable, "-c", BLOCKED.format(names=names)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert abs(float(finished.stdout) - 1.0986123) < 1e-5
