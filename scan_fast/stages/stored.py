"""Features of a frozen network that another run has computed of the same images."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from ..array_files import read_npz
from ..runs import artifacts
from ..runs.records import EMBEDDINGS_KEY
from ..training.context import Context


def features_key(context: Context) -> str | None:
    """Return a digest of everything that the features of a frozen network depend on.

    Returns:
        32 hexadecimal digits; None if this run trains the network or its heads on views, or if it is not known which
        images or weights there are.
    """
    run, config = context.run, context.config
    if config.pretext.method.trains or config.clustering.trains or config.mining.features != "backbone":
        return None
    if not run.has(artifacts.IMAGES) or not run.has(artifacts.BACKBONE):
        return None
    backbone, images = run.read(artifacts.BACKBONE), run.read(artifacts.IMAGES)
    if backbone.digest is None:
        return None
    facts = {
        "network": backbone.network,
        "weights": backbone.digest,
        "side": backbone.image_size,
        "stored": context.splits.train.size,
        "mean": backbone.mean,
        "std": backbone.std,
        "interpolation": backbone.interpolation,
        "crop": config.data.crop,
        "decode": config.data.decode,
        "renderer": config.data.renderer,
        "precision": str(context.precision),
        "device": context.device.type,
        "images": {split: len(source) for split, source in context.clustered.items()},
    }
    state = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    state.update(images.digest.encode())
    state.update(images.mtimes.tobytes())
    return state.hexdigest()


def stored_features(context: Context) -> dict[str, Tensor] | None:
    """Return by split the (N, D) float32 unit features that this run or one beside it has stored, None if none has.

    They are on the CPU.
    """
    key = features_key(context)
    if key is None:
        return None
    for folder in (context.run.path, *sorted(context.run.path.parent.iterdir())):
        file = folder / artifacts.EMBEDDINGS.name
        if file.is_file() and _key_of(file) == key:
            rows = artifacts.read(artifacts.EMBEDDINGS, file).rows
            if {name: len(array) for name, array in rows.items()} != context.counts_by_split:
                continue
            context.tracker.say(f"features: {file} holds those of these images by this network")
            return {split: torch.from_numpy(array) for split, array in rows.items()}
    return None


def _key_of(file: Path) -> str | None:
    """Return the key in embeddings.npz without reading the embeddings, None if there is none or the file is damaged."""
    try:
        with file.open("rb") as content:
            key = read_npz(content, EMBEDDINGS_KEY).get(EMBEDDINGS_KEY)
        return None if key is None else str(key)
    except (OSError, ValueError):
        return None
