"""The plain PyTorch twins of the compiled kernels: short, differentiable by autograd, on any device and dtype.

They are the definition of what the kernels compute, the fallback where no kernel exists, and the oracle in tests (in
float64). Everything is computed in float32, or in float64 for float64 inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def nt_xent(z0: Tensor, z1: Tensor, temperature: float, both_anchors: bool) -> Tensor:
    """Per-anchor NT-Xent losses (SimCLR, arXiv 2002.05709, equation 1).

    Args:
        z0: (N, D) embeddings of the first views; normalised here.
        z1: (N, D) embeddings of the second views.
        temperature: the divisor of the cosine similarities.
        both_anchors: 2N anchors (rows of z0, then of z1), or only the N rows of z0; the negatives are always all other
            2N - 2 rows.

    Returns:
        (2N,) or (N,) losses.
    """
    dtype = _compute_dtype(z0)
    unit = F.normalize(torch.cat([z0, z1]).to(dtype), dim=1)
    n = z0.shape[0]
    anchors = unit if both_anchors else unit[:n]
    with torch.autocast(device_type=z0.device.type, enabled=False):
        logits = anchors @ unit.T / temperature
    rows = torch.arange(anchors.shape[0], device=z0.device)
    positive = (rows + n) % (2 * n)
    logits = logits.masked_fill(rows[:, None] == torch.arange(2 * n, device=z0.device), -torch.inf)
    return logits.logsumexp(dim=1) - logits[rows, positive]


def scan_loss(anchors: Tensor, neighbors: Tensor, entropy_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """The SCAN loss (arXiv 2005.12320, equation 2) of H heads, in log space.

    ``-log <softmax(a), softmax(n)> = lse(a) + lse(n) - lse(a + n)`` equals the original where that is healthy, and
    keeps the gradient where the original's clamped logarithm loses it (confident rows that disagree).

    Args:
        anchors: (H, B, C) logits.
        neighbors: (H, B, C) logits.
        entropy_weight: the weight of the entropy of the mean prediction.

    Returns:
        total, consistency and entropy, each (H,), where total = consistency - entropy_weight * entropy.
    """
    dtype = _compute_dtype(anchors)
    log_p = anchors.to(dtype).log_softmax(dim=-1)
    log_q = neighbors.to(dtype).log_softmax(dim=-1)
    consistency = -(log_p + log_q).logsumexp(dim=-1).mean(dim=-1)
    mean_p = log_p.exp().mean(dim=-2).clamp_min(1e-8)
    entropy = -(mean_p * mean_p.log()).sum(dim=-1)
    return consistency - entropy_weight * entropy, consistency, entropy


def self_label_loss(weak: Tensor, strong: Tensor, threshold: float, balance: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy on confident samples (arXiv 2005.12320, section 2.3), with static shapes.

    A sample is confident where the largest weak probability is strictly above the threshold; its label is the first
    largest class. With balancing, each class that occurs among the confident samples weighs the same.

    Args:
        weak: (B, C) logits of the weakly augmented images; no gradient flows into them.
        strong: (B, C) logits of the strongly augmented images.
        threshold: in [0, 1].
        balance: whether to weigh classes equally.

    Returns:
        the loss (zero where nothing is confident) and the number of confident samples (int64).
    """
    dtype = _compute_dtype(strong)
    with torch.no_grad():
        confidence, target = weak.detach().to(dtype).softmax(dim=1).max(dim=1)
        confident = confidence > threshold
        count = confident.sum()
        weight = confident.to(dtype)
        if balance:
            per_class = torch.zeros(weak.shape[1], dtype=dtype, device=weak.device).index_add_(0, target, weight)
            weight = weight / per_class[target].clamp_min(1)
        weight = weight / weight.sum().clamp_min(torch.finfo(dtype).tiny)
    losses = F.cross_entropy(strong.to(dtype), target, reduction="none")
    # A confident row may not be dropped by multiplying with zero: an unconfident row's infinite loss must not spread.
    loss = torch.where(confident, losses * weight, torch.zeros_like(losses)).sum()
    return loss, count


def batch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> Tensor:
    """Batch normalisation (arXiv 1502.03167), addition of a residual and ReLU.

    Args:
        x: (N, C, H, W).
        residual: of its shape, or None.
        weight, bias, running_mean, running_var: (C,); the running ones are updated in place in training.
        training: normalise with the statistics of the batch.
        momentum: of the running statistics.
        eps: added to the variance.
        relu: whether to apply ReLU last.
    """
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        y = y + residual
    return F.relu(y) if relu else y


def topk_neighbors(
    queries: Tensor, database: Tensor, k: int, normalize: bool, exclude_self: bool, rows_per_chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Exact k best database rows per query, by float64 dot products rounded to float32, ties to the smaller index.

    Args:
        queries: (Q, D).
        database: (N, D).
        k: neighbours per query.
        normalize: divide each row by its length (at least 1e-12) first: cosine similarity.
        exclude_self: row i of the queries is row i of the database and is not its own neighbour.
        rows_per_chunk: queries handled at a time, which bounds the memory.

    Returns:
        similarity (Q, k) float32 and index (Q, k) int64. A pair whose similarity involves a non-finite row never
        counts; missing neighbours have index -1 and similarity -inf.
    """
    q, x = queries.detach().to(torch.float64), database.detach().to(torch.float64)
    bad_query, bad_row = ~q.isfinite().all(dim=1), ~x.isfinite().all(dim=1)
    q, x = q.masked_fill(bad_query[:, None], 0), x.masked_fill(bad_row[:, None], 0)
    q_length, x_length = (v.norm(dim=1).clamp_min(1e-12) for v in (q, x))
    similarities, indices = [], []
    for start in range(0, q.shape[0], rows_per_chunk):
        stop = min(start + rows_per_chunk, q.shape[0])
        similarity = q[start:stop] @ x.T
        if normalize:
            # Dividing after the sum keeps the exact zeros and ties of integer-valued rows.
            similarity /= q_length[start:stop, None] * x_length
        similarity = similarity.to(torch.float32)
        similarity.masked_fill_(bad_row, -torch.inf)
        similarity[bad_query[start:stop]] = -torch.inf
        if exclude_self:
            rows = torch.arange(start, stop, device=q.device)
            similarity[rows - start, rows] = -torch.inf
        # A stable sort keeps the smaller index first among equals; topk gives no such promise.
        value, index = similarity.sort(dim=1, descending=True, stable=True)
        value, index = value[:, :k], index[:, :k]
        similarities.append(value)
        indices.append(index.masked_fill(value == -torch.inf, -1))
    if not similarities:
        return queries.new_empty((0, k), dtype=torch.float32), queries.new_empty((0, k), dtype=torch.int64)
    return torch.cat(similarities), torch.cat(indices)
