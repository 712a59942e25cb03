"""The search over rows of several ranks, against the search of all rows in one process: every bit is the same."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import answers_by_rank
from torch import Tensor

from scan_fast.evaluation.probes import knn_accuracy, sharded_knn_accuracy
from scan_fast.neighbors import topk_neighbors
from scan_fast.ops import native
from scan_fast.ops.sharded_neighbors import sharded_search, sharded_topk_neighbors

needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")
ROWS = 330
SPLITS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((ROWS,),),
    2: ((165, 165), (1, ROWS - 1), (ROWS, 0)),
    4: ((83, 83, 82, 82), (0, 200, 1, 129), (2, 0, ROWS - 2, 0)),
}
"""By number of ranks, how many of the rows each rank has. Some have none, some fewer than there are neighbours."""


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def broken() -> Tensor:
    x = normal(ROWS, 20, seed=5)
    x[::7, 0] = torch.nan
    x[3::11, 19] = torch.inf
    x[4::11, 0] = -torch.inf
    return x


def one_good() -> Tensor:
    x = torch.full((ROWS, 4), torch.nan)
    x[[70, 240]] = normal(2, 4)
    return x


DATA: dict[str, Callable[[], Tensor]] = {
    "random": lambda: normal(ROWS, 65),
    "duplicates": lambda: normal(4, 40)[torch.arange(ROWS) % 4],
    "small integers": lambda: normal(ROWS, 5).round(),
    "all equal": lambda: torch.full((ROWS, 7), 0.5),
    "zeros of both signs": lambda: normal(ROWS, 16) * (torch.arange(ROWS) % 3 == 0)[:, None],
    "broken rows": broken,
    "hardly a good row": one_good,
    "overflowing": lambda: normal(ROWS, 24) * 1e25,
}
IMPLS = ("native", "reference") if native.is_available() else ("reference",)
Lists = tuple[Tensor, Tensor]


class Case(NamedTuple):
    name: str
    k: int
    metric: str
    dtype: torch.dtype
    impl: str
    exclude_self: bool
    asked: int | None  # queries of all ranks, or None for the rows

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        x = DATA[self.name]()
        if self.asked is None:
            return x.to(self.dtype), None
        # Copies of rows, which are not left out, and others.
        queries = torch.cat([x[:3], normal(self.asked - 4, x.shape[1], seed=9), torch.full_like(x[:1], torch.nan)])
        return x.to(self.dtype), queries.to(self.dtype)

    def options(self) -> dict[str, Any]:
        return {"metric": self.metric, "impl": self.impl, "exclude_self": self.exclude_self}


CASES = [
    *(
        Case(name, 20, metric, torch.float32, IMPLS[0], True, asked)
        for name, metric, asked in itertools.product(DATA, ("cosine", "dot"), (None, 41))
    ),
    *(
        Case(name, k, "cosine", dtype, IMPLS[0], exclude_self, None)
        for (k, exclude_self), dtype, name in itertools.product(
            ((1, True), (ROWS - 1, True), (ROWS, False), (20, False)),
            (torch.float32, torch.bfloat16),
            ("random", "duplicates"),
        )
    ),
    *(
        Case(name, 20, metric, dtype, "reference", True, asked)
        for name in ("random", "duplicates", "broken rows")
        for metric, dtype, asked in (("cosine", torch.float32, None), ("dot", torch.bfloat16, 41))
    ),
    Case("broken rows", 20, "cosine", torch.float16, IMPLS[0], True, 41),
    Case("random", 20, "cosine", torch.float64, "reference", True, 41),
]
QUERIES = {1: (41,), 2: (30, 11), 4: (12, 0, 28, 1)}


def same_bits(found: Lists, expected: Lists) -> bool:
    """Return whether two results agree, the signs of zeros included."""
    bits = [pair[0].view(torch.int32) for pair in (found, expected)]
    return torch.equal(*bits) and torch.equal(found[1], expected[1]) and found[1].dtype == torch.int64


def enter(rank: int, store: str, world: int) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)


def _search_cases(rank: int, store: str, world: int, results: Any) -> None:
    enter(rank, store, world)
    different: list[str] = []
    for case in CASES:
        x, queries = case.tensors()
        whole = topk_neighbors(x, case.k, queries=queries, **case.options())
        asked = None if queries is None else queries.split(QUERIES[world])[rank]
        for counts in SPLITS[world]:
            own = x.split(counts)[rank].clone().requires_grad_()
            found = sharded_search(own, case.k, queries=asked, **case.options())
            expected = [part.split(counts if asked is None else QUERIES[world])[rank] for part in whole]
            if not same_bits((found.similarity, found.index), (expected[0], expected[1])):
                different.append(f"{case}, {counts}")
            sent = (ROWS - counts[(rank + 1) % world]) * x.shape[1] * x.element_size()
            if found.bytes_sent != sent or found.similarity.requires_grad:
                different.append(f"{case}, {counts}: {found.bytes_sent} bytes instead of {sent}")
    strided = torch.stack([normal(ROWS, 9), normal(ROWS, 9, seed=1)], 2)[:, :, 1]
    own, counts = strided.split(SPLITS[world][0])[rank], SPLITS[world][0]
    parts = [part.split(counts)[rank] for part in topk_neighbors(strided, 5)]
    if not same_bits(sharded_topk_neighbors(own, 5), (parts[0], parts[1])):
        different.append("strided rows")
    results.put((rank, len(CASES), different[:5]))
    dist.destroy_process_group()


@needs_gloo
@pytest.mark.parametrize("world", SPLITS)
def test_every_rank_finds_what_one_process_finds(world: int, tmp_path: Path) -> None:
    assert answers_by_rank(_search_cases, tmp_path, world, seconds=300) == [
        (rank, len(CASES), []) for rank in range(world)
    ]


WRONG: dict[str, tuple[Callable[[int], dict[str, Any]], str]] = {
    "k": (lambda rank: {"k": 2 + rank}, "every rank must pass the same k, got 2 on rank 0, 3 on rank 1"),
    "columns": (
        lambda rank: {"x": torch.zeros(5, 3 + rank)},
        "every rank must pass the same number of columns of x, got 3 on rank 0, 4 on rank 1",
    ),
    "dtype": (
        lambda rank: {"x": torch.zeros(5, 3, dtype=torch.float16 if rank else torch.float32)},
        "every rank must pass the same dtype, got torch.float32 on rank 0, torch.float16 on rank 1",
    ),
    "metric": (
        lambda rank: {"metric": ("cosine", "dot")[rank]},
        "every rank must pass the same metric, got cosine on rank 0, dot on rank 1",
    ),
    "exclude_self": (
        lambda rank: {"exclude_self": rank == 0},
        "every rank must pass the same exclude_self, got True on rank 0, False on rank 1",
    ),
    "queries": (
        lambda rank: {"queries": torch.zeros(2, 3) if rank else None},
        "every rank must pass the same queries, got queries=None on rank 0, queries on rank 1",
    ),
    "too many": (lambda rank: {"k": 10}, "k must be from 1 to the number of candidates, 9, got 10"),
    "none": (lambda rank: {"k": 0}, "k must be from 1 to the number of candidates, 9, got 0"),
    "huge": (lambda rank: {"k": 10**30}, "k must be from 1 to the number of candidates, 9, got"),
    "no rows": (lambda rank: {"x": torch.zeros(0, 3)}, "x must have at least one row on one of the ranks, got none"),
    "a list": (lambda rank: {"x": torch.zeros(5, 3) if rank else [1.0]}, "rank 0: x must be a tensor, got list"),
    "a vector": (
        lambda rank: {"x": torch.zeros(5, 3)[rank] if rank else torch.zeros(5, 3)},
        "rank 1: x must have two dimensions (rows, features), got shape (3,)",
    ),
    "words": (
        lambda rank: {"metric": "l2", "k": "five"} if rank else {"k": 2.0},
        'rank 0: k must be an integer, got 2.0; rank 1: metric must be "cosine" or "dot", got \'l2\'',
    ),
    "impl": (lambda rank: {"impl": "cuda" if rank else "auto"}, "rank 1: impl must be"),
    "device": (lambda rank: {"x": torch.zeros(5, 3, device="meta" if rank else "cpu")}, "rank 1: x must be on a CPU"),
}
BANK = normal(300, 6)
LABELS = torch.arange(300) % 5 - (torch.arange(300) % 11 == 0) * 9  # some are below 0
LABELS = LABELS.clamp_min(-1)
ASKED = normal(50, 6, seed=3)
ASKED_LABELS = torch.arange(50) % 6 - 1
PARTS: tuple[tuple[tuple[int, int], tuple[int, int]], ...] = (
    ((150, 150), (25, 25)),
    ((1, 299), (50, 0)),
    ((0, 300), (7, 43)),
)
KNN: tuple[dict[str, Any], ...] = ({}, {"k": 5, "temperature": 2e-3}, {"k": 1000, "temperature": 10.0})
KNN_WRONG: dict[str, tuple[Callable[[int], dict[str, Any]], str]] = {
    "k": (lambda rank: {"k": 1 + rank}, "every rank must pass the same k, got 1 on rank 0, 2 on rank 1"),
    "zero": (lambda rank: {"k": rank}, "rank 0: k must be at least 1, got 0"),
    "temperature": (
        lambda rank: {"temperature": 0.5 + rank},
        "every rank must pass the same temperature, got 0.5 on rank 0, 1.5 on rank 1",
    ),
    "no labels": (
        lambda rank: {"bank_labels": torch.full((4,), -1)},
        "bank_labels must hold at least one label (not -1)",
    ),
    "one label": (
        lambda rank: {"bank_labels": torch.tensor([-1, -1, rank - 1, -1])},
        "bank must hold at least 2 labelled images if there are no queries, got 1",
    ),
    "few labels": (lambda rank: {"bank_labels": torch.zeros(4 - rank).long()}, "rank 1: bank_labels must be integers"),
    "nothing": (lambda rank: {"bank": BANK[:4] if rank else None}, "rank 0: "),
    "queries": (
        lambda rank: {"queries": BANK[:2], "query_labels": torch.zeros(2).long()} if rank else {},
        "every rank must pass the same queries, got queries=None on rank 0, queries on rank 1",
    ),
    "unlabelled queries": (
        lambda rank: {"queries": BANK[:2], "query_labels": torch.tensor([-1, -1])},
        "query_labels must hold at least one label (not -1)",
    ),
}


def refusal(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[str, float]:
    """Return the message of the error that a call raises, and its seconds."""
    begin = time.monotonic()
    try:
        function(**arguments)
    except ValueError as error:
        return str(error), time.monotonic() - begin
    return "nothing was raised", time.monotonic() - begin


def _refusals_and_probes(rank: int, store: str, world: int, results: Any) -> None:
    enter(rank, store, world)
    refusals = [
        *(
            refusal(sharded_topk_neighbors, {"x": torch.ones(5, 3), "k": 2} | wrong(rank))
            for wrong, _ in WRONG.values()
        ),
        *(
            refusal(sharded_knn_accuracy, {"bank": BANK[:4], "bank_labels": torch.arange(4)} | wrong(rank))
            for wrong, _ in KNN_WRONG.values()
        ),
    ]
    # The group still works after the errors.
    accuracies = []
    for (rows, asked), options in itertools.product(PARTS, KNN):
        bank, labels = BANK.split(rows)[rank], LABELS.split(rows)[rank]
        queries, truth = ASKED.split(asked)[rank], ASKED_LABELS.split(asked)[rank]
        accuracies.append(sharded_knn_accuracy(bank, labels, queries, truth, **options))
        accuracies.append(sharded_knn_accuracy(bank, labels, **options))
    results.put((rank, refusals, accuracies))
    dist.destroy_process_group()


@needs_gloo
def test_all_ranks_refuse_together_and_vote_together(tmp_path: Path) -> None:
    by_rank = answers_by_rank(_refusals_and_probes, tmp_path, 2, seconds=300)
    messages = [message for _, message in (*WRONG.values(), *KNN_WRONG.values())]
    for (first, seconds), (second, others), message in zip(by_rank[0][1], by_rank[1][1], messages, strict=True):
        assert first == second and first.startswith(message) and max(seconds, others) < 10
    expected = []
    for options in KNN:
        expected.append(knn_accuracy(BANK, LABELS, ASKED, ASKED_LABELS, **options))
        expected.append(knn_accuracy(BANK, LABELS, **options))
    assert len(set(expected)) > 3
    for _, _, accuracies in by_rank:
        assert accuracies == expected * len(PARTS)


def test_without_a_group_they_are_the_plain_functions() -> None:
    x = normal(40, 5)
    assert same_bits(sharded_topk_neighbors(x, 3), topk_neighbors(x, 3))
    assert sharded_search(x, 3).bytes_sent == 0
    with pytest.raises(ValueError, match="k must be from 1 to the number of candidates, 39, got 40"):
        sharded_topk_neighbors(x, 40)
    labels = torch.arange(40) % 3
    assert sharded_knn_accuracy(x, labels, k=4) == knn_accuracy(x, labels, k=4)
