"""Exact top-k neighbours: ``python -m benchmarks.neighbors [--device cpu|cuda] [--sizes 20000x512x20 ...]``.

A size is N x D x K: the K nearest of N rows of D dimensions by cosine, for all N, self excluded. On a processor
the search uses AMX or other 16-bit products if it has them; ``SCAN_FAST_CPU_ISA=avx512`` in the environment excludes
AMX.

Results are checked on a sample of the queries against float64: the similarity of every returned pair must be right, the
k-th must be as good as the true k-th, and nobody may be their own neighbour.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import scan_fast
from scan_fast.ops import native

from . import eager, peers
from .ceilings import Work
from .family import Family, Target, main
from .harness import Case, Contender, Tensors

CHECKED_QUERIES = 512
# The algorithm of faiss's flat index on a GPU with PyTorch's kernels, whether or not faiss-gpu is installed.
FAISS_GPU = "faiss-gpu's algorithm (torch.mm + topk)"
USEARCH, SIMSIMD = "usearch, exact", "simsimd cdist + torch.topk"
# With more rows, a contender that writes all similarities to memory in float32 needs tens of seconds on any GPU.
MOST_ROWS_OF_PEERS = 300_000


def _faiss(x: Tensor, k: int) -> Tensors:
    faiss = peers.load_faiss()
    rows = F.normalize(x, dim=1).cpu().numpy()
    index = faiss.IndexFlatIP(rows.shape[1])
    if x.is_cuda:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), x.device.index or 0, index)
    index.add(rows)
    similarity, neighbor = (torch.from_numpy(result) for result in index.search(rows, k + 1))
    return _without_self(similarity, neighbor, k)


def _usearch(x: Tensor, k: int) -> Tensors:
    if not peers.missing("simsimd"):
        import simsimd  # noqa: F401  # after usearch, it would find functions of usearch's library under its own names
    from usearch.index import MetricKind, search

    rows, threads = F.normalize(x, dim=1).numpy(), torch.get_num_threads()
    found = search(rows, rows, k + 1, MetricKind.IP, exact=True, threads=threads)
    return _without_self(1 - torch.from_numpy(found.distances), torch.from_numpy(found.keys.astype(np.int64)), k)


def _simsimd(x: Tensor, k: int, rows_per_chunk: int = 4096) -> Tensors:
    """Search as eager PyTorch does, with simsimd's products."""
    import simsimd

    rows, threads = F.normalize(x, dim=1).numpy(), torch.get_num_threads()
    values, indices = [], []
    for start in range(0, len(rows), rows_per_chunk):
        chunk = rows[start : start + rows_per_chunk]
        products = simsimd.cdist(chunk, rows, "dot", threads=threads, out_dtype="float32")
        similarity = torch.from_numpy(np.asarray(products))
        similarity.diagonal(start).fill_(-torch.inf)
        value, index = similarity.topk(k, dim=1)
        values.append(value)
        indices.append(index)
    return torch.cat(values), torch.cat(indices)


def _without_self(similarity: Tensor, neighbor: Tensor, k: int) -> Tensors:
    """Drop every query itself from its k + 1 nearest, or the last of them if it is not there: the usual way."""
    itself = neighbor == torch.arange(len(neighbor))[:, None]
    itself[~itself.any(dim=1), k] = True
    return similarity[~itself].view(-1, k), neighbor[~itself].view(-1, k)


def _exact(x: Tensor, k: int) -> Tensors:
    """Return row numbers of evenly spaced queries, their k best similarities in float64, and the unit rows."""
    unit = F.normalize(x.double(), dim=1)
    queries = torch.linspace(0, x.shape[0] - 1, min(CHECKED_QUERIES, x.shape[0]), device=x.device).long().unique()
    similarity = unit[queries] @ unit.T
    similarity[torch.arange(len(queries), device=x.device), queries] = -torch.inf
    return queries, similarity.topk(k, dim=1).values, unit


def _error(ours: Tensors, exact: Tensors) -> float:
    """Return the largest absolute error of a similarity or its pair; infinite for self, repeated or invalid indices."""
    queries, best, unit = exact
    value, index = (result.to(unit.device)[queries] for result in ours)
    in_range = bool(((index >= 0) & (index < len(unit))).all())
    repeats = bool((index.sort(dim=1).values.diff(dim=1) == 0).any())
    if not in_range or repeats or bool((index == queries[:, None]).any()):
        return float("inf")
    claimed = torch.einsum("qd,qkd->qk", unit[queries], unit[index])
    error = torch.maximum((value.double() - best).abs().max(), (claimed - best).abs().max())
    return float(error.nan_to_num(nan=float("inf")))


