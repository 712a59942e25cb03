"""Exact neighbours of rows that are spread over ranks: ``python -m benchmarks.sharded_search --ranks 1,2,4``.

For each number of ranks it starts that many processes on this machine's CPU. Each one draws its part of the rows, and
no other: the rows are a function of their number. It finds the neighbours of its rows
(``scan_fast.ops.sharded_neighbors``) and reports its peak of resident memory beyond what was in use before the search,
the bytes that it sent, and its seconds. ``rows_bytes`` is its part of the rows, N D b / ranks: the peak follows it, and
not N. ``bound_bytes`` is the memory that the search's docstring promises. At the end one process with all rows finds
the neighbours of a sample, which must be the same in every bit.

All ranks share the cores of one machine, so the seconds do not tell what more machines gain.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scan_fast.neighbors import topk_neighbors
from scan_fast.ops.sharded_neighbors import sharded_search

from .environment import describe
from .files import write_json
from .memory import ROOT, reset_peak, resident_memory

CHUNK = 1000
SAMPLE = 64
BYTES_PER_THREAD = 8 << 20
"""Allowed for what threads keep, and the parts that a merger takes at a time."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def rows_of(start: int, stop: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return rows ``start`` to ``stop`` of one fixed matrix of normal numbers, whoever asks for them."""
    rows = torch.empty((stop - start, columns), dtype=dtype)
    for chunk in range(start // CHUNK, -(-stop // CHUNK)):
        values = torch.randn(CHUNK, columns, generator=torch.Generator().manual_seed(chunk))
        low, high = max(start, chunk * CHUNK), min(stop, (chunk + 1) * CHUNK)
        rows[low - start : high - start] = values[low - chunk * CHUNK : high - chunk * CHUNK]
    return rows


def sampled(rows: int) -> list[int]:
    """Return the numbers of the rows whose neighbours are compared."""
    return torch.linspace(0, rows - 1, min(rows, SAMPLE)).long().unique().tolist()


def measure(options: argparse.Namespace, rank: int, ranks: int, store: Path) -> dict[str, Any]:
    """Search as one rank of a group."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    start, stop = options.rows * rank // ranks, options.rows * (rank + 1) // ranks
    # A small search loads the code and starts the threads, which are not measured.
    sharded_search(rows_of(0, 200, options.columns, DTYPES[options.dtype]), min(options.k, 20))
    x = rows_of(start, stop, options.columns, DTYPES[options.dtype])
    before = reset_peak()
    dist.barrier()
    begin = time.perf_counter()
    found = sharded_search(x, options.k)
    seconds = time.perf_counter() - begin
    peak = max(0, resident_memory("VmHWM") - before)
    own = [row for row in sampled(options.rows) if start <= row < stop]
    lists = {
        row: [found.similarity[row - start].view(torch.int32).tolist(), found.index[row - start].tolist()]
        for row in own
    }
    dist.destroy_process_group()
    return {
        "rank": rank,
        "rows": stop - start,
        "rows_bytes": x.numel() * x.element_size(),
        "lists_bytes": 12 * (stop - start) * options.k,
        "bound_bytes": bound_bytes(
            stop - start + 1, options.columns, options.k, x.element_size(), torch.get_num_threads()
        ),
        "peak_bytes": peak,
        "bytes_sent": found.bytes_sent,
        "seconds": seconds,
        "lists": lists,
    }


def run(options: argparse.Namespace, ranks: int) -> tuple[list[dict[str, Any]], dict[int, Any]]:
    """Return what each of the ranks measured, and the lists of the sample, with similarities as their bits."""
    words = [f"--{name}={getattr(options, name)}" for name in ("rows", "columns", "k", "dtype")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(ranks):
                place = [f"--measure={rank}", f"--ranks={ranks}", f"--store={folder}/store"]
                command = [sys.executable, "-m", "benchmarks.sharded_search", *words, *place]
                # Files, because a pipe that nobody reads would stop the process.
                with (folder / f"out{rank}").open("wb") as output, (folder / f"err{rank}").open("wb") as errors:
                    processes.append(subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=errors))
            _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        failed = [rank for rank, process in enumerate(processes) if process.returncode]
        if failed:
            raise RuntimeError("\n".join((folder / f"err{rank}").read_text() for rank in failed))
        results = [json.loads((folder / f"out{rank}").read_text().splitlines()[-1]) for rank in range(ranks)]
    lists = {int(row): found for result in results for row, found in result.pop("lists").items()}
    return results, lists


def bound_bytes(rows: int, columns: int, k: int, element_size: int, threads: int) -> int:
    """Return the memory that ``sharded_topk_neighbors`` documents for a rank whose queries are its rows, on the CPU."""
    own = rows * columns * element_size + 12 * rows * k + 8 * rows * (256 + 4 * k)
    other = 2 * rows * columns * element_size + 48 * rows * k
    copies = 8 * rows * columns if element_size == 2 else 0
    return max(own, other) + 4 * rows * columns + copies + threads * BYTES_PER_THREAD


def _wait(processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait until all have ended, or one has failed, without which the others would wait for ever."""
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            return
        time.sleep(0.05)


def lists_of_one_process(options: argparse.Namespace) -> dict[int, Any]:
    """Return the lists of the sample from a search among all rows in this process."""
    rows = sampled(options.rows)
    x = rows_of(0, options.rows, options.columns, DTYPES[options.dtype])
    # A given query is not left out, so there is one neighbour more: itself.
    similarity, index = topk_neighbors(x, options.k + 1, queries=x[rows])
    others = index != torch.tensor(rows)[:, None]
    kept = others & (others.cumsum(1) <= options.k)
    values, numbers = (part[kept].view(len(rows), options.k) for part in (similarity.view(torch.int32), index))
    return {row: [values[i].tolist(), numbers[i].tolist()] for i, row in enumerate(rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu",), default="cpu", help="the ranks meet on the CPU")
    parser.add_argument("--rows", type=int, default=40_000, help="of all ranks together")
    parser.add_argument("--columns", type=int, default=256)
    parser.add_argument("--k", type=int, default=20, help="neighbours per row")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--ranks", default="1,2,4", help="numbers of processes, separated by commas")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if sys.platform != "linux":
        parser.error("peak memory is read from /proc, which needs Linux")
    if not all(word.isdecimal() and int(word) > 0 for word in options.ranks.split(",")):
        parser.error(f"--ranks must be numbers from 1, separated by commas, got {options.ranks!r}")
    numbers = [int(word) for word in options.ranks.split(",")]
    if options.rows < 200 or not 1 <= options.k <= options.rows - 1:
        parser.error("--rows must be at least 200, and --k from 1 to one less than --rows")
    if options.measure is not None:
        print(json.dumps(measure(options, options.measure, numbers[0], options.store)))
        return
    measured = {ranks: run(options, ranks) for ranks in numbers}
    expected = lists_of_one_process(options)
    results = []
    for ranks, (of_ranks, lists) in measured.items():
        results.append({"ranks": ranks, "same_as_one_process": lists == expected, "by_rank": of_ranks})
        verdict = "those" if lists == expected else "NOT those"
        print(f"{ranks} ranks: the lists of {len(lists)} rows are {verdict} of one process")
        for result in of_ranks:
            print(
                f"  rank {result['rank']}: {result['rows']:,} rows of {result['rows_bytes'] / 2**20:,.1f} MiB, peak "
                f"{result['peak_bytes'] / 2**20:,.1f} MiB (bound {result['bound_bytes'] / 2**20:,.1f}), "
                f"sent {result['bytes_sent'] / 2**20:,.1f} MiB, {result['seconds']:.2f} s"
            )
    if options.json:
        settings = {name: getattr(options, name) for name in ("rows", "columns", "k", "dtype")}
        write_json(options.json, {"environment": describe("cpu"), "settings": settings, "results": results})
    if not all(result["same_as_one_process"] for result in results):
        sys.exit("a list differs from that of one process")


if __name__ == "__main__":
    main()
