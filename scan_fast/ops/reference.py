"""Plain PyTorch implementations of what the compiled kernels compute, differentiable, for any device and dtype.

They define the result of the kernels, serve as fallback if there is no kernel, and are the oracle of the tests (in
float64). They compute in float32, or in float64 for float64 inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def nt_xent(z0: Tensor, z1: Tensor, temperature: float, both_anchors: bool, queue: Tensor | None = None) -> Tensor:
    """Compute NT-Xent losses per anchor (SimCLR, arXiv 2002.05709, equation 1).

    Args:
        z0: (N, D) embeddings of the first views; need not be normalised.
        z1: (N, D) embeddings of the second views.
        temperature: divisor of the cosine similarities.
        both_anchors: True for 2N anchors (rows of z0, then of z1), False for the N rows of z0. The negatives are always
            all other 2N - 2 rows.
        queue: (Q, D) further negatives of every anchor (MoCo, arXiv 1911.05722); no gradient flows into them.

    Returns:
        (2N,) or (N,) losses.
    """
    dtype = _compute_dtype(z0)
    unit = F.normalize(torch.cat([z0, z1]).to(dtype), dim=1)
    n = z0.shape[0]
    anchors = unit if both_anchors else unit[:n]
    columns = unit if queue is None else torch.cat([unit, F.normalize(queue.detach().to(dtype), dim=1)])
    with torch.autocast(device_type=z0.device.type, enabled=False):
        logits = anchors @ columns.T / temperature
    rows = torch.arange(anchors.shape[0], device=z0.device)
    positive = (rows + n) % (2 * n)
    logits = logits.masked_fill(rows[:, None] == torch.arange(len(columns), device=z0.device), -torch.inf)
    return logits.logsumexp(dim=1) - logits[rows, positive]


def scan_loss(anchors: Tensor, neighbors: Tensor, entropy_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the SCAN loss (arXiv 2005.12320, equation 2) of H heads, in log space.

    ``-log <softmax(a), softmax(n)> = lse(a) + lse(n) - lse(a + n)`` equals the original formula except for confident
    rows that disagree. The original takes a binary cross-entropy of the similarity s, whose backward pass in PyTorch
    divides by max(s (1 - s), 1e-12): the gradient vanishes with s below 1e-12. This form keeps it.

    Args:
        anchors: (H, B, C) logits.
        neighbors: (H, B, C) logits.
        entropy_weight: weight of the entropy of the mean prediction.

    Returns:
        total, consistency and entropy, each (H,), with total = consistency - entropy_weight * entropy.
    """
    consistency, mean_p = scan_loss_means(anchors, neighbors)
    entropy = scan_loss_entropy(mean_p)
    return consistency - entropy_weight * entropy, consistency, entropy


