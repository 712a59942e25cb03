"""The worth of a representation if few images are labelled: linear classifiers on the frozen features of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from .data.datasets import open_splits
from .data.kinds.kind import held_out
from .data.sources import Source, SubsetSource
from .errors import DataError, UsageError
from .evaluation.few_labels import few_label_probe
from .evaluation.metrics import clustering_metrics, metric_titles
from .evaluation.probes import knn_accuracy
from .models.saved import SavedModel
from .predictor import Predictor
from .runs import artifacts
from .runs.folder import RunFolder
from .runs.tracker import print_table
from .training.images import check_shown

HELD_OUT = 0.2
"""Share of the images that is held out for testing, by a hash of their names, if there is no test split."""

KNN = 100
"""Neighbours that vote in the kNN check; fewer if there are fewer labelled images."""

NOT_MEASURED = (
    "the networks stay frozen, and only a linear layer learns from labels: the semi-supervised methods that the SCAN "
    "paper compares with are fine-tuned as a whole"
)


@dataclass(frozen=True)
class Row:
    """Accuracy on the test images of linear classifiers that learned from a share of the labels.

    Attributes:
        features: the stage or stages whose features they see.
        percent: the share of the labelled training images of each class.
        labels: the number of labels that each classifier used.
        draws: the number of classifiers, each with other labelled images.
        top1, top5: mean over the draws; ``top5`` is None for five classes or fewer.
        top1_std, top5_std: standard deviation over the draws (of a sample); None for one draw.
        weight_decays: the weight decay that each classifier chose by a part of its labels.
    """

    features: str
    percent: float
    labels: int
    draws: int
    top1: float
    top1_std: float | None
    top5: float | None
    top5_std: float | None
    weight_decays: list[float]


@dataclass(frozen=True)
class Probe:
    """Result of :func:`probe`.

    Attributes:
        train, test: the number of training images and of test images.
        held_out: whether the test images were held out of the images for this measurement: a run without a test split
            has been trained on them, without their labels.
        classes: the number of classes.
        rows: the linear classifiers.
        knn: by features, the accuracy of a weighted vote of the :data:`KNN` most similar training images, with all
            labels.
        clustering: the metrics of the model's clusters on the test images, without labels.
    """

    train: int
    test: int
    held_out: bool
    classes: int
    rows: list[Row]
    knn: dict[str, float]
    clustering: dict[str, float]


@dataclass(frozen=True)
class Images:
    """Labelled images to learn from, and to measure on.

    Attributes:
        train, test: the images, with labels of the same classes.
        held_out: whether the test images were held out for this measurement.
    """

    train: Source
    test: Source
    held_out: bool

    @classmethod
    def of(cls, train: Source, test: Source | None, names: tuple[str, str] = ("the run", "its test images")) -> Images:
        """Check that all images have classes, and number those of the test images as those of the training images.

        Args:
            train: the training images.
            test: the test images; None holds :data:`HELD_OUT` of ``train`` out.
            names: what the two are called in messages.

        Raises:
            DataError: if there are no classes, or the test images have a class that the training images lack.
        """
        for source, name in zip((train, test), names, strict=True):
            if source is not None and (source.labels is None or source.class_names is None):
                raise DataError(
                    f"{name}: there are no classes to learn and to measure; label the images by sub-folders"
                )
        if test is None:
            if len(train) < 2:
                raise DataError(
                    f"{names[0]}: {len(train)} image is too few to hold some out; add images, or give --test"
                )
            kept, apart = held_out(train, HELD_OUT)
            assert apart is not None
            return cls(kept, apart, True)
        assert train.class_names is not None and test.class_names is not None and test.labels is not None
        unknown = [name for name in test.class_names if name not in train.class_names]
        if unknown:
            raise DataError(f"{names[1]}: no training image is of the class {unknown[0]}")
        if test.class_names == train.class_names:
            return cls(train, test, False)
        numbers = torch.tensor([*map(train.class_names.index, test.class_names), -1])
        renumbered = SubsetSource(test, torch.arange(len(test)))
        renumbered.labels, renumbered.class_names = numbers[test.labels], train.class_names
        return cls(train, renumbered, False)


def run_images(run: RunFolder, saved: SavedModel) -> Images:
    """Open a run's own images.

    Raises:
        RunError: if the run has no configuration, or images have changed since.
        DataError: if the images are no longer there, or have no classes.
    """
    config = run.read(artifacts.CONFIG)
    as_trained = {"resident": "files", "image_size": saved.size, "interpolation": saved.interpolation}
    splits = open_splits(config.data.model_copy(update=as_trained), run.decode_cache())
    sources = {"train": splits.train} | ({} if splits.test is None else {"test": splits.test})
    check_shown(run, sources, config.data.identity)
    return Images.of(splits.train, splits.test, (str(run.path), f"test images of {run.path}"))


def predictors(target: Path, device: torch.device) -> dict[str, Predictor]:
    """Return by stage the networks whose features are measured; those of equal stages once, under both names.

    Args:
        target: a finished run folder, or its model.pt, which holds the final stage alone.
        device: the device of the networks.

    Raises:
        WeightsError: if there is no model.
    """
    final = Predictor.load(target, device)
    run = RunFolder(target.expanduser())
    if not target.expanduser().is_dir() or not run.has(artifacts.PRETEXT_MODEL):
        return {final.saved.stage: final}
    learned = run.read(artifacts.PRETEXT_MODEL).model
    backbone = {name: value for name, value in learned.items() if name.startswith("backbone.")}
    state = final.saved.state_dict
    if all(torch.equal(value, state[name]) for name, value in backbone.items()):
        return {f"pretext, {final.saved.stage}": final}
    saved = replace(final.saved, state_dict=state | backbone)
    return {"pretext": Predictor(saved, device), final.saved.stage: final}


def probe(
    networks: dict[str, Predictor],
    images: Images,
    percents: Sequence[float],
    *,
    draws: int = 3,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Probe:
    """Measure features by linear classifiers with few labels, and by kNN; and the clusters of the last network.

    Args:
        networks: by name; the last one is the finished model.
        images: what they learn from and are measured on.
        percents: shares of the labels, above 0 and at most 100. All labels are drawn once, fewer several times.
        draws: the number of draws.
        seed: seed of the draws.
        say: called with lines of progress.

    Raises:
        DataError: if no training or no test image has a label.
    """
    train, test = images.train, images.test
    assert train.labels is not None and test.labels is not None and train.class_names is not None
    n_classes = len(train.class_names)
    for labels, kind in ((train.labels, "training"), (test.labels, "test")):
        if not bool((labels >= 0).any()):
            raise DataError(f"no {kind} image has a class")
    rows, knn, clustering = [], {}, {}
    for name, network in networks.items():
        say(f"features of {len(train):,} training and {len(test):,} test images: {name}")
        bank = network.outputs(train)[1].to(network.device)
        probabilities, queries = network.outputs(test)
        queries = queries.to(network.device)
        for percent in percents:
            scores = [
                few_label_probe(
                    bank, train.labels, queries, test.labels, n_classes, percent / 100, seed=seed, draw=draw
                )
                for draw in range(draws if percent < 100 else 1)
            ]
            top1, top1_std = _mean([score.top1 for score in scores])
            top5, top5_std = _mean([score.top5 for score in scores if score.top5 is not None])
            assert top1 is not None
            decays = [score.weight_decay for score in scores]
            rows.append(
                Row(name, percent, scores[0].labels, len(scores), top1, top1_std, top5, top5_std, decays),
            )
            say(f"{name}: {percent:g} % of the labels ({scores[0].labels}): {top1:.3f}")
        knn[name] = knn_accuracy(bank, train.labels, queries, test.labels, k=KNN)
        clusters = probabilities.argmax(dim=1).numpy()
        clustering = clustering_metrics(
            clusters, test.labels.numpy(), network.n_clusters, n_classes, probabilities.numpy()
        )
    return Probe(len(train), len(test), images.held_out, n_classes, rows, knn, clustering)


def _mean(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return mean and deviation of a sample; None for what is not known."""
    if not values:
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def parse_percents(text: str) -> list[float]:
    """Read the value of --labels.

    Raises:
        UsageError: unless it is a list of percentages above 0, at most 100, each once.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or any(not 0 < percent <= 100 for percent in found) or len(set(found)) < len(found):
        raise UsageError(f"--labels must be percentages above 0 and at most 100, such as 1,10,100; got {text!r}")
    return sorted(found)


def show(found: Probe, title: str) -> None:
    """Print the tables of a probe."""
    rows = [
        [each.features, f"{each.percent:g} %", str(each.labels), str(each.draws), *_cells(each)] for each in found.rows
    ]
    columns = ["features", "labels", "number", "draws", "top-1"]
    if found.classes > 5:
        columns.append("top-5")
    print_table(f"{title}: a linear classifier, accuracy on {found.test} test images", columns, rows)
    beside = [[f"kNN vote with all labels, {name}", "ACC", f"{value:.3f}"] for name, value in found.knn.items()]
    for key, heading in metric_titles(found.clustering).items():
        beside.append(["clusters without labels", heading, f"{found.clustering[key]:.3f}"])
    print_table("beside it, on the same images", ["", "", ""], beside)
    print(NOT_MEASURED)


def _cells(row: Row) -> list[str]:
    pairs = [(row.top1, row.top1_std), (row.top5, row.top5_std)]
    return [f"{mean:.3f}" + (f" ± {std:.3f}" if std is not None else "") for mean, std in pairs if mean is not None]
