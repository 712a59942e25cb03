"""Top-k neighbours: every result is checked against float64 similarities, ties included."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import scan_fast
from scan_fast.ops import native, reference
from scan_fast.ops.dispatch import Impl
from scan_fast.ops.neighbors import search

needs_native = pytest.mark.skipif(not native.is_available(), reason="the compiled module is not built")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
IMPLS = ["reference", pytest.param("native", marks=needs_native)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=generator(seed))


def integers(n: int, d: int, largest: int, seed: int = 0) -> Tensor:
    return torch.randint(-largest, largest + 1, (n, d), generator=generator(seed)).float()


class Truth(NamedTuple):
    """Valid pairs, and float32 bounds of each similarity; all (Q, N)."""

    valid: Tensor
    low: Tensor
    high: Tensor


def truth_of(x: Tensor, metric: str = "cosine", queries: Tensor | None = None) -> Truth:
    """Return all similarities from float64 products.

    The order of a float64 sum is not part of the definition. So a similarity is known only to be between two float32
    values, ``low`` and ``high``. They are equal unless the sum is within about 1e-15 of a rounding boundary.
    """
    q64 = (x if queries is None else queries).detach().cpu().double()
    x64 = x.detach().cpu().double()
    valid = q64.isfinite().all(1)[:, None] & x64.isfinite().all(1)
    q64 = torch.where(q64.isfinite().all(1, keepdim=True), q64, 0)
    x64 = torch.where(x64.isfinite().all(1, keepdim=True), x64, 0)
    exact = q64 @ x64.T
    error = q64.norm(dim=1)[:, None] * x64.norm(dim=1) * (x.shape[1] + 8) * 2.0**-52
    if all(((v == v.round()) & (v.abs() < 2**20)).all() for v in (q64, x64)):
        error = torch.zeros_like(error)  # sums of small integers are exact in any order
    if metric == "cosine":
        lengths = q64.norm(dim=1).clamp_min(1e-12)[:, None] * x64.norm(dim=1).clamp_min(1e-12)
        exact, error = exact / lengths, error / lengths + (exact / lengths).abs() * 2.0**-50
    low, high = (exact - error).float(), (exact + error).float()
    if queries is None:
        valid.fill_diagonal_(False)
    return Truth(valid & (high > -torch.inf), low, high)


def prove(
    similarity: Tensor,
    index: Tensor,
    x: Tensor,
    k: int,
    metric: str = "cosine",
    queries: Tensor | None = None,
    truth: Truth | None = None,
) -> None:
    """Check every row against all float64 similarities."""
    valid, low, high = truth or truth_of(x, metric, queries)
    similarity, index = similarity.cpu(), index.cpu()
    assert similarity.shape == index.shape == (valid.shape[0], k)
    assert similarity.dtype == torch.float32 and index.dtype == torch.int64
    present = index >= 0
    assert torch.equal(present.sum(1), valid.sum(1).clamp_max(k)), "a neighbour is missing, or there is one too many"
    assert not (present[:, 1:] & ~present[:, :-1]).any(), "gaps belong at the end"
    assert (similarity[~present] == -torch.inf).all() and (index[~present] == -1).all()
    at = index.clamp_min(0)
    assert valid.gather(1, at)[present].all(), "an excluded row was returned"
    right = (low.gather(1, at) <= similarity) & (similarity <= high.gather(1, at))
    assert right[present].all(), "a similarity is wrong"
    falling = similarity[:, :-1] > similarity[:, 1:]
    tied = similarity[:, :-1] == similarity[:, 1:]
    assert (falling | tied & (index[:, :-1] < index[:, 1:]))[present[:, 1:]].all(), "the order is wrong"
    # No excluded row may be better than the last one chosen.
    left_out = valid.clone()
    left_out[torch.arange(index.shape[0])[:, None].expand_as(index)[present], index[present]] = False
    last_value, last_index = similarity[:, -1:], index[:, -1:]
    certain_tie = (low == last_value) & (high == last_value) & (torch.arange(x.shape[0]) < last_index)
    assert not (left_out & ((low > last_value) | certain_tie)).any(), "a better neighbour was left out"


def clustered(n: int, d: int) -> Tensor:
    return normal(8, d, seed=1)[torch.arange(n) % 8] + 0.02 * normal(n, d, seed=2)


def near_tied(n: int, d: int) -> Tensor:
    """Return copies of ten rows, each entry changed by at most one unit in the last place."""
    x = normal(10, d, seed=3)[torch.arange(n) % 10]
    toward = integers(n, d, 1, seed=4) * torch.inf
    return torch.where(toward.isnan(), x, x.nextafter(toward))


def with_bad_rows(n: int, d: int) -> Tensor:
    x = normal(n, d, seed=5)
    x[::7, 0] = torch.nan
    x[3::11, d - 1] = torch.inf
    x[4::11, 0] = -torch.inf
    return x


DATA = {
    "random": lambda: normal(700, 64),
    "one column": lambda: normal(257, 1),
    "three columns": lambda: normal(600, 3),
    "odd columns": lambda: normal(300, 513),
    "clustered": lambda: clustered(900, 48),
    "duplicates": lambda: normal(4, 40)[torch.arange(1200) % 4],
    "blocks of duplicates": lambda: normal(3, 40).repeat_interleave(400, 0),
    "all equal": lambda: torch.full((500, 7), 0.3),
    "near ties": lambda: near_tied(900, 33),
    "integers": lambda: integers(700, 9, 2),
    "zeros": lambda: normal(300, 16) * (torch.arange(300) % 3 == 0)[:, None],
    "all zero": lambda: torch.zeros(200, 5),
    "broken rows": lambda: with_bad_rows(400, 20),
    "all broken": lambda: torch.full((90, 4), torch.nan),
    "one good": lambda: torch.cat([torch.full((90, 4), torch.inf), normal(1, 4)]),
    "non-negative": lambda: normal(800, 64).relu() + 0.1,
    "mixed magnitudes": lambda: normal(400, 32) * 10.0 ** integers(400, 1, 15, seed=7),
    "huge": lambda: normal(300, 24) * 1e18,
    "overflowing": lambda: normal(300, 24) * 1e25,
    "tiny": lambda: normal(300, 24) * 1e-20,
    "subnormal": lambda: normal(300, 24) * 1e-42,
    "one giant": lambda: torch.cat([normal(300, 24), 1e12 * normal(1, 24, seed=8)]),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("name", list(DATA))
def test_exact(name: str, metric: str, impl: Impl, device: str) -> None:
    x = DATA[name]().to(device)
    similarity, index = scan_fast.topk_neighbors(x, 20, metric=metric, impl=impl)
    assert similarity.device == index.device == x.device
    prove(similarity, index, x, 20, metric)


@needs_native
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_large(metric: str, device: str) -> None:
    x = torch.cat([normal(1000, 129), clustered(395, 129), torch.zeros(5, 129)]).to(device)
    truth = truth_of(x, metric)
    for k in (1, 50):
        prove(*scan_fast.topk_neighbors(x, k, metric=metric, impl="native"), x, k, metric, truth=truth)


@needs_native
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("n", [63, 64, 65, 449, 1023])
def test_a_self_search_equals_a_search_of_a_copy(n: int, metric: str, device: str) -> None:
    # A self-search multiplies each pair once and offers it to both rows; a copy of the rows is searched row by row.
    x = torch.cat([normal(n - 30, 70), clustered(30, 70)])[torch.randperm(n, generator=generator(1))].to(device)
    x[n // 2] = torch.nan
    own = search(x, 9, metric=metric, exclude_self=False, impl="native")
    copy = search(x, 9, queries=x.clone(), metric=metric, impl="native")
    assert torch.equal(own.similarity, copy.similarity) and torch.equal(own.index, copy.index)


@needs_native
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("n", [2, 3, 17, 257])
def test_every_k_up_to_all_others(n: int, metric: str, device: str) -> None:
    x = integers(n, 5, 3, seed=n).to(device)
    for k in {1, n // 3 + 1, n - 1} & set(range(n)):
        ours = scan_fast.topk_neighbors(x, k, metric=metric, impl="native")
        prove(*ours, x, k, metric)
        reference_result = scan_fast.topk_neighbors(x, k, metric=metric, impl="reference")
        assert torch.equal(ours[1], reference_result[1])
        torch.testing.assert_close(ours[0], reference_result[0], rtol=2e-7, atol=0)


@needs_native
@pytest.mark.parametrize("device", DEVICES)
def test_thousands_of_copies_are_searched_again_and_stay_exact(device: str) -> None:
    # More equal rows than any list of candidates holds: the answer is still the smallest indices.
    x = normal(2, 8)[torch.arange(21000) % 2].to(device)
    result = search(x, 20, queries=x[:3], impl="native")
    assert int(result.searched_again) == int(result.searched_exactly) == 3
    for row in range(3):
        assert torch.equal(result.index[row].cpu(), torch.arange(20) * 2 + row % 2)
    assert (result.similarity == result.similarity[0, 0]).all()


@needs_native
@pytest.mark.parametrize("device", DEVICES)
def test_easy_data_is_searched_once(device: str) -> None:
    result = search(normal(1500, 64).to(device), 20, impl="native")
    assert result.searched_again.shape == result.searched_exactly.shape == ()
    assert int(result.searched_again) == int(result.searched_exactly) == 0


@needs_native
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_tight_clusters_never_need_brute_force(metric: str, device: str) -> None:
    # Similarities differ by less than 16-bit products resolve, and there are more of them than lists hold.
    center = torch.nn.functional.normalize(normal(1, 32, seed=1), dim=1)
    x = (center + (3e-3 if metric == "cosine" else 3e-5) * normal(3000, 32, seed=2)).to(device)
    result = search(x, 10, queries=x[:200], metric=metric, impl="native")
    assert int(result.searched_exactly) == 0
    if device == "cuda":
        assert int(result.searched_again) == 200
    prove(result.similarity, result.index, x, 10, metric, queries=x[:200])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@needs_native
def test_replays_in_a_cuda_graph() -> None:
    # No step of a search depends on the host: the replay itself decides which rows need another search.
    x = normal(3000, 32).cuda()
    search(x, 10, impl="native")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = search(x, 10, impl="native")
    for make in (normal, clustered, lambda n, d: normal(2, d)[torch.arange(n) % 2], with_bad_rows):
        x.copy_(make(3000, 32))
        graph.replay()
        prove(result.similarity, result.index, x, 10)
        again = search(x, 10, impl="native")
        assert torch.equal(result.similarity, again.similarity) and torch.equal(result.index, again.index)
        assert int(result.searched_again) == int(again.searched_again)


@needs_native
@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 260),
    q=st.integers(0, 70),
    d=st.integers(1, 80),
    share=st.floats(0, 1),
    n_values=st.sampled_from([0, 1, 3]),
    metric=st.sampled_from(["cosine", "dot"]),
    seed=st.integers(0, 1000),
)
def test_any_shape(device: str, n: int, q: int, d: int, share: float, n_values: int, metric: str, seed: int) -> None:
    draw = (lambda rows, s: integers(rows, d, n_values, s)) if n_values else (lambda rows, s: normal(rows, d, s))
    x, queries = draw(n, seed).to(device), draw(q, seed + 1).to(device)
    k = 1 + int(share * (n - 1))
    prove(*scan_fast.topk_neighbors(x, k, queries=queries, metric=metric, impl="native"), x, k, metric, queries)
    if n > 1:
        k = min(k, n - 1)
        prove(*scan_fast.topk_neighbors(x, k, metric=metric, impl="native"), x, k, metric)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_queries_and_their_duplicates(impl: Impl, device: str) -> None:
    x = normal(500, 32).to(device)
    queries = torch.cat([x[7:9], normal(3, 32, seed=9).to(device), torch.full((1, 32), torch.nan, device=device)])
    similarity, index = scan_fast.topk_neighbors(x, 4, queries=queries, impl=impl)
    prove(similarity, index, x, 4, queries=queries)
    assert index[:2, 0].tolist() == [7, 8]  # given queries are not rows of x, so nothing is excluded
    # Not excluding self gives the same as asking for x explicitly.
    own = scan_fast.topk_neighbors(x, 3, exclude_self=False, impl=impl)
    assert torch.equal(own[1], scan_fast.topk_neighbors(x, 3, queries=x, impl=impl)[1])
    assert torch.equal(own[1][:, 0].cpu(), torch.arange(500))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_are_converted_to_float32(dtype: torch.dtype, impl: Impl, device: str) -> None:
    x = normal(400, 65).to(device, dtype)
    prove(*scan_fast.topk_neighbors(x, 10, impl=impl), x.float(), 10)


@needs_native
@pytest.mark.parametrize("device", DEVICES)
def test_strides_gradients_and_repetition(device: str) -> None:
    x = normal(300, 40).to(device)
    expected = scan_fast.topk_neighbors(x, 6, impl="native")
    variants = [
        x.T.contiguous().T,
        torch.stack([x, x], dim=2)[:, :, 1],
        torch.cat([x, x], dim=1)[:, 40:],
        x.clone().requires_grad_(),
        x,
    ]
    for variant in variants:
        similarity, index = scan_fast.topk_neighbors(variant, 6, impl="native")
        assert torch.equal(similarity, expected[0]) and torch.equal(index, expected[1])
        assert not similarity.requires_grad
    repeated = x[:1].expand(50, 40)
    prove(*scan_fast.topk_neighbors(repeated, 6, impl="native"), repeated, 6)


@needs_native
def test_number_of_threads_does_not_matter() -> None:
    x = torch.cat([clustered(300, 40), normal(400, 40)])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 11):
            torch.set_num_threads(count)
            results.append(scan_fast.topk_neighbors(x, 15, impl="native"))
    finally:
        torch.set_num_threads(threads)
    for similarity, index in results[1:]:
        assert torch.equal(similarity, results[0][0]) and torch.equal(index, results[0][1])


def digests() -> dict[str, str]:
    """Return hashes of the results on all data, to compare with child processes of other instruction sets."""
    found = {}
    for name, make in DATA.items():
        for metric in ("cosine", "dot"):
            similarity, index = scan_fast.topk_neighbors(make(), 20, metric=metric, impl="native")
            found[f"{name}, {metric}"] = hashlib.sha256(
                similarity.numpy().tobytes() + index.numpy().tobytes()
            ).hexdigest()
    return found


@needs_native
def test_every_instruction_set_gives_the_same_bits() -> None:
    # "avx512" is AVX-512 without AMX. If the CPU lacks an instruction set, the child uses the best available one.
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    wanted: tuple[tuple[str, dict[str, str]], ...] = (
        ("avx512", {}),
        ("avx512", {"SCAN_FAST_CPU_VNNI": "0"}),
        ("avx512", {"SCAN_FAST_CPU_VNNI": "0", "SCAN_FAST_CPU_BF16": "0"}),
        ("avx2", {}),
        ("baseline", {}),
    )
    children = [
        (
            isa,
            subprocess.Popen(
                [sys.executable, __file__],
                env={**os.environ, "SCAN_FAST_CPU_ISA": isa, **paths, **without},
                stdout=subprocess.PIPE,
                text=True,
            ),
        )
        for isa, without in wanted
    ]
    expected = digests()
    for isa, child in children:
        output, _ = child.communicate()
        assert child.returncode == 0
        found = json.loads(output)
        if native.build_info()["cpu_isa"] == "avx512":
            assert found["isa"] == isa
        assert found["digests"] == expected


@pytest.mark.parametrize("impl", IMPLS)
def test_agrees_with_faiss(impl: Impl) -> None:
    faiss = pytest.importorskip("faiss")
    x = torch.nn.functional.normalize(normal(1000, 32), dim=1)
    searcher = faiss.IndexFlatIP(32)
    searcher.add(x.numpy())
    theirs, at = searcher.search(x.numpy(), 11)
    similarity, index = scan_fast.topk_neighbors(x, 10, metric="dot", impl=impl)
    np.testing.assert_allclose(similarity.numpy(), theirs[:, 1:], atol=1e-6)
    separated = np.abs(np.diff(theirs, axis=1)).min(axis=1) > 1e-5
    assert separated.sum() > 500
    # Rank 10 would need the gap to their twelfth; ranks 1 to 9 are safe if all gaps are wide.
    assert (index.numpy()[separated, :9] == at[separated, 1:10]).all()


@needs_native
@pytest.mark.parametrize("device", DEVICES)
def test_operator_registration(device: str) -> None:
    x = normal(40, 12).to(device)
    operator = torch.ops.scan_fast.topk_neighbors.default
    for arguments in [(x, x, 5, True, True), (x[:7], x, 40, False, False), (x[:0], x, 2, True, False)]:
        torch.library.opcheck(operator, arguments)
    with pytest.raises(ValueError, match="k must be from 1"):
        operator(x, x, 41, True, False)
    with pytest.raises(ValueError, match="queries and database"):
        operator(x[:, :3], x, 4, True, False)
    with pytest.raises(ValueError, match="first rows"):
        operator(x, x[:7], 4, True, True)


@needs_native
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_graph_break(device: str) -> None:
    def model(x: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        similarity, index = scan_fast.topk_neighbors(x * 2, 4, queries=queries)
        return similarity + 1, x[index].mean(dim=1)

    x, queries = normal(60, 8).to(device), normal(9, 8, seed=2).to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(x, queries), model(x, queries), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_queries(impl: Impl) -> None:
    similarity, index = scan_fast.topk_neighbors(normal(5, 3), 2, queries=torch.empty(0, 3), impl=impl)
    assert similarity.shape == index.shape == (0, 2)
    assert similarity.dtype == torch.float32 and index.dtype == torch.int64


def test_float64_runs_through_the_reference() -> None:
    x = normal(50, 6).double()
    prove(*scan_fast.topk_neighbors(x, 5), x, 5)
    with pytest.raises(ValueError, match="native"):
        scan_fast.topk_neighbors(x, 5, impl="native")


def test_reference_chunks_do_not_matter() -> None:
    x = integers(90, 4, 2)
    whole = reference.topk_neighbors(x, x, 7, True, True)
    for found, expected in zip(reference.topk_neighbors(x, x, 7, True, True, rows_per_chunk=13), whole, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(5)}, r"x must have two dimensions .* got shape \(5,\)"),
        ({"x": [[1.0]]}, "x must be a tensor, got list"),
        ({"x": torch.zeros(5, 3, dtype=torch.int64)}, "x must be float32.* got torch.int64"),
        ({"x": torch.zeros(0, 3)}, "at least one row"),
        ({"x": torch.zeros(5, 0)}, "at least one column"),
        ({"k": 0}, "k must be from 1 to the number of candidates, 4, got 0"),
        ({"k": 5}, "k must be from 1 to the number of candidates, 4, got 5"),
        ({"k": 6, "queries": torch.zeros(2, 3)}, "candidates, 5, got 6"),
        ({"k": 6, "exclude_self": False}, "candidates, 5, got 6"),
        ({"k": 2.0}, "k must be an integer, got 2.0"),
        ({"k": True}, "k must be an integer, got True"),
        ({"metric": "l2"}, "metric must be .* got 'l2'"),
        ({"impl": "cuda"}, "impl must be .* got 'cuda'"),
        ({"queries": torch.zeros(2, 4)}, r"queries must have 3 columns like x, got shape \(2, 4\)"),
        ({"queries": torch.zeros(3)}, "queries must have two dimensions"),
        ({"queries": torch.zeros(2, 3, dtype=torch.float16)}, "queries must have the dtype of x"),
        ({"queries": torch.zeros(2, 3, device="meta")}, "queries must be on the device of x, cpu, got meta"),
    ],
)
def test_wrong_input_raises(arguments: dict[str, object], message: str) -> None:
    full: dict[str, object] = {"x": torch.zeros(5, 3), "k": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        scan_fast.topk_neighbors(**full)  # type: ignore[arg-type]


if __name__ == "__main__":
    print(json.dumps({"isa": native.build_info()["cpu_isa"], "digests": digests()}))
