"""The clustering stage if the reference project has done it: backbone and head of a file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..models.heads import ClusterModel
from ..models.reference_checkpoints import check_clusters, load_original, read_original
from ..runs.artifacts import CLUSTER_MODEL
from ..runs.records import StageResult
from ..training.context import Context, seeded
from ..training.inference import forward_all
from .assessment import assess
from .handover import CLUSTERING_LOGITS, Handover


def run_given_heads(context: Context, name: str, file: Path, head: int | None, handover: Handover) -> None:
    """Take backbone and head from a file and measure them.

    Args:
        context: the run.
        name: the stage.
        file: a SCAN or self-label file.
        head: the head to take; None: the one that the file names as the best.
        handover: holds the logits afterwards.

    Raises:
        WeightsError: if the file holds no cluster heads, another network, another number of clusters, or several heads
            without a best one.
    """
    begin = time.perf_counter()
    original = read_original(file)
    chosen = check_clusters(original, file, context.n_clusters, head)
    with seeded(context.config.seed, name):
        model = ClusterModel(context.without_pretrained, context.n_clusters)
    load_original(model, original, original.with_head(chosen), file, context.model_config)
    model = context.place(model)
    results: dict[str, Any] = {"head": 0, "file_head": chosen}
    for split, source in context.clustered.items():
        logits = forward_all(context, model, model, source)[0].cpu()
        handover.put(CLUSTERING_LOGITS, split, logits)
        results[split] = assess(context, logits, split)
    context.run.write(CLUSTER_MODEL, StageResult(model.state_dict(), {"head": 0}, context.run.images_digest))
    context.run.finish_stage(name, time.perf_counter() - begin, results, context.config.seed)
