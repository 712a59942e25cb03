"""Checks of a configuration before its run begins, so that a mistake leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from ..data.datasets import DataConfig, Splits, open_splits
from ..runs.config import Config
from ..runs.folder import RunFolder
from ..runs.tracker import Tracker
from ..training.context import data_settings, open_context, weights_input
from . import mining


def listed_data(config: Config) -> DataConfig:
    """Return the data section as a run would open it, but with the images in their files."""
    return data_settings(config, weights_input(config)).model_copy(update={"resident": "files"})


def check_beforehand(config: Config, splits: Splits | None = None) -> None:
    """Check a configuration against its images, the files that it names and the device.

    Args:
        config: the configuration.
        splits: the images of :func:`listed_data`, if they are opened.

    Raises:
        ScanFastError: what a run of this configuration would raise before its first stage.
    """
    data = listed_data(config)
    listed = config.model_copy(update={"data": data})
    with (
        TemporaryDirectory(prefix="scan-fast-") as temporary,
        RunFolder.open(Path(temporary) / "run", listed) as trial,
    ):
        context = open_context(listed, trial, Tracker(trial, quiet=True), splits or open_splits(data))
        if config.why_without(mining.NAME) is None:
            mining.check_files(context)
