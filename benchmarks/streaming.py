"""Training from files that are decoded at each use: ``python -m benchmarks.streaming --files 100000``.

It makes a folder of small JPEG files and measures in a separate process: the seconds of listing it and of opening it
(which reads every header), the images per second of one shuffled epoch (decoding, and two SimCLR views of each image),
and the peak of resident memory beyond that of the imported packages. A second folder with a tenth of the files gives
the memory per file. ``--resident`` keeps the decoded images instead, for comparison.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from scan_fast.data import DataConfig, epoch_batches, open_splits, prefetch
from scan_fast.data.folders import find_images
from scan_fast.random import stream_key
from scan_fast.views import SimCLRView, ViewMaker
from scan_fast.views.renderers import renderer_for

from .environment import describe
from .files import write_json
from .memory import ROOT, reset_peak, resident_memory

PER_FOLDER = 1000
VARIANTS = 64


def make_folder(folder: Path, files: int, width: int, height: int) -> None:
    """Write `files` JPEG files of smooth noise, 1,000 to a sub-folder; the contents repeat after 64."""
    generator = np.random.default_rng(0)
    contents = []
    for _ in range(VARIANTS):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        contents.append(buffer.getvalue())
    for number in range(files):
        parent = folder / f"{number // PER_FOLDER:04d}"
        if number % PER_FOLDER == 0:
            parent.mkdir(parents=True)
        (parent / f"photograph-{number:07d}.jpg").write_bytes(contents[number % VARIANTS])


def measure(
    folder: Path, device: str, image_size: int, batch_size: int, resident: bool, workers: int | None
) -> dict[str, Any]:
    """List and open a folder, and render one epoch of it."""
    renderer = renderer_for("auto", (0.5,) * 3, (0.25,) * 3, torch.device(device))
    config = DataConfig(
        root=folder, image_size=image_size, labels="none", resident="auto" if resident else "files", workers=workers
    )
    import torchvision.io  # noqa: F401  (a decoder; loading it is not measured)

    before = reset_peak()
    begin = time.perf_counter()
    files = len(find_images(folder)[0])
    listed = time.perf_counter()
    source = open_splits(config).train
    opened = time.perf_counter()
    views = ViewMaker(source, renderer, seed=0, stage="pretext")
    view = SimCLRView()

    def prepare(indices: torch.Tensor) -> int:
        views.render([(view, 0), (view, 1)], indices, epoch=0)
        return len(indices)

    images = sum(prefetch(prepare, epoch_batches(stream_key(0, "pretext"), 0, len(source), batch_size)))
    end = time.perf_counter()
    return {
        "files": files,
        "list_seconds": listed - begin,
        "open_seconds": opened - listed,
        "epoch_seconds": end - opened,
        "images_per_second": images / (end - opened),
        "peak_bytes": max(0, resident_memory("VmHWM") - before),
    }


def run(options: argparse.Namespace, files: int) -> dict[str, Any]:
    """Make a folder and measure it in a new process."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        make_folder(folder, files, options.width, options.height)
        words = [
            f"--{name.replace('_', '-')}={getattr(options, name)}" for name in ("device", "image_size", "batch_size")
        ]
        words += ["--resident"] if options.resident else []
        words += [f"--workers={options.workers}"] if options.workers else []
        command = [sys.executable, "-m", "benchmarks.streaming", "--measure", str(folder), *words]
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(finished.stderr)
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--files", type=int, default=20_000, help="image files in the larger folder, at least 100")
    parser.add_argument("--width", type=int, default=64, help="of the files, in pixels")
    parser.add_argument("--height", type=int, default=48)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, help="decoding threads, by default one per core")
    parser.add_argument("--resident", action="store_true", help="keep the decoded images if they fit")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        result = measure(
            options.measure, options.device, options.image_size, options.batch_size, options.resident, options.workers
        )
        print(json.dumps(result))
        return
    if options.files < 100:
        parser.error("--files must be at least 100")
    few, many = run(options, options.files // 10), run(options, options.files)
    growth = (many["peak_bytes"] - few["peak_bytes"]) / (many["files"] - few["files"])
    for result in (few, many):
        print(
            f"{result['files']:>9,} files: listed in {result['list_seconds']:.2f} s, opened in "
            f"{result['open_seconds']:.2f} s, {result['images_per_second']:,.0f} images/s, "
            f"peak {result['peak_bytes'] / 2**20:,.1f} MiB"
        )
    print(f"memory per file: {growth:,.0f} bytes")
    if options.json:
        settings = {
            name: getattr(options, name) for name in ("width", "height", "image_size", "batch_size", "resident")
        }
        result = {
            "environment": describe(options.device),
            "settings": settings,
            "results": [few, many],
            "bytes_per_file": growth,
        }
        write_json(options.json, result)


if __name__ == "__main__":
    main()
