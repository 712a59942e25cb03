"""The map keeps neighbours together, for landmarks and for the images placed between them."""

from __future__ import annotations

import numpy as np
import pytest

from scan_fast.evaluation.projection import project


def blobs(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 5, n)
    rows = generator.normal(size=(5, 40))[labels] + generator.normal(0, 0.3, (n, 40))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


def agreement(places: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of images whose nearest image on the map is of the same blob."""
    distance = ((places[:, None] - places[None]) ** 2).sum(axis=2)
    np.fill_diagonal(distance, np.inf)
    return float((labels[distance.argmin(axis=1)] == labels).mean())


@pytest.mark.parametrize("landmarks", [300, 100])
def test_blobs_stay_together(landmarks: int) -> None:
    rows, labels = blobs(240)
    places = project(rows, landmarks=landmarks)
    assert places.shape == (240, 2) and places.dtype == np.float32
    assert places.min() >= 0 and places.max() <= 1 and np.ptp(places, axis=0).min() > 0.8
    assert agreement(places, labels) > 0.97


def test_the_same_embeddings_give_the_same_map() -> None:
    rows, _ = blobs(80)
    assert (project(rows, landmarks=50) == project(rows, landmarks=50)).all()


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 7])
def test_few_images_are_placed(n: int) -> None:
    places = project(blobs(n)[0])
    assert places.shape == (n, 2) and np.isfinite(places).all()
    assert len(np.unique(places, axis=0)) == n


def test_degenerate_embeddings_are_placed() -> None:
    assert np.isfinite(project(np.ones((20, 3)))).all()
    assert np.isfinite(project(np.linspace(-1, 1, 20)[:, None])).all()
    rows, _ = blobs(30)
    rows[3] = np.nan
    places = project(rows)
    assert np.isfinite(places).all() and places[3].tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"must be \(N, D\)"):
        project(np.zeros(3))
