"""The operations in plain PyTorch, as training code usually writes them: the baseline of all comparisons.

They are not tuned against this project: a matrix of logits, a mask, a cross-entropy. The SCAN loss follows the paper's
formulation (probabilities, a clamped logarithm, one head after the other), not the log-space form of this package.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(z0: Tensor, z1: Tensor, temperature: float, anchors: str = "both") -> Tensor:
    """Return the mean SimCLR loss of (N, D) embeddings, computed from the (2N, 2N) matrix of logits.

    With ``anchors="first"`` only the rows of ``z0`` are anchors, as in the SCAN paper's code; the matrix is (N, 2N).
    """
    n = z0.shape[0]
    z = F.normalize(torch.cat([z0, z1]), dim=1)
    rows = 2 * n if anchors == "both" else n
    logits = z[:rows] @ z.T / temperature
    self_pairs = torch.eye(rows, 2 * n, dtype=torch.bool, device=z.device)
    logits = logits.masked_fill(self_pairs, -torch.inf)
    target = torch.arange(2 * n, device=z.device).roll(n)[:rows]
    return F.cross_entropy(logits, target)


def scan_loss(anchors: Tensor, neighbors: Tensor, entropy_weight: float) -> Tensor:
    """Return the SCAN loss of (B, C) logits, or its sum over the heads of (H, B, C) logits."""
    if anchors.ndim == 3:
        heads = [scan_loss(a, n, entropy_weight) for a, n in zip(anchors, neighbors, strict=True)]
        return torch.stack(heads).sum()
    p, q = anchors.softmax(dim=1), neighbors.softmax(dim=1)
    agreement = (p * q).sum(dim=1)
    consistency = F.binary_cross_entropy(agreement, torch.ones_like(agreement))
    mean = p.mean(dim=0).clamp(min=1e-8)
    entropy = -(mean * mean.log()).sum()
    return consistency - entropy_weight * entropy


def self_label_loss(weak: Tensor, strong: Tensor, threshold: float, balance: bool = True) -> Tensor:
    """Return the cross-entropy, class-balanced or not, of the rows whose weak prediction is confident; at least one."""
    confidence, label = weak.detach().softmax(dim=1).max(dim=1)
    confident = confidence > threshold
    target = label[confident]
    if not balance:
        return F.cross_entropy(strong[confident], target)
    present, count = target.unique(return_counts=True)
    weight = torch.zeros(weak.shape[1], dtype=strong.dtype, device=weak.device)
    weight[present] = target.numel() / count.to(strong.dtype)
    return F.cross_entropy(strong[confident], target, weight=weight)


def topk_neighbors(x: Tensor, k: int, rows_per_chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Return cosine neighbours by matrix product and torch.topk, a chunk of queries at a time, self masked out."""
    x = F.normalize(x, dim=1)
    values, indices = [], []
    for start in range(0, x.shape[0], rows_per_chunk):
        similarity = x[start : start + rows_per_chunk] @ x.T
        similarity.diagonal(start).fill_(-torch.inf)
        value, index = similarity.topk(k, dim=1)
        values.append(value)
        indices.append(index)
    return torch.cat(values), torch.cat(indices)


def topk_neighbors_tiled(x: Tensor, k: int, query_tile: int = 512, column_tile: int = 262_144) -> tuple[Tensor, Tensor]:
    """Search as faiss's flat GPU index, with PyTorch's kernels: float32 tiles, their top k, a merge of tiles."""
    x = F.normalize(x, dim=1)
    values, indices = [], []
    for start in range(0, x.shape[0], query_tile):
        stop = min(start + query_tile, x.shape[0])
        rows = torch.arange(start, stop, device=x.device)
        best: list[tuple[Tensor, Tensor]] = []
        for first in range(0, x.shape[0], column_tile):
            tile = x[start:stop] @ x[first : first + column_tile].T
            inside = (rows >= first) & (rows < first + tile.shape[1])
            tile.masked_fill_(
                inside[:, None] & (rows[:, None] == first + torch.arange(tile.shape[1], device=x.device)), -torch.inf
            )
            value, index = tile.topk(min(k, tile.shape[1]), dim=1)
            best.append((value, index + first))
        value, position = torch.cat([value for value, _ in best], dim=1).topk(k, dim=1)
        values.append(value)
        indices.append(torch.cat([index for _, index in best], dim=1).gather(1, position))
    return torch.cat(values), torch.cat(indices)
