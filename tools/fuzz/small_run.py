"""A finished run on a dozen tiny images of several formats, from which files and folders are changed."""

from __future__ import annotations

import os
import time
from pathlib import Path

from scan_fast import cli

from .pictures import pictures
from .running import in_process
from .target import write

_SETTINGS = (
    *("model.backbone=resnet_digits", "model.width=0.25", "precision=float32"),
    *("data.image_size=8", "data.workers=1", "data.resident=files", "data.on_error=skip"),
    *("pretext.epochs=1", "pretext.batch_size=8", "mining.k=2", "clustering.epochs=1", "clustering.batch_size=8"),
    *("clustering.view.cutout=2", "selflabel.epochs=1", "selflabel.batch_size=8", "selflabel.view.cutout=2"),
    *("runtime.threads=1", "runtime.device=cpu"),
)
_IMAGES = (
    *("plain.png", "alpha.png", "grey16.png", "turned.png", "plain.gif"),
    *("plain.bmp", "plain.tif", "grey.pgm", "baseline.jpg", "turned.jpg"),
)


def small_run(shared: Path) -> Path:
    """Return the folder of the run; it is trained at the first call for a shared folder.

    Raises:
        RuntimeError: if the run fails.
    """
    run = shared / "run"
    # Commands draw with it, and it keeps what it finds about fonts.
    os.environ["MPLCONFIGDIR"] = str(shared)
    if not run.is_dir():
        in_process(lambda: _train(shared / "images", run))
    return run


def _train(images: Path, run: Path) -> None:
    found = pictures()
    for number in range(12):
        name = _IMAGES[number % len(_IMAGES)]
        folder = images / ("x", "y")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, f"{number}{os.path.splitext(name)[1]}", found[name])
    write(images / "x", "broken.png", b"\x89PNG")
    time.sleep(2.5)  # files that have just changed are not noted as good
    if cli.main(["run", "--data", str(images), "--clusters", "2", *_SETTINGS, "--out", str(run), "--quiet"]) != 0:
        raise RuntimeError("the run failed")
