"""The number of groups, if the configuration leaves it open: suggested from the mined embeddings."""

from __future__ import annotations

import time
from dataclasses import asdict

import torch

from .. import distributed
from ..partitions import FeatureSpace, suggest_number
from ..runs.artifacts import SUGGESTION
from ..runs.records import SuggestedNumber
from ..training.context import Context
from .handover import Handover
from .inputs import mined_rows

NAME = "number"


def run_number(context: Context, handover: Handover | None = None) -> None:
    """Write suggested-k.json; with several ranks, rank 0 does."""
    distributed.on_first(lambda: _suggest(context))


def _suggest(context: Context) -> None:
    begin = time.perf_counter()
    rows = torch.from_numpy(mined_rows(context)["train"])
    suggestion = suggest_number(FeatureSpace(rows, context.config.seed))
    curve = [asdict(point) for point in suggestion.curve]
    tried = f"{suggestion.curve[0].k} to {suggestion.curve[-1].k}"
    context.tracker.say(
        f"{NAME}: {suggestion.k} groups are suggested, of {tried}; scan-fast suggest-k shows the scores"
    )
    context.run.write(SUGGESTION, SuggestedNumber(suggestion.k, curve))
    results = {"k": suggestion.k, "at_the_edge": suggestion.at_the_edge, "curve": curve}
    context.run.finish_stage(NAME, time.perf_counter() - begin, results, context.config.seed)
