"""Linear heads on frozen features, trained on pairs of an image and a neighbour, from a partition or at random."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import distributed
from ..data.loader import epoch_batches, steps_per_epoch
from ..errors import ConfigError
from ..models.heads import ClusterModel
from ..objectives import ObjectiveSettings, SCANSettings, TEMISettings
from ..random import Key, integers, stream_key, uniforms
from ..threads import one_thread

STREAM = "partitions/heads"
COMPONENTS = 128
"""Principal components in which heads are trained. In all components, heads stay nearer to a wrong start."""
CONFIDENCE = 0.8
"""Mean largest probability of heads that start from a partition. Heads that are sure of everything do not move."""
RIDGE = 1e-2
"""Penalty on the weights of the start, relative to the mean variance of a component."""
INITIAL_LOGIT = 0.1
"""Standard deviation of the logits of heads that start at random."""

REFINEMENTS: dict[str, ObjectiveSettings] = {
    "temi": TEMISettings(decay=0.98),
    "scan": SCANSettings(entropy_weight=2.0, prior="estimated"),
}
"""Objectives that improve a partition: the first evens out the clusters, the second keeps their sizes.

Which of them fits is a matter of the images, and heads of both can be compared by a score. The teacher is faster than
by default, because some hundred steps are few.
"""

_NEIGHBOR, _WEIGHT, _INITIAL = 0, 1, 2
_BISECTIONS = 30
_RANK_TOLERANCE = 1e-6  # of float32 products


@dataclass(frozen=True)
class TrainedHeads:
    """Linear heads: ``logits[h] = features @ weight[h].T + bias[h]``.

    Attributes:
        logits: (H, N, C) float32 of the features that they were trained on.
        weight: (H, C, D) float32.
        bias: (H, C) float32.
    """

    logits: Tensor
    weight: Tensor
    bias: Tensor


@one_thread()
@distributed.alone()
def train_heads(
    features: Tensor,
    neighbors: Tensor,
    objective: ObjectiveSettings,
    *,
    n_clusters: int,
    seed: int,
    heads: int = 3,
    epochs: int = 60,
    batch_size: int = 512,
    lr: float = 0.01,
    start: Tensor | None = None,
) -> TrainedHeads:
    """Train linear heads on frozen features. Pairs are a function of seed, epoch and image.

    The heads are trained by Adam, with a cosine from ``lr`` to 0, on the first principal components of the features.
    Each head fits the start with other random weights of the images, so that the heads differ. Other ranks take no
    part.

    Args:
        features: (N, D) float32, rows of unit length.
        neighbors: (N, k) int64 neighbours of each image; -1 means no neighbour. An image is also its own neighbour.
        objective: what the heads minimise.
        n_clusters: C, the clusters of each head.
        seed: seed of pairs, order and start.
        heads: H.
        epochs: passes over the images.
        batch_size: images in a step, at most N of them.
        lr: learning rate of Adam, for features of which the mean length is 1 after centring.
        start: (N,) or (H, N) int64 clusters from 0 to C - 1 to start from; None starts at random.

    Returns:
        The heads, on the features as they were given.

    Raises:
        ValueError: for wrong shapes or clusters.
        ConfigError: if a setting of the objective does not fit the number of clusters or needs a start.
    """
    _check(features, neighbors, n_clusters, start, heads)
    objective.check(n_clusters)
    if objective.needs_start and start is None:
        raise ConfigError("prior=estimated takes the sizes of the clusters from a partition, so it needs a start")
    key = stream_key(seed, STREAM)
    mean, components = _principal_components(features, _components(features, n_clusters))
    inputs = (features - mean) @ components
    rows = torch.arange(len(features), device=features.device)
    choices = torch.cat([rows[:, None], torch.where(neighbors < 0, rows[:, None], neighbors)], dim=1)

    model = ClusterModel.linear(inputs.shape[1], n_clusters, heads).to(features.device)
    with torch.no_grad():
        if start is None:
            weight, bias = _random_start(inputs, key, heads, n_clusters)
        else:
            draws = uniforms(key, 0, rows, _WEIGHT, heads)
            # The Bayesian bootstrap: weights of the images from an exponential distribution, others for each head.
            weights = -(1 - draws.T).log()
            weight, bias = _fitted_start(inputs, start.to(inputs.device).expand(heads, -1), weights, n_clusters)
        _write(model, weight, bias)
        trained = objective.build()
        trained.attach(model)
        trained.start(lambda: model.heads(inputs).float())

    parameters = [p for module in (model, *trained.modules()) for p in module.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    size = min(batch_size, len(features))
    total = epochs * steps_per_epoch(len(features), size)
    step = 0
    for epoch in range(epochs):
        drawn = choices[rows, integers(key, epoch, rows, _NEIGHBOR, choices.shape[1])]
        for indices in epoch_batches(key, epoch, len(features), size):
            batch = indices.to(features.device)
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / total))
            optimizer.zero_grad(set_to_none=True)
            losses, _ = trained.loss(model.heads, inputs[batch], inputs[drawn[batch]])
            losses.sum().backward()
            optimizer.step()
            trained.after_step()
            step += 1

    with torch.no_grad():
        weight, bias = _of_features(*_read(model), mean, components)
        logits = (features @ weight.flatten(0, 1).T).unflatten(1, (heads, n_clusters)).movedim(1, 0) + bias[:, None]
    return TrainedHeads(logits.contiguous(), weight, bias)


@torch.no_grad()
def fitted_heads(features: Tensor, starts: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """Return linear heads that give the clusters of some partitions, by ridge regression on principal components.

    Args:
        features: (N, D) float32.
        starts: (H, N) int64 clusters from 0 to C - 1, a partition for each head.
        n_clusters: C.

    Returns:
        (H, C, D) and (H, C) float32: weights and biases, on the features as they were given.
    """
    mean, components = _principal_components(features, _components(features, n_clusters))
    inputs = (features - mean) @ components
    weights = torch.ones_like(starts, dtype=torch.float32)
    return _of_features(*_fitted_start(inputs, starts, weights, n_clusters), mean, components)


def _components(features: Tensor, n_clusters: int) -> int:
    # Of few images there are fewer, because heads with a weight for each image would fit any start.
    return min(COMPONENTS, max(n_clusters, len(features) // 4), features.shape[1])


def _of_features(weight: Tensor, bias: Tensor, mean: Tensor, components: Tensor) -> tuple[Tensor, Tensor]:
    """Return heads on the principal components as heads on the features."""
    weight = weight @ components.T
    return weight, bias - weight @ mean


def _check(features: Tensor, neighbors: Tensor, n_clusters: int, start: Tensor | None, heads: int) -> None:
    if features.ndim != 2 or features.dtype != torch.float32:
        raise ValueError(f"features must be float32 of shape (N, D), got {features.dtype} {tuple(features.shape)}")
    rows = len(features)
    if neighbors.ndim != 2 or len(neighbors) != rows or neighbors.dtype != torch.int64:
        raise ValueError(
            f"neighbors must be int64 of shape ({rows}, k), got {neighbors.dtype} {tuple(neighbors.shape)}"
        )
    if not 2 <= n_clusters <= rows:
        raise ValueError(f"n_clusters must be from 2 to the {rows} images, got {n_clusters}")
    if start is None:
        return
    if start.dtype != torch.int64 or tuple(start.shape) not in ((rows,), (heads, rows)):
        raise ValueError(
            f"start must be int64 of shape ({rows},) or ({heads}, {rows}), got {start.dtype} {tuple(start.shape)}"
        )
    if int(start.min()) < 0 or int(start.max()) >= n_clusters:
        raise ValueError(
            f"start must hold clusters from 0 to {n_clusters - 1}, got {int(start.min())} to {int(start.max())}"
        )


def _principal_components(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and (D, M) directions, scaled so that centred rows have a mean length of 1 in them."""
    mean = features.mean(dim=0)
    centred = features - mean
    # Of the smaller of the two products, because both give the same directions.
    if features.shape[0] < features.shape[1]:
        values, vectors = torch.linalg.eigh((centred @ centred.T).double())
        top = values[-count:]
        # Centred rows have a rank below N, so the last directions are noise; they become zero.
        inverse = torch.where(top > _RANK_TOLERANCE * top[-1], top, torch.inf).rsqrt()
        directions = (centred.T.double() @ vectors[:, -count:]) * inverse
    else:
        _, vectors = torch.linalg.eigh((centred.T @ centred).double())
        directions = vectors[:, -count:]
    directions = directions.flip(1).float()
    length = (centred @ directions).norm(dim=1).mean().clamp_min(torch.finfo(torch.float32).tiny)
    return mean, directions / length


