"""Similarity of new images to the clusters of the training images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scan_fast.evaluation.typicality import Typicality


def features_around(angles: Tensor, seed: int) -> Tensor:
    """Return features in the plane, at some angles in radians, with lengths that play no part."""
    lengths = 0.5 + torch.rand(len(angles), generator=torch.Generator().manual_seed(seed))
    return torch.stack([angles.cos(), angles.sin()], dim=1) * lengths[:, None]


def test_centres_are_mean_directions_and_bounds_quantiles() -> None:
    spread = torch.linspace(-0.2, 0.2, 201)
    angles = torch.cat([spread, 2.0 + spread])
    clusters = torch.tensor([0] * 201 + [2] * 201)
    typical = Typicality.of(features_around(angles, 0), clusters, 3)
    expected = torch.tensor([[1.0, 0.0], [0.0, 0.0], [math.cos(2.0), math.sin(2.0)]])
    torch.testing.assert_close(typical.centers, expected, atol=1e-6, rtol=0)
    # Both ends are equally far, so one in a hundred on average lies beyond 0.198 radians.
    bound = torch.tensor(0.198).cos()
    torch.testing.assert_close(typical.least_similarity[[0, 2]], bound.expand(2), atol=1e-4, rtol=0)
    assert typical.least_similarity[1] == -1


def test_an_image_away_from_all_centres_is_unlike() -> None:
    spread = torch.linspace(-0.2, 0.2, 201)
    clusters = torch.tensor([0] * 201 + [2] * 201)
    typical = Typicality.of(features_around(torch.cat([spread, 2.0 + spread]), 0), clusters, 3)
    similarity, nearest = typical.nearest(features_around(torch.tensor([0.1, 1.9, 0.9, 3.1, 5.0]), 1))
    assert nearest.tolist() == [0, 2, 0, 2, 0]
    torch.testing.assert_close(similarity, torch.tensor([0.1, 0.1, 0.9, 1.1, 5.0]).cos(), atol=1e-5, rtol=0)
    assert typical.unlike(similarity, nearest).tolist() == [False, False, True, True, True]


def test_an_empty_cluster_is_never_the_nearest() -> None:
    typical = Typicality.of(torch.tensor([[1.0, 0.0], [1.0, 0.1]]), torch.tensor([1, 1]), 2)
    similarity, nearest = typical.nearest(torch.tensor([[-1.0, 0.0], [0.0, 0.0]]))
    assert nearest.tolist() == [1, 1]
    assert similarity[0] < -0.99


def test_about_one_in_a_hundred_training_images_is_unlike() -> None:
    generator = torch.Generator().manual_seed(3)
    clusters = torch.randint(0, 4, (4000,), generator=generator)
    features = torch.eye(4, 16)[clusters] * 3 + torch.randn(4000, 16, generator=generator)
    typical = Typicality.of(features, clusters, 4)
    flagged = typical.unlike(*typical.nearest(features)).float().mean()
    assert 0.008 < flagged < 0.011
