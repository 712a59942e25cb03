"""Groups of frozen features against k-means and Ward's linkage, by the accuracy on labelled folders.

    scan-fast embed RUN --data FOLDER --out FOLDER.npz      # features of a labelled folder by the network of a run
    python -m benchmarks.partitions FOLDER.npz ... [--seeds 3] [--json FILE]

The class of an image is the folder that it is in. All methods get the same features and the number of classes. k-means
is the best of 10 starts on the features of length one, Ward's linkage is scikit-learn's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import AgglomerativeClustering, KMeans

from scan_fast.evaluation.metrics import clustering_metrics
from scan_fast.partitions import FeatureSpace, choose, refined, suggest_number

from .environment import describe
from .files import write_json

METRICS = ("acc", "nmi", "ari")
METHODS = {"kmeans": "k-means", "ward": "Ward", "scan_fast": "scan-fast"}


def measure(features: NDArray[np.float32], labels: NDArray[np.int64], seeds: Sequence[int]) -> dict[str, Any]:
    """Return the metrics of each method, averaged over seeds, and the suggested number of groups by seed.

    Args:
        features: (N, D), not normalised.
        labels: (N,) classes from 0.
        seeds: seeds of k-means and of scan-fast.
    """
    k, sizes = int(labels.max()) + 1, np.bincount(labels)
    found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    seconds, suggested = [], []
    for seed in seeds:
        begin = time.perf_counter()
        space = FeatureSpace(torch.from_numpy(features), seed)
        chosen = refined(choose(space, k), space, k)[1]
        seconds.append(time.perf_counter() - begin)
        suggested.append(suggest_number(space).k)
        kmeans = KMeans(k, n_init=10, random_state=seed).fit_predict(space.unit)
        found["scan_fast"].append(clustering_metrics(chosen.labels, labels, k, k))
        found["kmeans"].append(clustering_metrics(kmeans, labels, k, k))
    ward = AgglomerativeClustering(k).fit_predict(space.unit)
    found["ward"].append(clustering_metrics(ward, labels, k, k))
    return {
        "images": len(labels),
        "classes": k,
        "class_sizes": [int(sizes.min()), int(sizes.max())],
        "suggested": suggested,
        "seconds": round(float(np.median(seconds)), 2),
        **{
            method: {name: round(float(np.mean([entry[name] for entry in entries])), 4) for name in METRICS}
            for method, entries in found.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table of a result: accuracy, NMI and ARI in percent, and the numbers of groups."""
    heads = ["folder", "images", "classes", "sizes", *METHODS.values(), "suggested", "seconds"]
    rows = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for name, entry in result["results"].items():
        scores = [" / ".join(f"{100 * entry[method][metric]:.1f}" for metric in METRICS) for method in METHODS]
        sizes = "-".join(map(str, dict.fromkeys(entry["class_sizes"])))
        cells = [f"{entry['images']:,}", str(entry["classes"]), sizes, *scores]
        suggested = ", ".join(map(str, entry["suggested"]))
        rows.append(f"| {name} | {' | '.join(cells)} | {suggested} | {entry['seconds']:.1f} |")
    return "\n".join(rows) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the given files and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.partitions", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".npz of scan-fast embed")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    options = parser.parse_args(arguments)
    results = {}
    for file in options.files:
        with np.load(file) as content:
            names = [PurePath(str(path)).parent.name for path in content["paths"]]
            labels = np.unique(names, return_inverse=True)[1].astype(np.int64)
            entry = measure(content["features"].astype(np.float32), labels, range(options.seeds))
        results[file.stem] = entry
        scores = "  ".join(f"{name} {entry[name]['acc']:.3f}" for name in METHODS)
        suggested = "suggested " + ", ".join(map(str, entry["suggested"]))
        size = f"{entry['images']:>6} images  {entry['classes']:>3} classes  {suggested:<20}"
        print(f"{file.stem:<24}{size}  {scores}  {entry['seconds']:.1f} s", flush=True)
    if options.json is not None:
        header = {"benchmark": "partitions", "title": "Groups of frozen features", "device": "cpu"}
        result = {**header, "environment": describe("cpu"), "seeds": options.seeds, "results": results}
        write_json(options.json, result, indent=1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
