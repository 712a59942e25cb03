"""The record of a run's network and of the weights that it starts from."""

from __future__ import annotations

from pathlib import Path

from ..data.datasets import DataConfig
from ..data.kinds import find_kind
from ..errors import RunError
from ..methods import WeightsSettings
from ..models.backbones import multiply_adds
from ..models.pretrained import weights_digest, weights_licence, weights_origin
from ..models.weight_files import file_digest
from ..runs import artifacts
from ..runs.config import Config
from ..runs.records import BackboneRecord
from .context import Context, data_settings


def note_backbone(context: Context) -> BackboneRecord:
    """Write backbone.json when a run begins, and check later that its weights are the same.

    Returns:
        The facts about the network; its text is the line that the run starts with.

    Raises:
        RunError: if the file of the weights has changed since the run was begun.
    """
    run = context.run
    found = _record(context)
    taken_by = "pretext" if context.config.clustering.weights is None else "clustering"
    begun = run.finished(taken_by) or run.has(artifacts.checkpoint(taken_by))
    if begun and run.has(artifacts.BACKBONE):
        noted = run.read(artifacts.BACKBONE)
        if noted.digest and found.digest and noted.digest != found.digest:
            raise RunError(
                f"{run.path} was begun with other weights: {found.weights} has changed since (its digest was "
                f"{noted.digest} and is {found.digest}); restore the file, or start again in a new folder"
            )
        return noted
    run.write(artifacts.BACKBONE, found)
    if context.left_out:
        shown = ", ".join(context.left_out[:4]) + (", ..." if len(context.left_out) > 4 else "")
        context.tracker.say(f"left out of {found.weights}: {shown}")
    if (
        _original_file(context.config) is not None
        and context.input is None
        and _assumes_statistics(context.config.data)
    ):
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (found.mean, found.std))
        context.tracker.say(
            f"{found.weights} does not say how its images were normalised: mean {mean} and standard deviation {std} "
            "are assumed; data.mean and data.std set others"
        )
    return found


def _original_file(config: Config) -> Path | None:
    """Return the weight file of the SCAN project, or of MoCo, that a run starts from, if it does."""
    if config.clustering.weights is not None:
        return config.clustering.weights
    method = config.pretext.method
    return method.file if isinstance(method, WeightsSettings) else None


def _assumes_statistics(data: DataConfig) -> bool:
    """Return if the normalisation is nobody's: neither the settings say it, nor is the data set known."""
    return find_kind(data.source).statistics is None and (data.mean is None or data.std is None)


def _record(context: Context) -> BackboneRecord:
    model, side = context.model_config, context.plain_view.side
    origin, digest = weights_origin(model), weights_digest(model)
    file = _original_file(context.config)
    if file is not None:
        origin, digest = str(file), file_digest(file) if file.is_file() else None
    return BackboneRecord(
        backbone=model.backbone,
        network=model.network,
        image_size=side,
        mean=list(context.splits.mean),
        std=list(context.splits.std),
        interpolation=data_settings(context.config, context.input).filter,
        weights=origin,
        digest=digest,
        licence=weights_licence(model),
        multiply_adds=multiply_adds(model, side),
    )
