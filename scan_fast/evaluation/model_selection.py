"""Model selection: the SCAN loss of pairs of neighbours, to choose the best epoch and head without labels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Bounds the gathered block (heads x rows x neighbours x clusters) to 64 MiB of float32.
_ELEMENTS_PER_CHUNK = 1 << 24


@torch.no_grad()
def selection_loss(
    probabilities: Tensor, neighbors: Tensor, *, include_self: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the SCAN loss (arXiv 2005.12320, equation 2) over pairs of image and neighbour, entropy weight 1.

    The computation is in log space and in chunks of gathered rows, without an N x N matrix.

    Args:
        probabilities: (H, N, C) predictions of H heads for N images, each row summing to one; or their logarithms,
            which are recognised by negative entries. Logarithms keep the loss finite if probabilities underflow.
        neighbors: (N, k) int64 indices of each image's neighbours among the N; -1 means no neighbour.
        include_self: also count the pair of each image with itself, as the original project does.

    Returns:
        total = consistency - entropy, consistency and entropy, each (H,) float64 on the CPU. Lower totals are better.

    Raises:
        ValueError: for wrong shapes or indices, rows that are not probabilities, or if there is no pair.
    """
    log_p = _log_probabilities(probabilities)
    heads, n, clusters = log_p.shape
    total_pair_loss = torch.zeros(heads, dtype=torch.float64, device=log_p.device)
    sum_p = torch.zeros((heads, clusters), dtype=torch.float64, device=log_p.device)
    n_pairs = 0
    for own, others, present in neighbor_pairs(log_p, neighbors, include_self=include_self):
        pair_loss = -(own[:, :, None] + others).logsumexp(dim=-1)
        total_pair_loss += pair_loss.masked_fill(~present, 0).sum(dim=(1, 2), dtype=torch.float64)
        sum_p += own.exp().sum(dim=1, dtype=torch.float64)
        n_pairs += int(present.sum())
    consistency = total_pair_loss / n_pairs
    mean_p = (sum_p / n).clamp_min(1e-8)
    entropy = -(mean_p * mean_p.log()).sum(dim=1)
    consistency, entropy = consistency.cpu(), entropy.cpu()
    return consistency - entropy, consistency, entropy


@torch.no_grad()
def modularity(labels: Tensor, neighbors: Tensor, n_clusters: int) -> Tensor:
    """Compute the modularity (Newman, 2004) of partitions on the graph that links each image to its neighbours.

    It is the share of links within a cluster minus the share that is expected if links fall by the sizes of the
    clusters: 0 for a single cluster, and at most 1.

    Args:
        labels: (H, N) int64 clusters of H partitions, from 0 to ``n_clusters`` - 1.
        neighbors: (N, k) int64 indices of each image's neighbours; -1 means no neighbour.
        n_clusters: C.

    Returns:
        (H,) float64 on the CPU.

    Raises:
        ValueError: for wrong shapes or indices, or if there is no neighbour.
    """
    found = []
    for row in labels:
        links = torch.zeros(n_clusters * n_clusters, dtype=torch.int64, device=row.device)
        for own, others, present in neighbor_pairs(row[None, :, None], neighbors):
            pairs = own[0] * n_clusters + others[0, ..., 0]
            links += torch.bincount(pairs[present], minlength=len(links))
        share = links.view(n_clusters, n_clusters).double() / links.sum()
        degree = (share.sum(dim=0) + share.sum(dim=1)) / 2
        found.append(share.trace() - degree.square().sum())
    return torch.stack(found).cpu()


def neighbor_pairs(
    values: Tensor, neighbors: Tensor, *, include_self: bool = False
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Iterate over rows and those of their neighbours, in chunks of at most 64 MiB of float32.

    Args:
        values: (H, N, C) of H heads.
        neighbors: (N, k) int64 indices of each image's neighbours among the N; -1 means no neighbour.
        include_self: let each image come first among its own neighbours.

    Yields:
        For R images the values (H, R, C), those of the neighbours (H, R, k, C), and (R, k) bool, true
        if there is this neighbour; if not, its values are another image's.

    Raises:
        ValueError: for wrong shapes or indices, or if there is no pair.
    """
    heads, n, clusters = values.shape
    if neighbors.ndim != 2 or neighbors.shape[0] != n or neighbors.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"neighbors must be int64 of shape ({n}, k), got {neighbors.dtype} {tuple(neighbors.shape)}")
    neighbors = neighbors.to(values.device, torch.int64)
    if neighbors.numel() and (int(neighbors.min()) < -1 or int(neighbors.max()) >= n):
        raise ValueError(f"neighbors must be from -1 to {n - 1}, got {int(neighbors.min())} to {int(neighbors.max())}")
    if include_self:
        neighbors = torch.cat([torch.arange(n, device=values.device)[:, None], neighbors], dim=1)
    if not bool((neighbors >= 0).any()):
        raise ValueError("neighbors must hold at least one neighbour (not -1)")
    rows = max(1, _ELEMENTS_PER_CHUNK // (heads * neighbors.shape[1] * clusters))
    for start in range(0, n, rows):
        chunk = neighbors[start : start + rows]
        yield values[:, start : start + rows], values[:, chunk.clamp_min(0)], chunk >= 0


def _log_probabilities(values: Tensor) -> Tensor:
    if values.ndim != 3 or not values.is_floating_point() or 0 in values.shape:
        raise ValueError(
            f"probabilities must be floats of shape (H, N, C), none of them 0, got {values.dtype} {tuple(values.shape)}"
        )
    work = values if values.dtype == torch.float64 else values.float()
    # Clamped, so that a probability of zero has a large but finite loss.
    log_p = work if bool((work < 0).any()) else work.clamp_min(torch.finfo(work.dtype).tiny).log()
    # Rounding to 16 bits changes the sum by less than this; logits deviate more.
    error = log_p.logsumexp(dim=2).abs().amax()
    if not float(error) < 0.02:
        raise ValueError("probabilities must sum to one in each row (or be their logarithms); logits are neither")
    return log_p