def _random_start(inputs: Tensor, key: Key, heads: int, n_clusters: int) -> tuple[Tensor, Tensor]:
    """Return weights (H, C, M), drawn for each entry, and biases (H, C) of zero."""
    rows = torch.arange(heads * n_clusters, device=inputs.device)
    drawn = uniforms(key, 0, rows, _INITIAL, inputs.shape[1]).view(heads, n_clusters, -1) - 0.5
    return drawn * (INITIAL_LOGIT * math.sqrt(12)), drawn.new_zeros((heads, n_clusters))


def _fitted_start(inputs: Tensor, starts: Tensor, weights: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """Return weights (H, C, M) and biases (H, C) by ridge regression on the clusters of each start (H, N).

    The images count by their ``weights`` (H, N). The logits are then scaled to the mean confidence of a start.
    """
    ones = F.pad(inputs, (0, 1), value=1.0)
    penalty = torch.full((ones.shape[1],), RIDGE * float(inputs.square().mean()) * len(inputs), device=inputs.device)
    penalty[-1] = 0
    fitted = []
    for start, own in zip(starts, weights, strict=True):
        weighted = ones * own[:, None]
        targets = F.one_hot(start, n_clusters).float()
        solution = torch.linalg.solve(weighted.T @ ones + penalty.diag(), weighted.T @ targets)
        fitted.append(solution * _scale_to_confidence(ones @ solution))
    both = torch.stack(fitted).mT
    return both[..., :-1].contiguous(), both[..., -1].contiguous()


def _scale_to_confidence(logits: Tensor) -> float:
    """Return the factor on logits (N, C) at which the mean largest probability is that of a start."""
    low, high = -5.0, 10.0  # of the natural logarithm
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if float((logits * math.exp(middle)).softmax(dim=-1).amax(dim=-1).mean()) < CONFIDENCE:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def _read(model: ClusterModel) -> tuple[Tensor, Tensor]:
    state = model.state_dict()
    return tuple(  # type: ignore[return-value]
        torch.stack([state[f"cluster_head.{h}.{name}"] for h in range(model.n_heads)]) for name in ("weight", "bias")
    )


def _write(model: ClusterModel, weight: Tensor, bias: Tensor) -> None:
    for head, own_weight, own_bias in zip(model.cluster_head, weight, bias, strict=True):
        head.load_state_dict({"weight": own_weight, "bias": own_bias})
