"""Self-test of the neighbour search."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import reference
from .comparison import Finding, generator, normal, poison, same, uniform


def findings(device: torch.device) -> Iterator[Finding]:
    """Compare neighbours and similarities with the reference, in every bit."""
    for rows, dim, k, metric, others in (
        (70, 9, 3, "cosine", 0),
        (300, 70, 20, "dot", 0),
        (400, 128, 20, "cosine", 150),
        (200, 300, 10, "cosine", 0),
    ):
        g = generator()
        x = normal(g, rows, dim)
        x[rows // 2 : rows // 2 + 5] = x[0]  # duplicates: ties by index
        x[1, 0] = math.nan
        if metric == "dot":
            x = (4 * x).round()  # many ties
        queries = normal(g, others, dim) if others else x
        normalize, itself = metric == "cosine", others == 0
        exact = reference.topk_neighbors(queries, x, k, normalize, itself)
        there = x.to(device)
        asked = queries.to(device) if others else there
        poison(device, *exact)
        found = torch.ops.scan_fast.topk_neighbors(asked, there, k, normalize, itself)
        yield same(f"{rows}x{dim} k={k} {metric}", found[:2], exact)
    yield from _long(device)


def _long(device: torch.device) -> Iterator[Finding]:
    """Run many tiles per multiprocessor: 6,144 rows, whose neighbours are among 48 each, one in every 128 rows.

    Row r is near the unit vector r % 128, so rows with another remainder are far.
    """
    dim, members, k = 128, 48, 40
    rows = dim * members
    x = 0.4 / math.sqrt(dim) * (2 * uniform(generator(), rows, dim) - 1)
    every = torch.arange(rows, device="cpu")
    x[every, every % dim] += 1
    there = x.to(device)
    poison(device, x[:, :k], x[:, :k])
    similarity, index = (y.cpu() for y in torch.ops.scan_fast.topk_neighbors(there, there, k, True, True)[:2])
    some = torch.arange(0, dim, 2, device="cpu")  # every other group, all of its rows
    groups = x.double().view(members, dim, dim).transpose(0, 1)[some]
    length = groups.norm(dim=2)
    near = (groups @ groups.transpose(1, 2) / (length[:, :, None] * length[:, None])).float()
    near.diagonal(dim1=1, dim2=2).fill_(-math.inf)
    value, member = near.sort(dim=2, descending=True, stable=True)

    def of_groups(y: Tensor) -> Tensor:
        return y.view(members, dim, k).transpose(0, 1)[some]

    exact = (value[..., :k], member[..., :k] * dim + some[:, None, None])
    yield same(f"{rows}x{dim} k={k}", (of_groups(similarity), of_groups(index)), exact)
