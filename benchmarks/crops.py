"""Compares the crops of ``data.crop`` with torchvision's Resize(256) and crops of 224 pixels, on photographs.

    python -m benchmarks.crops --json FILE

Two photographs that scikit-learn brings are stored as JPEG files of several shapes. For each value of ``data.crop`` the
result has the largest and the mean difference of the plain view from torchvision's in pixel values, the mean share of
an image that a SimCLR crop shows, the difference of crops with the box of torchvision's, and images per second.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scan_fast.data.decode import cut
from scan_fast.data.encoded import ImagePaths
from scan_fast.data.files import FileSource
from scan_fast.data.placement import Crop
from scan_fast.random import stream_key
from scan_fast.views.maker import ViewMaker
from scan_fast.views.parameters import PlainView, SimCLRView
from scan_fast.views.render_fused import FusedRenderer

from .environment import describe
from .files import write_json

SHAPES = [(500, 375), (375, 500), (501, 333), (2000, 1333), (150, 113), (900, 300), (400, 400), (281, 399)]
"""Width and height of the photographs in pixels."""
SIDE, SHORTER = 224, 256
CROPS: tuple[Crop, ...] = ("image", "file", "whole")
BOX = ("top", "left", "height", "width")
BOXES = 40
DRAWS = 10_000
TIMED = 200


def open_photographs(folder: Path) -> FileSource:
    """Store the photographs in all shapes, one after the other, and open them."""
    from sklearn.datasets import load_sample_images

    names = []
    for width, height in SHAPES:
        for number, pixels in enumerate(load_sample_images().images):
            names.append(f"{width}x{height}-{number}.jpg")
            resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
            resized.save(folder / names[-1], quality=92)
    return FileSource(ImagePaths(names, folder), None, SHORTER, workers=1, resident=False)


def photograph(source: FileSource, row: int) -> Image.Image:
    """Return one of the photographs, decoded by PIL."""
    with Image.open(Path(source.files.images.root) / source.paths[row]) as image:
        return image.convert("RGB")


def maker(source: FileSource, crop: Crop) -> ViewMaker:
    """Return a maker of views whose values are pixel values."""
    return ViewMaker(source, FusedRenderer((0.0,) * 3, (1 / 255,) * 3, "cpu"), 0, "evaluation", crop)


def plain_differences(source: FileSource, crop: Crop) -> dict[str, float]:
    """Return the largest and the mean difference of the plain view from Resize and CenterCrop, in pixel values."""
    from torchvision import transforms

    transform = transforms.Compose([transforms.Resize(SHORTER), transforms.CenterCrop(SIDE)])
    expected = torch.stack([pixels_of(transform(photograph(source, row))) for row in range(len(source))])
    rows = torch.arange(len(source))
    found = maker(source, crop).render([(PlainView(size=SIDE), 0)], rows, epoch=0)[0]
    difference = (found.permute(0, 2, 3, 1).round() - expected).abs()
    return {"largest": float(difference.max()), "mean": float(difference.mean())}


def pixels_of(image: Image.Image) -> Tensor:
    """Return (H, W, 3) int32 pixel values."""
    return torch.from_numpy(np.array(image)).int()


def shares(source: FileSource) -> list[dict[str, Any]]:
    """Return for each shape the mean share of an image that crops show: ours, torchvision's, of the centre square."""
    from torchvision import transforms

    found = []
    for number, shape in enumerate(SHAPES):
        height, width = (int(n) for n in source.files.whole_sizes(torch.tensor([2 * number]), SHORTER))
        torch.manual_seed(0)
        image, area = torch.empty(3, height, width), height * width
        drawn = [transforms.RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(DRAWS)]
        theirs = [h * w / area for _, _, h, w in drawn]
        entry: dict[str, Any] = {"shape": shape, "torchvision": statistics.mean(theirs)}
        entry["error"] = statistics.stdev(theirs) * (2 / DRAWS) ** 0.5
        for name, lengths in (("whole", (height, width)), ("square", (SHORTER, SHORTER))):
            drawn_here = SimCLRView(size=SIDE).sample(
                stream_key(0, "clustering"), 0, torch.arange(DRAWS), 0, *(torch.full((DRAWS,), n) for n in lengths)
            )
            entry[name] = float((drawn_here["height"] * drawn_here["width"]).double().mean() / area)
        found.append(entry)
    return found


