"""Compares the spaces in which neighbours can be mined: the projection, the backbone's features, and both together.

    python -m benchmarks.spaces NAME=RUN ... [--archive cifar10-jpeg.tar.xz] --json FILE

Each run folder has finished its pretext stage. Neighbours and k-means are those of the images that metrics are reported
of, the test images if there are any. Purity and accuracy use labels, which is fine for comparing; nothing is trained or
selected by them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scan_fast.data.datasets import Splits
from scan_fast.evaluation.metrics import purity_at
from scan_fast.evaluation.probes import kmeans_baseline, kmeans_metrics
from scan_fast.neighbors import topk_neighbors
from scan_fast.runs import artifacts
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.tracker import Tracker
from scan_fast.stages.inputs import pretext_model
from scan_fast.training.context import open_context
from scan_fast.training.inference import forward_all

from .environment import describe
from .files import write_json
from .gpu_run.archive import open_archive

PURITY_AT = (1, 5, 20)
SEEDS = range(4)


def spaces(features: Tensor, projection: Tensor) -> dict[str, Tensor]:
    """Return by name the unit rows (N, D) of each space."""
    rows = {"projection": F.normalize(projection, dim=1), "backbone": F.normalize(features, dim=1)}
    return rows | {"both": F.normalize(torch.cat(list(rows.values()), dim=1), dim=1)}


def measure(folder: Path, splits: Splits | None) -> dict[str, Any]:
    """Return by space the purity of neighbours and the accuracy of k-means.

    Args:
        folder: of the run.
        splits: the images; None for those that its configuration names.
    """
    run = RunFolder(folder)
    with run:
        context = open_context(run.read(artifacts.CONFIG), run, Tracker(run, quiet=True), splits)
        network = pretext_model(context)
        source = context.clustered[context.reported]
        features = forward_all(context, network, network.features, source).cpu()
        with torch.no_grad():
            projection = network.contrastive_head(features.to(context.device)).cpu()
        labels, classes, n_clusters = source.labels, context.n_classes, context.n_clusters
    assert labels is not None and classes is not None
    found = {}
    for name, rows in spaces(features.float(), projection.float()).items():
        near = topk_neighbors(rows, k=max(PURITY_AT))[1]
        purity = purity_at(near.numpy(), labels.numpy(), PURITY_AT)
        groups = kmeans_baseline(rows, rows, n_clusters, SEEDS)
        metrics = kmeans_metrics(groups, labels.numpy(), n_clusters, classes)
        found[name] = {
            "purity": {str(k): value for k, value in purity.items()},
            "kmeans_acc": [metrics["acc_mean"], metrics["acc_std"]],
        }
    return {"images": len(labels), "spaces": found}


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table with a row per run and space."""
    titles = " | ".join(f"purity at {k}" for k in PURITY_AT)
    rows = [f"| run | neighbours in | {titles} | k-means |", f"|---|---|{'---:|' * (len(PURITY_AT) + 1)}"]
    for name, entry in result["runs"].items():
        for space, figures in entry["spaces"].items():
            purity = " | ".join(f"{100 * figures['purity'][str(k)]:.1f}" for k in PURITY_AT)
            mean, deviation = figures["kmeans_acc"]
            rows.append(f"| {name} | {space} | {purity} | {100 * mean:.1f} ± {100 * deviation:.1f} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, help="take the images from this archive (see benchmarks.gpu_run)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    options = parser.parse_args()
    runs = dict(word.split("=", 1) for word in options.runs)
    splits = None
    if options.archive is not None:
        with tempfile.TemporaryDirectory() as temporary:  # decoded once, and no run folder gets the images
            splits = open_archive(options.archive, Path(temporary))
    measured = {name: measure(Path(folder), splits) for name, folder in runs.items()}
    result = {"benchmark": "spaces", "device": "cpu", "environment": describe("cpu"), "runs": measured}
    print(table(result))
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
