"""What a run leaves behind: metrics, assignments, the confusion matrix and the predictor."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.sources import Source
from ..evaluation.metrics import confusion, match_clusters, save_confusion
from ..evaluation.probes import kmeans_baseline, kmeans_metrics
from ..models.heads import ClusterModel
from ..training.context import Context
from ..training.inference import forward_all
from .handover import CLUSTERING_LOGITS, SELFLABEL_LOGITS, Handover

MODEL_FORMAT = 1
#: k-means on pixels is a baseline of sets whose training images take no more bytes than this as float32.
MOST_PIXELS = 4 << 30
PREDICTION_COLUMNS = ("path", "cluster", "confidence", "margin")


def final_logits(context: Context, model: ClusterModel, name: str, handover: Handover) -> dict[str, Tensor]:
    """Return by split the (N, C) logits, on the CPU, of a finished model with one head.

    Args:
        context: the run.
        model: the finished model of the stage that hands on ``name``.
        name: CLUSTERING_LOGITS or SELFLABEL_LOGITS.
        handover: holds the logits if the stage was done in this process.
    """

    def compute(source: Source) -> Tensor:
        return forward_all(context, model, model, source)[0].cpu()

    return {
        split: handover.get(name, split, lambda source=source: compute(source))  # type: ignore[misc]
        for split, source in context.clustered.items()
    }


def write_results(context: Context, model: ClusterModel, stage: str, handover: Handover) -> None:
    """Write assignments.csv, model.pt and, with labels, confusion.csv and confusion.png, from the final model."""
    name = SELFLABEL_LOGITS if stage == "selflabel" else CLUSTERING_LOGITS
    logits = final_logits(context, model, name, handover)
    context.run.write_text("assignments.csv", assignments_csv(context, logits))
    context.run.save("model.pt", predictor_state(context, model, stage))
    labels = context.splits.test.labels
    if labels is not None and context.n_classes is not None:
        clusters = logits["test"].argmax(dim=1).numpy()
        many_to_one = context.n_clusters > context.n_classes
        match = match_clusters(clusters, labels.numpy(), context.n_clusters, context.n_classes, many_to_one=many_to_one)
        matrix = confusion(clusters, labels.numpy(), context.n_clusters, context.n_classes, match)
        assert context.splits.test.class_names is not None
        save_confusion(context.run.path / "confusion", matrix, context.splits.test.class_names)


def assignments_csv(context: Context, logits: dict[str, Tensor]) -> str:
    """Return one row per image: path, cluster, confidence, margin to the second cluster, split and, if known, label."""
    names = context.splits.train.class_names if context.n_classes is not None else None
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*PREDICTION_COLUMNS, "split", *(["label"] if names else [])])
    for split, source in context.clustered.items():
        for row, line in enumerate(prediction_rows(source.paths, logits[split].softmax(dim=1))):
            line.append(split)
            if names and source.labels is not None:
                label = int(source.labels[row])
                line.append(names[label] if label >= 0 else "")
            writer.writerow(line)
    return buffer.getvalue()


def prediction_rows(paths: Sequence[str], probabilities: Tensor) -> Iterator[list[Any]]:
    """Yield path, cluster, confidence and margin to the second cluster of each image, from (N, K) probabilities."""
    top, cluster = probabilities.topk(2, dim=1)
    for row, path in enumerate(map(printable, paths)):
        best, second = top[row].tolist()
        yield [path, int(cluster[row, 0]), f"{best:.6f}", f"{best - second:.6f}"]


def printable(path: str) -> str:
    """Return a path that can be written as UTF-8: a file name that is not valid text must not cost a table."""
    return path.encode("utf-8", "replace").decode()


def write_skipped(context: Context) -> list[tuple[str, str]]:
    """List the images that could not be read in skipped.csv (path, reason), and return them; no file for none."""
    sources = [*context.clustered.values(), context.splits.pretext]
    # Subsets of one source share its list.
    skipped = sorted({entry for source in sources if source is not None for entry in source.skipped})
    if not skipped:
        context.run.remove("skipped.csv")
        return []
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["path", "reason"])
    writer.writerows((printable(path), " ".join(printable(reason).split())) for path, reason in skipped)
    context.run.write_text("skipped.csv", buffer.getvalue())
    return skipped


def predictor_state(context: Context, model: ClusterModel, stage: str) -> dict[str, Any]:
    """Return everything that :class:`scan_fast.predictor.Predictor` needs: weights, sizes and normalisation."""
    return {
        "format": MODEL_FORMAT,
        "stage": stage,
        "model": context.without_pretrained.model_dump(mode="json"),
        "n_clusters": context.n_clusters,
        "size": context.splits.train.size,
        "view_size": context.plain_view.size,
        "crop": context.config.data.crop,
        "decode": context.config.data.decode,
        "mean": list(context.splits.mean),
        "std": list(context.splits.std),
        "state_dict": {name: value.cpu() for name, value in model.state_dict().items()},
    }


def baselines(context: Context) -> dict[str, dict[str, float]]:
    """Return the test metrics of k-means (mean and deviation over seeds) on pixels and on the mined features.

    Empty without labels; without the pixels where there are too many of them.
    """
    train, test = context.splits.train, context.splits.test
    if test.labels is None or context.n_classes is None:
        return {}
    seeds = range(context.config.evaluation.baseline_seeds)
    inputs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    if 12 * train.size**2 * len(train) <= MOST_PIXELS:
        inputs["kmeans_pixels"] = (_pixels(train), _pixels(test))
    if context.run.has("embeddings.npz"):
        embeddings = context.run.arrays("embeddings.npz")
        inputs["kmeans_features"] = (embeddings["train"], embeddings["test"])
    return {
        name: kmeans_metrics(
            kmeans_baseline(fit, applied, context.n_clusters, seeds),
            test.labels.numpy(),
            context.n_clusters,
            context.n_classes,
        )
        for name, (fit, applied) in inputs.items()
    }


def _pixels(source: Source) -> np.ndarray:
    pixels = np.empty((len(source), 3 * source.size**2), dtype=np.float32)
    for rows in torch.arange(len(source)).split(1024):
        pixels[rows.numpy()] = source.read(rows).flatten(1).cpu().numpy()
    return pixels