def box_differences(source: FileSource) -> dict[str, dict[str, float]]:
    """Return how crops with torchvision's boxes differ from its own: with two resizes as it does, and with one."""
    from torchvision.transforms import functional

    differences: dict[str, list[Tensor]] = {"whole": [], "file": []}
    for row in range(len(source)):
        image = photograph(source, row)
        rows = torch.full((BOXES,), row)
        lengths = source.files.whole_sizes(rows, SHORTER)
        drawn = SimCLRView(size=SIDE).sample(stream_key(0, "clustering"), 0, torch.arange(BOXES), 0, *lengths)
        boxes = torch.stack([drawn[name] for name in BOX], dim=1)
        resized = functional.resize(image, SHORTER)
        ours = source.files.cut_whole(rows, SHORTER, [boxes], [SIDE])[0].int()
        scale = (image.height / resized.height, image.width / resized.width)
        for box, mine in zip(boxes.tolist(), ours, strict=True):
            theirs = pixels_of(functional.resized_crop(resized, *box, [SIDE, SIDE]))
            top, left, bottom, right = (
                round(at * scale[i % 2]) for i, at in enumerate((box[0], box[1], box[0] + box[2], box[1] + box[3]))
            )
            direct = torch.tensor([[top, left, bottom - top, right - left]])
            once = cut(torch.from_numpy(np.array(image)), direct, SIDE)[0].int()
            differences["whole"].append((mine - theirs).abs())
            differences["file"].append((once - theirs).abs())
    return {
        name: {
            "largest": float(max(each.max() for each in several)),
            "mean": statistics.mean(float(each.float().mean()) for each in several),
            "above_8": statistics.mean(float((each > 8).float().mean()) for each in several),
        }
        for name, several in differences.items()
    }


def rates(source: FileSource) -> dict[str, float]:
    """Return images of 500 x 375 pixels per second of processor time; "image" is the decoding that happens once."""
    rows = torch.arange(2).repeat(TIMED // 2)
    found: dict[str, float] = {}
    for crop in CROPS:
        begin = time.process_time()
        if crop == "image":
            source.read(rows)
        else:
            maker(source, crop).render([(SimCLRView(size=SIDE), 0)], rows, epoch=0)
        found[crop] = TIMED / (time.process_time() - begin)
    return found


def table(result: dict[str, Any]) -> str:
    """Return Markdown tables of the differences and of the shares."""
    rows = [
        "| `data.crop` | plain view: largest | mean | same random box: largest | mean | above 8 | images/s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for crop in CROPS:
        plain, box = result["plain"][crop], result["boxes"].get(crop)
        same = "| | " if box is None else f"{box['largest']:.0f} | {box['mean']:.2f} | {100 * box['above_8']:.0f} %"
        rate = f"{result['rates'][crop]:.0f}{' (once)' if crop == 'image' else ''}"
        rows.append(f"| `{crop}` | {plain['largest']:.0f} | {plain['mean']:.2f} | {same} | {rate} |")
    rows += ["", "| width x height | torchvision | `whole` | the centre square |", "|---|---:|---:|---:|"]
    for entry in result["shares"]:
        width, height = entry["shape"]
        cells = (f"{100 * entry[name]:.1f}" for name in ("torchvision", "whole", "square"))
        rows.append(f"| {width} x {height} | {' | '.join(cells)} |")
    error = max(entry["error"] for entry in result["shares"])
    return "\n".join(rows) + (
        f"\n\nDifferences from torchvision in pixel values; percent of the image that a SimCLR crop shows, mean of "
        f"{DRAWS:,} (standard error of a difference at most {100 * error:.1f}).\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        source = open_photographs(Path(temporary))
        result: dict[str, Any] = {"benchmark": "crops", "device": "cpu", "environment": describe("cpu")}
        result["plain"] = {crop: plain_differences(source, crop) for crop in CROPS}
        result |= {"shares": shares(source), "boxes": box_differences(source), "rates": rates(source)}
    print(table(result))
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
