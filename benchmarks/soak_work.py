"""Does in small what users do in long-lived processes: the work of a round of :mod:`benchmarks.soak`.

Each activity takes a folder for its files and a generator that draws sizes and settings. It checks what it gets as far
as that tells whether it did its work.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from scan_fast.cli import main as command_line
from scan_fast.data import DataConfig, epoch_batches, open_splits, prefetch, source_from
from scan_fast.errors import ScanFastError
from scan_fast.estimator import ImageClusterer
from scan_fast.losses import nt_xent
from scan_fast.neighbors import topk_neighbors
from scan_fast.predictor import Predictor
from scan_fast.random import stream_key
from scan_fast.runs import artifacts
from scan_fast.runs.folder import RunFolder
from scan_fast.views import SimCLRView, StrongView, ViewMaker, render_dali
from scan_fast.views.parameters import AffineView, View
from scan_fast.views.renderers import renderer_for

Activity = Callable[[Path, random.Random], None]


def picture(number: int, size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Return an image of one of three kinds of texture."""
    generator = np.random.default_rng(number)
    y, x = np.mgrid[: size[1], : size[0]]
    wave = (np.sin(x / 2), np.sin(y / 2), np.sin((x + y) / 3))[number % 3]
    grey = np.clip(128 + 90 * wave + generator.normal(0, 10, wave.shape), 0, 255)
    return Image.fromarray(np.stack([grey, np.roll(grey, 2, axis=0), 255 - grey], -1).astype(np.uint8)).convert(mode)


def fill(folder: Path, draw: random.Random, count: int) -> Path:
    """Write images of mixed sizes, modes and formats."""
    folder.mkdir(parents=True)
    for number in range(count):
        size = (draw.randint(12, 60), draw.randint(12, 60))
        mode, ending = draw.choice((("RGB", "jpg"), ("RGB", "png"), ("L", "jpg"), ("P", "png"), ("RGBA", "webp")))
        picture(number, size, mode).save(folder / f"{number:03d}.{ending}")
    return folder


def settings(draw: random.Random) -> dict[str, Any]:
    """Return settings of a run of a second or two."""
    return {
        "model.backbone": "resnet_digits",
        "model.width": draw.choice((0.125, 0.25)),
        "data.image_size": draw.randint(12, 28),
        "data.workers": draw.randint(1, 3),
        "data.resident": draw.choice(("auto", "files")),
        "data.renderer": draw.choice(renderers()),
        "pretext.epochs": 1,
        "pretext.batch_size": draw.randint(8, 20),
        "mining.k": draw.randint(2, 4),
        "clustering.epochs": 1,
        "clustering.batch_size": draw.randint(8, 20),
        "clustering.heads": draw.randint(1, 3),
        "clustering.view.cutout": 4,
        "selflabel.epochs": 1,
        "selflabel.batch_size": draw.randint(8, 20),
        "selflabel.threshold": 0.1,
        "selflabel.view.cutout": 4,
        "precision": draw.choice(("float32", "float32", "bfloat16")),
        "runtime.threads": draw.randint(1, 2),
        "runtime.device": "cpu",
        "runtime.checkpoint_seconds": 0,
    }


LEFT_OUT: set[str] = set()
"""Renderers that are not to be used."""


def renderers() -> tuple[str, ...]:
    """Return the renderers that this machine has, without those of :data:`LEFT_OUT`."""
    found = ("fused", "torch", "dali") if render_dali.is_installed() else ("fused", "torch")
    return tuple(name for name in found if name not in LEFT_OUT)


