"""Compares mining and the choice of a head in float32 and in bfloat16, with the same weights.

    python -m benchmarks.dtypes NAME=RUN ... --json FILE

Each run folder has finished its clustering stage. The networks compute every image in both dtypes. Purity uses labels,
which is fine for comparing; nothing is trained or selected by them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scan_fast.evaluation.model_selection import selection_loss
from scan_fast.models.heads import ClusterModel
from scan_fast.neighbors import topk_neighbors
from scan_fast.runs import artifacts
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.tracker import Tracker
from scan_fast.stages.inputs import pretext_model
from scan_fast.training.context import open_context
from scan_fast.training.inference import forward_all

from .environment import describe
from .files import write_json

DTYPES = ("float32", "bfloat16")
NEIGHBORS, PAIRS = 20, 5
THRESHOLDS = (0.9, 0.99)


def outputs(folder: Path, precision: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return by split the unit embeddings (N, D), the logits of all heads (H, N, C) and the labels (N,)."""
    run = RunFolder(folder)
    with run:
        config = run.read(artifacts.CONFIG).model_copy(update={"precision": precision})
        context = open_context(config, run, Tracker(run, quiet=True))
        pretext = pretext_model(context)
        clusters = ClusterModel(context.without_pretrained, context.n_clusters, config.clustering.saved_heads)
        clusters.load_state_dict(run.read(artifacts.CLUSTER_MODEL).model)
        clusters = context.place(clusters)
        found = {}
        for split, source in context.clustered.items():
            assert source.labels is not None
            embedding = F.normalize(forward_all(context, pretext, pretext, source), dim=1)
            found[split] = embedding, forward_all(context, clusters, clusters, source), source.labels
    return found


def compare(folder: Path) -> dict[str, dict[str, Any]]:
    """Return by split what differs between the dtypes."""
    exact, rounded = (outputs(folder, precision) for precision in DTYPES)
    result = {}
    for split, (_, _, labels) in exact.items():
        near, losses, confidences = [], [], []
        for embedding, logits, _ in (exact[split], rounded[split]):
            near.append(topk_neighbors(embedding, k=NEIGHBORS)[1])
            losses.append(selection_loss(logits.log_softmax(dim=-1), near[-1][:, :PAIRS])[0])
            confidences.append(logits.softmax(dim=-1).amax(dim=-1))
        head = int(losses[0].argmin())
        common = (near[0][:, :, None] == near[1][:, None, :]).any(dim=2).double().mean()
        result[split] = {
            "images": len(labels),
            "neighbors_in_common": float(common),
            "purity": [float((labels[rows] == labels[:, None]).double().mean()) for rows in near],
            "selection_loss_difference": float((losses[0] - losses[1]).abs().max()),
            "heads": [int(loss.argmin()) for loss in losses],
            # How much worse, by float32, the head is that bfloat16 chooses.
            "loss_of_choice": float(losses[0][int(losses[1].argmin())] - losses[0][head]),
            "confident": {
                str(bound): [int((c[head] > bound).sum()) for c in confidences]
                + [int(((confidences[0][head] > bound) ^ (confidences[1][head] > bound)).sum())]
                for bound in THRESHOLDS
            },
        }
    return result


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table with a row per run and split."""
    rows = [
        "| weights | images | neighbours in common | purity, float32 | bfloat16 | confident above 0.9, both dtypes | "
        "in one only | above 0.99 | in one only | selection loss differs by | choice is worse by |",
        f"|---|{'---:|' * 10}",
    ]
    for name, splits in result["runs"].items():
        for split, entry in splits.items():
            (a, b, only), (c, d, one) = (entry["confident"][str(bound)] for bound in THRESHOLDS)
            purity = " | ".join(f"{100 * value:.1f}" for value in entry["purity"])
            rows.append(
                f"| {name}, {split} | {entry['images']:,} | {100 * entry['neighbors_in_common']:.1f} | {purity} | "
                f"{a:,}, {b:,} | {only} | {c:,}, {d:,} | {one} | {entry['selection_loss_difference']:.4f} | "
                f"{entry['loss_of_choice']:.4f} |"
            )
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = dict(word.split("=", 1) for word in options.runs)
    result: dict[str, Any] = {"benchmark": "dtypes", "device": "cpu", "environment": describe("cpu")}
    result["runs"] = {name: compare(Path(folder)) for name, folder in runs.items()}
    print(table(result))
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