def case(size: str, device: str) -> Case:
    """Build the case of a size such as ``20000x512x20``."""
    rows, dim, k = (int(part) for part in size.split("x"))

    def inputs(seed: int) -> Tensors:
        # Clusters with spread: neighbours of real embeddings are neither all equal nor all unrelated.
        generator = torch.Generator().manual_seed(seed)
        centers = torch.randn(100, dim, generator=generator)
        label = torch.randint(0, 100, (rows,), generator=generator)
        x = torch.empty(rows, dim).normal_(generator=generator)
        return (x.add_(centers[label]).to(device),)

    def ours(x: Tensor) -> Tensors:
        return scan_fast.topk_neighbors(x, k, impl="native")

    def plain(x: Tensor) -> Tensors:
        return eager.topk_neighbors(x, k)

    def tiled(x: Tensor) -> Tensors:
        return eager.topk_neighbors_tiled(x, k)

    def by_faiss(x: Tensor) -> Tensors:
        return _faiss(x, k)

    cuda = device == "cuda"
    # Every pair once with 16-bit operands: the search may use the symmetry. Float32 on a CPU without bfloat16.
    unit = "gemm_float16" if cuda else "gemm_bfloat16" if _searches_in_bfloat16() else "gemm_float32"
    work = Work(flops=float(rows) * rows * dim, bytes=4.0 * rows * dim + 12.0 * rows * k, unit=unit)
    no_faiss = peers.missing("faiss")
    if cuda and not no_faiss and not hasattr(peers.load_faiss(), "StandardGpuResources"):
        no_faiss = "faiss is installed without GPU support"
    too_many = f"more than {MOST_ROWS_OF_PEERS:,} rows" if rows > MOST_ROWS_OF_PEERS else ""
    contenders = [
        Contender("scan-fast", ours, 2e-6, work, skipped=peers.no_kernel("neighbors", device)),
        Contender("faiss IndexFlatIP", by_faiss, 2e-5, capturable=False, skipped=no_faiss or too_many),
        Contender("eager", plain, 2e-5, capturable=False, skipped=too_many),
    ]
    if cuda:
        contenders.append(Contender(FAISS_GPU, tiled, 2e-5, capturable=False, skipped=too_many))
    else:
        for name, search, package in ((USEARCH, _usearch, "usearch"), (SIMSIMD, _simsimd, "simsimd")):
            run = functools.partial(search, k=k)
            contenders.append(Contender(name, run, 2e-5, skipped=peers.missing(package) or too_many))
    return Case(size, inputs, lambda x: _exact(x, k), contenders, _error)


def _searches_in_bfloat16() -> bool:
    build = native.build_info()
    return bool(build.get("cpu_amx_bf16") or build.get("cpu_bf16_vectors"))


FAMILY = Family(
    name="neighbors",
    title="Exact top-k neighbours, all against all, float32 rows",
    case=case,
    sizes={
        "cpu": ("5000x128x20", "20000x128x20", "20000x512x20"),
        "cuda": ("20000x512x20", "50000x512x20", "100000x128x50", "1281167x128x50"),
    },
    quick_sizes=("500x32x5", "1000x64x20"),
    memory_sizes={"cpu": ("20000x512x20",), "cuda": ("50000x512x20",)},
    suite_sizes=("50000x512x20", "20000x512x20", "100000x128x50", "1281167x128x50"),
    targets={
        "cpu-amx": (
            Target("20000x512x20", peer="faiss IndexFlatIP", times=3.5),
            Target("20000x512x20", peer="faiss IndexFlatIP", times=1.3, without_amx=True),
        ),
        "cpu-avx512": (Target("20000x512x20", peer="faiss IndexFlatIP", times=2.5),),
        "cpu-avx2": (Target("20000x512x20", peer="faiss IndexFlatIP", times=2.5),),
        # Of an H200.
        "cuda": (
            Target("50000x512x20", microseconds=5e3),
            Target("50000x512x20", peer=FAISS_GPU, times=10.0),
            Target("1281167x128x50", microseconds=8e5),
        ),
    },
)

if __name__ == "__main__":
    main(FAMILY)