def run(*words: object) -> int:
    """Run a command of the command line in this process and return its exit code; what it prints is dropped."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return command_line([str(word) for word in words])
        except SystemExit as stop:
            return int(stop.code or 0)


def overrides(chosen: dict[str, Any]) -> list[str]:
    """Return settings as words of the command line."""
    return [f"{key}={value}" for key, value in chosen.items()]


# -- the activities ----------------------------------------------------------------------------------------------------


def fit_arrays(folder: Path, draw: random.Random) -> None:
    """Fit, predict, transform, save, load and pickle an estimator, on arrays."""
    side, count = draw.randint(12, 32), draw.randint(24, 60)
    pixels = np.stack([np.asarray(picture(number, (side, side))) for number in range(count)])
    chosen = {**settings(draw), "data.resident": "auto"}
    clusterer = ImageClusterer(n_clusters=3, random_state=draw.randint(0, 99), settings=chosen).fit(pixels)
    assert len(clusterer.labels_) == count
    assert len(clusterer.predict(pixels[:7])) == 7
    assert len(clusterer.transform(pixels[:5])) == 5
    clusterer.save(folder / "model.pt")
    assert len(ImageClusterer.load(folder / "model.pt").predict_proba(pixels[:3])) == 3
    assert len(pickle.loads(pickle.dumps(clusterer)).predict(pixels[:3])) == 3


def fit_folder(folder: Path, draw: random.Random) -> None:
    """Fit an estimator on a folder, or group the features of a frozen descriptor, with a given or an open number."""
    images = fill(folder / "images", draw, draw.randint(24, 48))
    chosen, preset = settings(draw), "fast"
    if draw.random() < 0.4:
        preset = "descriptor"
        kept = ("data.workers", "data.resident", "runtime.threads", "runtime.device", "runtime.checkpoint_seconds")
        chosen = {key: chosen[key] for key in kept} | {"data.image_size": 32}
    number = draw.choice((3, "auto"))
    clusterer = ImageClusterer(number, preset=preset, settings=chosen, out=folder / "run").fit(images)
    assert clusterer.predict(sorted(map(str, images.iterdir()))[:4]).shape == (4,)


def commands(folder: Path, draw: random.Random) -> None:
    """Run all stages by the command line, then what is done with a finished run."""
    images = fill(folder / "images", draw, draw.randint(24, 40))
    out = folder / "run"
    words = ["--data", images, "--clusters", 3, "--out", out, "--quiet", *overrides(settings(draw))]
    assert run("run", *words) == 0
    assert run("cluster", out, "--again", "--quiet") == 0
    assert run("run", out, "--quiet") == 0
    assert run("report", out, *draw.choice(((), ("--single-file",)))) == 0
    assert run("predict", out, "--data", images, "--out", folder / "predicted.csv") == 0
    assert run("embed", out, "--data", images, "--out", folder / "features.npz") == 0
    assert run("folders", out, "--out", folder / "groups") == 0
    read_artifacts(out)


def read_artifacts(out: Path) -> None:
    """Read every artifact of a run."""
    folder = RunFolder.existing(out)
    known: list[artifacts.Artifact[Any]] = [artifacts.CONFIG, artifacts.SUMMARY, artifacts.METRICS]
    known += [*artifacts.AT_START, *artifacts.OF_STAGES, *artifacts.AT_END, *artifacts.BESIDE_REPORT]
    for artifact in known:
        if folder.has(artifact):
            folder.read(artifact)


def predictors(folder: Path, draw: random.Random) -> None:
    """Load a predictor several times, use it on images of other sizes, and drop it."""
    side = draw.randint(12, 24)
    pixels = np.stack([np.asarray(picture(number, (side, side))) for number in range(24)])
    chosen = {**settings(draw), "data.resident": "auto"}
    ImageClusterer(n_clusters=3, settings=chosen).fit(pixels).save(folder / "model.pt")
    for _ in range(3):
        predictor = Predictor.load(folder / "model.pt")
        other = draw.randint(10, 40)
        images = np.stack([np.asarray(picture(number, (other, other))) for number in range(draw.randint(2, 30))])
        probabilities, features = predictor.outputs(predictor.source(images), batch_size=draw.randint(4, 16))
        assert len(probabilities) == len(features) == len(images)


def views(folder: Path, draw: random.Random) -> None:
    """Render views by every renderer, of images in memory and of files that threads decode; stop one epoch early."""
    images = fill(folder / "images", draw, draw.randint(20, 40))
    size = draw.randint(12, 40)
    kinds: list[View] = [SimCLRView(), StrongView(cutout=4), AffineView(cutout=4)]
    for name in renderers():
        renderer = renderer_for(name, (0.5,) * 3, (0.25,) * 3, torch.device("cpu"))  # type: ignore[arg-type]
        for resident in ("host", "files"):
            crop: Any = draw.choice(("image", "file", "whole")) if resident == "files" else "image"
            config = DataConfig(
                root=images, image_size=size, resident=resident, crop=crop, workers=draw.randint(1, 3), labels="none"
            )
            source = open_splits(config).train
            maker = ViewMaker(source, renderer, draw.randint(0, 99), "pretext", crop)
            batches = epoch_batches(stream_key(0, "pretext"), 0, len(source), draw.randint(4, 9))

            def render(indices: torch.Tensor, maker: ViewMaker = maker) -> int:
                # Strong and affine views are of images; boxes of files go with every kind.
                return sum(len(view) for view in maker.render([(kind, 0) for kind in kinds], indices, epoch=0))

            early = draw.random() < 0.3
            for count, _ in enumerate(prefetch(render, batches)):
                if early and count == 1:
                    break


def operations(folder: Path, draw: random.Random) -> None:
    """Call the losses and the search of the library, at many sizes."""
    for _ in range(6):
        n, d = draw.randint(8, 300), draw.choice((8, 16, 33, 64, 128))
        first, second = torch.randn(2, n, d, requires_grad=True).unbind()
        nt_xent(first, second, 0.2).backward()
        topk_neighbors(torch.nn.functional.normalize(torch.randn(n, d), dim=1), k=min(5, n - 1))


class _Failing:
    """A data set whose images cannot be read after some readings."""

    def __init__(self, count: int, failing_after: int) -> None:
        self.count, self.left = count, failing_after

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Image.Image:
        self.left -= 1
        if self.left < 0:
            raise OSError("the drive is gone")
        return picture(index, (20, 20))


def errors(folder: Path, draw: random.Random) -> None:
    """Meet the errors that users meet: broken and vanishing images, refused folders and settings, damaged files."""
    images = fill(folder / "images", draw, 24)
    names = sorted(images.iterdir())
    chosen = settings(draw)
    small = ["--data", images, "--clusters", 3, "--quiet", *overrides(chosen)]
    whole = names[3].read_bytes()
    names[3].write_bytes(whole[: len(whole) // 2])
    assert run("run", *small, "--out", folder / "refused") == 2
    assert run("run", *small, "--out", folder / "skipped", "data.on_error=skip") == 0
    assert run("run", *small, "--out", folder / "skipped", "data.on_error=skip", "mining.k=1") == 2
    assert run("run", *small, "--out", folder / "skipped", "mining.k=nonsense") == 2
    names[3].write_bytes(whole)
    model = folder / "skipped" / "model.pt"
    model.write_bytes(model.read_bytes()[: draw.randint(0, 5000)])
    assert run("predict", folder / "skipped", "--data", images, "--out", folder / "table.csv") == 2
    assert run("predict", folder / "nowhere", "--data", images) == 2
    (folder / "full").mkdir()
    (folder / "full" / "letter.txt").write_text("not a run folder")
    assert run("run", *small, "--out", folder / "full") == 2
    for images_given, number in ((_Failing(24, draw.randint(0, 60)), 3), (np.zeros((9, 8, 8)), 3), (images, 1)):
        with contextlib.suppress(ScanFastError, OSError, ValueError):
            ImageClusterer(number, settings={**chosen, "data.resident": "auto"}).fit(images_given)
    # An image that is replaced between two readings of it.
    config = DataConfig(root=images, image_size=16, resident="files", workers=2, labels="none")
    source = open_splits(config).train
    names[5].write_bytes(b"something else")
    with contextlib.suppress(ScanFastError, OSError):
        list(prefetch(lambda rows: source.read(rows).sum(), torch.arange(len(source)).split(4)))
    with contextlib.suppress(ScanFastError):
        source_from(str(folder / "nowhere"))


ACTIVITIES: dict[str, Activity] = {
    function.__name__: function
    for function in (fit_arrays, fit_folder, commands, predictors, views, operations, errors)
}
"""The activities by name; a round does each of them."""
