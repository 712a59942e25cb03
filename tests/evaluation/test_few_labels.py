"""The probe with few labels against scikit-learn, and what it must never look at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from scan_fast.evaluation.few_labels import FALLBACK, WEIGHT_DECAYS, choose_weight_decay, draw_labelled, few_label_probe
from scan_fast.evaluation.probes import Standardization


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train and test images of digits with their labels."""
    data, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(data).float(), torch.as_tensor(labels)
    return x[:1000], y[:1000], x[1000:1400], y[1000:1400]


def test_draws_take_the_same_share_of_each_class() -> None:
    labels = torch.tensor([0] * 100 + [1] * 40 + [2] * 3 + [-1] * 50)[
        torch.randperm(193, generator=torch.Generator().manual_seed(0))
    ]
    for fraction, expected in ((0.01, [1, 1, 1]), (0.1, [10, 4, 1]), (0.5, [50, 20, 2]), (1.0, [100, 40, 3])):
        rows = draw_labelled(labels, fraction, seed=0, draw=0)
        assert torch.bincount(labels[rows], minlength=3).tolist() == expected
        assert (rows.diff() > 0).all()
    few, more = (set(draw_labelled(labels, share, 0, 1).tolist()) for share in (0.1, 0.5))
    assert few < more
    draws = {tuple(draw_labelled(labels, 0.1, seed, draw).tolist()) for seed in (0, 1) for draw in (0, 1)}
    assert len(draws) == 4
    assert draw_labelled(labels, 0.1, 3, 2).equal(draw_labelled(labels, 0.1, 3, 2))
    with pytest.raises(ValueError, match="fraction must be above 0 and at most 1, got 0"):
        draw_labelled(labels, 0, 0, 0)
    with pytest.raises(ValueError, match="at least one label"):
        draw_labelled(torch.full((3,), -1), 1, 0, 0)


def test_draws_are_uniform() -> None:
    labels = torch.zeros(10, dtype=torch.int64)
    chosen = torch.cat([draw_labelled(labels, 0.2, 0, draw) for draw in range(500)])
    counts = torch.bincount(chosen, minlength=10)
    assert counts.sum() == 1000 and counts.min() > 65 and counts.max() < 140  # 100 each, deviation about 9


@pytest.mark.parametrize("fraction", [0.05, 1.0])
def test_agrees_with_scikit_learn(digits: tuple[Tensor, Tensor, Tensor, Tensor], fraction: float) -> None:
    train, labels, test, truth = digits
    found = few_label_probe(train, labels, test, truth, 10, fraction, seed=1)
    rows = draw_labelled(labels, fraction, 1, 0).numpy()
    assert found.labels == len(rows)
    x, y = train.double().numpy(), test.double().numpy()
    mean, deviation = x.mean(0), x.std(0)  # of all training images, labelled or not
    scale = np.where(deviation > 0, deviation, np.inf)
    x, y = (x - mean) / scale, (y - mean) / scale
    model = LogisticRegression(C=1 / (len(rows) * found.weight_decay), max_iter=5000, tol=1e-8)
    probabilities = model.fit(x[rows], labels.numpy()[rows]).predict_proba(y)
    top1 = (probabilities.argmax(1) == truth.numpy()).mean()
    top5 = np.mean([t in np.argsort(-p)[:5] for p, t in zip(probabilities, truth.numpy(), strict=True)])
    assert found.top1 == pytest.approx(top1, abs=0.006)
    assert found.top5 == pytest.approx(top5, abs=0.006)
    assert found.top1 > 0.7


def test_more_labels_help(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    scores = [few_label_probe(*digits, 10, fraction).top1 for fraction in (0.01, 0.1, 1.0)]
    assert scores[0] < scores[1] < scores[2]


def test_nothing_but_the_drawn_labels_plays_a_part(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    train, labels, test, truth = digits
    found = few_label_probe(train, labels, test, truth, 10, 0.05)
    drawn = draw_labelled(labels, 0.05, 0, 0)
    # Other labels permuted within the classes' numbers would change the draw, so they are removed: all of the rest.
    hidden = torch.full_like(labels, -1)
    hidden[drawn] = labels[drawn]
    assert few_label_probe(train, hidden, test, truth, 10, 1.0) == found
    # Test labels choose nothing: the weight decay stays, and the accuracy is of the labels given.
    wrong = few_label_probe(train, labels, test, (truth + 1) % 10, 10, 0.05)
    assert wrong.weight_decay == found.weight_decay and wrong.top1 < 0.2
    half = torch.where(torch.arange(len(truth)) < 100, truth, -1)
    assert few_label_probe(train, labels, test, half, 10, 0.05).top1 == pytest.approx(
        few_label_probe(train, labels, test[:100], truth[:100], 10, 0.05).top1
    )


def test_the_weight_decay_follows_the_data() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    noise = torch.randn(400, 60, generator=generator)
    clear = noise.clone()
    clear[:, 0] = (2.0 * labels - 1) * 5 + 0.1 * noise[:, 0]
    # Features without a relation to the classes want the strongest, separable ones a weak one.
    assert choose_weight_decay(noise, labels, 2, Standardization.of(noise)) == max(WEIGHT_DECAYS)
    assert choose_weight_decay(clear, labels, 2, Standardization.of(clear)) <= 1e-3
    alone = torch.tensor([0, 1])
    assert choose_weight_decay(noise[:2], alone, 2, Standardization.of(noise)) == FALLBACK


def test_five_classes_have_no_top5_and_unlabelled_tests_are_refused() -> None:
    x, y = torch.eye(5).repeat(4, 1), torch.arange(5).repeat(4)
    found = few_label_probe(x, y, x, y, 5, 0.5)
    assert (found.labels, found.top1, found.top5) == (10, 1.0, None)
    with pytest.raises(ValueError, match="test_labels must hold at least one label"):
        few_label_probe(x, y, x, torch.full((20,), -1), 5, 0.5)
