"""Exact nearest neighbours: search a set against itself, and against queries.

Run it with ``python examples/nearest_neighbors.py``. It takes seconds.
"""

import time

import torch

from scan_fast import topk_neighbors

torch.manual_seed(0)
centers = torch.randn(200, 128)
database = centers.repeat_interleave(50, dim=0) + 0.7 * torch.randn(10_000, 128)  # 200 groups of 50 rows
group = torch.arange(10_000) // 50

# The 10 most similar rows of every row; row i is left out for query i.
begin = time.perf_counter()
similarity, index = topk_neighbors(database, k=10)
print(f"{len(index)} queries in {time.perf_counter() - begin:.2f} s")
print(f"neighbours of the same group: {(group[index] == group[:, None]).float().mean():.1%}")

# Of new rows: similarities descend, and equal ones are ordered by the smaller index.
queries = centers[:3] + 0.7 * torch.randn(3, 128)
similarity, index = topk_neighbors(database, k=5, queries=queries)
for row in range(3):
    found = ", ".join(f"{i} ({s:.2f})" for i, s in zip(index[row].tolist(), similarity[row].tolist(), strict=True))
    print(f"query {row}: {found}")

# The result is exact: the reference in plain PyTorch gives the same rows.
reference = topk_neighbors(database, k=5, queries=queries, impl="reference")
print("equal to the reference:", bool(torch.equal(index, reference[1])))