def scan_loss_means(anchors: Tensor, neighbors: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the consistency (H,) and the mean anchor prediction (H, C) of logits (H, B, C)."""
    dtype = _compute_dtype(anchors)
    log_p = anchors.to(dtype).log_softmax(dim=-1)
    log_q = neighbors.to(dtype).log_softmax(dim=-1)
    consistency = -(log_p + log_q).logsumexp(dim=-1).mean(dim=-1)
    return consistency, log_p.exp().mean(dim=-2)


def scan_loss_entropy(mean_p: Tensor) -> Tensor:
    """Compute the entropy of mean predictions (..., C), each of which counts as at least 1e-8."""
    bounded = mean_p.clamp_min(1e-8)
    return -(bounded * bounded.log()).sum(dim=-1)


def self_label_loss(weak: Tensor, strong: Tensor, threshold: float, balance: bool) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy on confident samples (arXiv 2005.12320, section 2.3), with static shapes.

    A sample is confident if its largest weak probability is strictly above the threshold. Its label is the first
    largest class. With balancing, each class that occurs among the confident samples has the same weight.

    Args:
        weak: (B, C) logits of the weakly augmented images; no gradient flows into them.
        strong: (B, C) logits of the strongly augmented images.
        threshold: in [0, 1].
        balance: weight classes equally.

    Returns:
        the loss (zero if no sample is confident) and the number of confident samples (int64).
    """
    confident, target = confident_rows(weak, threshold)
    counts = confident_per_class(confident, target, weak.shape[1]).to(_compute_dtype(strong))
    weight = self_label_weights(counts, balance)
    return self_label_sum(strong, confident, target, weight), confident.sum()


@torch.no_grad()
def confident_rows(weak: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return for logits (B, C) which rows are confident (B,) bool, and the first largest class of each (B,) int64."""
    confidence, target = weak.detach().to(_compute_dtype(weak)).softmax(dim=1).max(dim=1)
    return confidence > threshold, target


def confident_per_class(confident: Tensor, target: Tensor, classes: int) -> Tensor:
    """Return the number of confident rows of each class, (C,) float32, exact up to 2^24 rows."""
    counts = torch.zeros(classes, dtype=torch.float32, device=confident.device)
    return counts.index_add_(0, target, confident.float())


def self_label_weights(counts: Tensor, balance: bool) -> Tensor:
    """Return the weight of a confident row of each class, (C,), from the numbers of confident rows (C,)."""
    if not balance:
        return counts.sum().clamp_min(1).reciprocal().expand_as(counts)
    return (counts.clamp_min(1) * (counts > 0).sum().clamp_min(1)).reciprocal()


def self_label_sum(strong: Tensor, confident: Tensor, target: Tensor, class_weight: Tensor) -> Tensor:
    """Return the sum of the cross-entropies of the confident rows, each with the weight of its class."""
    losses = F.cross_entropy(strong.to(_compute_dtype(strong)), target, reduction="none")
    # Select, do not multiply by zero: the loss of a row that is not confident may be infinite.
    return torch.where(confident, losses * class_weight[target], torch.zeros_like(losses)).sum()


SIGREG_SPACING = 2 / 3
"""Spacing of the ten points from -3 to 3 at which SIGReg compares characteristic functions."""
SIGREG_POINTS = tuple((2 * k + 1) * SIGREG_SPACING / 2 for k in range(5))
"""The positive points, odd multiples of the first. The integrand is even."""


def sigreg(z: Tensor, directions: Tensor) -> Tensor:
    """Compute SIGReg (LeJEPA, arXiv 2511.08544): the distance of projections from a standard normal distribution.

    For each direction, the characteristic function phi of the batch's projections is compared with that of the normal
    distribution: the integral of exp(-t^2 / 2) |phi(t) - exp(-t^2 / 2)|^2 over t (Epps and Pulley, 1983).

    Args:
        z: (B, D) embeddings, not normalised.
        directions: (K, D) directions of length one.

    Returns:
        The mean over the directions, a scalar.
    """
    dtype = _compute_dtype(z)
    projections = z.to(dtype) @ directions.to(dtype).T
    angles = torch.tensor(SIGREG_POINTS, dtype=dtype, device=z.device)[:, None, None] * projections
    return sigreg_of_means(angles.cos().mean(dim=1), angles.sin().mean(dim=1))


def sigreg_of_means(cosine: Tensor, sine: Tensor) -> Tensor:
    """Compute SIGReg of the parts of characteristic functions at the positive points, each (points, K)."""
    normal = torch.tensor(SIGREG_POINTS, dtype=cosine.dtype, device=cosine.device).square().div(-2).exp()
    distances = (cosine - normal[:, None]).square() + sine.square()
    return (2 * SIGREG_SPACING * normal * distances.mean(dim=1)).sum()


def visreg(z: Tensor, directions: Tensor) -> Tensor:
    """Compute VISReg (arXiv 2606.02572), the sum of its three terms.

    Args:
        z: (B, D) embeddings, not normalised.
        directions: (K, D) directions of length one.

    Returns:
        A scalar.
    """
    centre, scale, shapes = visreg_terms(z, directions)
    return centre + scale + shapes.mean()


def visreg_terms(z: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the mean squared differences in centre, in scale, and in shape on each direction.

    Args:
        z: (B, D) embeddings, not normalised.
        directions: (K, D) directions of length one.

    Returns:
        Two scalars and (K,) numbers.
    """
    dtype = _compute_dtype(z)
    z, directions = z.to(dtype), directions.to(dtype)
    mean = z.mean(dim=0)
    centred = z - mean
    deviation = (centred.square().mean(dim=0) + 1e-12).sqrt()
    projections = directions @ (centred / deviation).T
    ranks = torch.arange(1, len(z) + 1, device=z.device, dtype=dtype)
    quantiles = torch.special.ndtri(ranks / (len(z) + 1))
    shapes = (projections.sort(dim=1).values - quantiles).square().mean(dim=1)
    return mean.square().mean(), (deviation - 1).square().mean(), shapes


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
    """Apply batch normalisation (arXiv 1502.03167), add a residual, and apply ReLU.

    Args:
        x: (N, C, H, W).
        residual: tensor of the shape of ``x``, or None.
        weight, bias, running_mean, running_var: (C,); running statistics are updated in place in training.
        training: normalise with the statistics of the batch.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        relu: apply ReLU last.
    """
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        y = y + residual
    return F.relu(y) if relu else y


def topk_neighbors(
    queries: Tensor, database: Tensor, k: int, normalize: bool, exclude_self: bool, rows_per_chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Find the exact k best database rows per query by float64 dot products rounded to float32, ties to smaller index.

    Args:
        queries: (Q, D).
        database: (N, D).
        k: neighbours per query.
        normalize: divide each row by its length (at least 1e-12) first, for cosine similarity.
        exclude_self: row i of the queries is row i of the database and is not its own neighbour.
        rows_per_chunk: number of queries processed at a time, which bounds the memory.

    Returns:
        similarity (Q, k) float32 and index (Q, k) int64. A non-finite row has no neighbours and is never a neighbour.
        Missing neighbours have index -1 and similarity -inf.
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
            # Division after the sum keeps exact zeros and ties of integer-valued rows.
            similarity /= q_length[start:stop, None] * x_length
        similarity = similarity.to(torch.float32)
        similarity.masked_fill_(bad_row, -torch.inf)
        similarity[bad_query[start:stop]] = -torch.inf
        if exclude_self:
            rows = torch.arange(start, stop, device=q.device)
            similarity[rows - start, rows] = -torch.inf
        # A stable sort keeps the smaller index first among equals; topk does not guarantee it.
        value, index = similarity.sort(dim=1, descending=True, stable=True)
        value, index = value[:, :k], index[:, :k]
        similarities.append(value)
        indices.append(index.masked_fill(value == -torch.inf, -1))
    if not similarities:
        return queries.new_empty((0, k), dtype=torch.float32), queries.new_empty((0, k), dtype=torch.int64)
    return torch.cat(similarities), torch.cat(indices)
