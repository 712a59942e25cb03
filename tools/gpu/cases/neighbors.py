"""Cases of the neighbour search, which must be right in every bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import scan_fast

from . import Case, Judge, Tensors


@dataclass(frozen=True)
class Search:
    """A search: rows, dimensions, neighbours and metric; ``compared`` queries are compared with the reference."""

    rows: int
    dim: int
    k: int
    metric: str
    compared: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.dim} k={self.k} {self.metric}"

    def is_for(self, kernels: str) -> bool:
        """Return whether a kernel set is meant to take it: sm_90a has kernels for the fast search alone."""
        return kernels == "portable" or (self.k <= 1024 and 2 * self.k < self.rows)

    def inputs(self, seed: int, device: str) -> Tensors:
        """Return rows with duplicates and a NaN."""
        x = torch.randn(self.rows, self.dim, generator=torch.Generator().manual_seed(seed))
        x[self.rows // 2 : self.rows // 2 + 5] = x[0]  # duplicates: ties by index
        x[1, 0] = float("nan")
        return (x.to(device),)

    def inputs_and_queries(self, seed: int, device: str) -> Tensors:
        """Return rows as :meth:`inputs`, and half as many queries."""
        generator = torch.Generator().manual_seed(seed + 1)
        queries = torch.randn(self.rows // 2 + 1, self.dim, generator=generator)
        return (*self.inputs(seed, device), queries.to(device))

    def call(self, x: Tensor, queries: Tensor | None = None) -> Tensors:
        """Search with the kernels."""
        return self._find(x, queries, "native")

    def judge(self, inputs: Tensors) -> Judge:
        """Search with the reference: all queries, or some rows and the duplicates among them."""
        x, *queries = (y.cpu() for y in inputs)
        if queries or self.compared == self.rows:
            value, index = self._find(x, queries[0] if queries else None, "reference")
            rows = torch.arange(len(value))
        else:
            rows = torch.arange(0, self.rows, self.rows // self.compared)[: self.compared]
            rows = torch.cat([rows, self.rows // 2 + torch.arange(5)]).unique()
            # As queries, rows find themselves first or among their ties: leave them out by number.
            value, index = self._find(x, x[rows], "reference", self.k + 1)
            # A row without neighbours (NaN) does not find itself either: drop the last place.
            others = index != rows[:, None]
            others[others.all(dim=1), -1] = False
            value, index = value[others].view(-1, self.k), index[others].view(-1, self.k)

        def problem(found: Tensors) -> str:
            ours, at = (y.cpu()[rows] for y in found)
            wrong = int((at != index).sum()) + int((ours != value).sum())
            return f"{wrong} of {2 * index.numel()} values and indices differ" if wrong else ""

        return problem

    def _find(self, x: Tensor, queries: Tensor | None, impl: str, k: int | None = None) -> Tensors:
        options: dict[str, Any] = {"queries": queries, "metric": self.metric, "impl": impl}
        return scan_fast.topk_neighbors(x, k or self.k, **options)


SEARCHES = {
    "tiny": [Search(70, 9, 3, "cosine", 70), Search(40, 33, 39, "dot", 40)],
    "smoke": [Search(1000, 128, 20, "cosine", 1000), Search(20000, 128, 20, "cosine", 500)],
    # csrc/neighbors/sm90_schedule.cuh has the sizes at which rings go round: the last five.
    "full": [
        Search(70, 9, 3, "cosine", 70),
        Search(1000, 128, 20, "cosine", 1000),
        Search(3001, 70, 50, "dot", 3001),
        Search(5000, 512, 20, "cosine", 1000),
        Search(3001, 600, 20, "cosine", 1000),
        Search(20000, 64, 20, "cosine", 500),
        Search(20000, 256, 20, "dot", 500),
        Search(20000, 128, 20, "cosine", 500),
        Search(40000, 128, 20, "cosine", 1000),
    ],
}


def cases(size: str, kernels: str) -> Iterator[Case]:
    """Yield the searches of all rows among themselves, and for accuracy those with other queries."""
    for search in SEARCHES[size]:
        if search.is_for(kernels):
            yield Case(str(search), search.inputs, search.call, search.judge)
            if search.rows <= 5000:
                label, inputs = f"{search}, queries", search.inputs_and_queries
                yield Case(label, inputs, search.call, search.judge, checks=("accuracy",))
