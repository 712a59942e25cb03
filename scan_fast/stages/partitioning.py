"""Stage two on frozen features: several ways to group them, and the choice of one without labels."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import distributed
from ..models.heads import ClusterModel
from ..partitions import Candidate, Choice, FeatureSpace, choose, refined
from ..runs.artifacts import CLUSTER_MODEL
from ..runs.records import StageResult
from ..training.context import Context
from .assessment import assess
from .embedding import frozen_logits
from .handover import CLUSTERING_LOGITS, Handover
from .inputs import mined_rows, pretext_model


def run_partitioning(context: Context, name: str, handover: Handover) -> None:
    """Group the backbone's features in all configured ways and keep the best, with a head that reproduces it.

    With several ranks, rank 0 does.

    Args:
        context: the run; ``clustering.update`` is ``features``.
        name: name of the stage.
        handover: takes the logits.
    """
    for split, logits in distributed.on_first(lambda: _group(context, name)).items():
        handover.put(CLUSTERING_LOGITS, split, logits)


def _group(context: Context, name: str) -> dict[str, Tensor]:
    """Do the stage, and return the logits by split."""
    begin = time.perf_counter()
    k, seed = context.n_clusters, context.config.seed
    space = FeatureSpace(torch.from_numpy(mined_rows(context)["train"]), seed)
    choice = choose(space, k, context.config.clustering.ways)
    config = context.config.clustering
    head, chosen, heads = refined(choice, space, k, config.refining, config.heads)
    model = ClusterModel(context.without_pretrained, k)
    model.backbone.load_state_dict(pretext_model(context).backbone.state_dict())
    layer = model.cluster_head[0]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(head.weight)
        layer.bias.copy_(head.bias)
    context.tracker.say(f"{name}: {chosen.name}; {reason(choice, chosen, heads)}")
    record: dict[str, Any] = {"head": 0, "epoch": 0, "loss": -chosen.score.total}
    results: dict[str, Any] = {"choice": described(choice, chosen, heads)}
    found = frozen_logits(context, model)
    for split, logits in found.items():
        results[split] = assess(context, logits, split)
    context.run.write(CLUSTER_MODEL, StageResult(model.state_dict(), record, context.run.images_digest))
    context.run.finish_stage(name, time.perf_counter() - begin, results, seed)
    return found


def described(choice: Choice, chosen: Candidate, heads: Sequence[Candidate]) -> dict[str, Any]:
    """Return the choice as summary.json and the report hold it: what was chosen, why, and all candidates."""
    return {
        "method": chosen.name,
        "score": round(chosen.score.total, 4),
        "reason": reason(choice, chosen, heads),
        "candidates": [
            {
                "name": candidate.name,
                "k": candidate.groups,
                "score": round(candidate.score.total, 4),
                "consistency": round(candidate.score.consistency, 4),
                "separation": round(candidate.score.separation, 4),
                "seconds": round(candidate.seconds, 2),
            }
            for candidate in (*heads, *choice.candidates)
        ],
    }


def reason(choice: Choice, chosen: Candidate, heads: Sequence[Candidate]) -> str:
    """Return in words why a candidate was chosen."""
    if chosen in heads:
        return f"of {len(heads)} heads trained from the best partition, this one has the best score; {choice.reason}"
    return choice.reason
