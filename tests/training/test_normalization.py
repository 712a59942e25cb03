"""The normalisation of a run: the configuration's, else the weights', else the data set's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from driving import opened

from scan_fast.models.pretrained import IMAGENET_MEAN, IMAGENET_STD

DIGITS = ((0.3053,) * 3, (0.3759,) * 3)
WEIGHTS = ("model={backbone: 'torchvision:resnet18', weights: FILE, width: 1}", "data.image_size=8")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), DIGITS),
        (WEIGHTS, (IMAGENET_MEAN, IMAGENET_STD)),
        ((WEIGHTS[0].replace("FILE", "null"),), DIGITS),
        ((*WEIGHTS, "data.mean=[0.1, 0.2, 0.3]"), ((0.1, 0.2, 0.3), IMAGENET_STD)),
        ((*WEIGHTS, "data.mean=[0.1, 0.2, 0.3]", "data.std=[1, 1, 1]"), ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))),
        (("data.std=[1, 1, 1]",), (DIGITS[0], (1.0, 1.0, 1.0))),
    ],
)
def test_whose_normalisation_it_is(words: tuple[str, ...], expected: object, file: Path, tmp_path: Path) -> None:
    words = tuple(word.replace("FILE", f"'{file}'") for word in words)
    with opened(tmp_path / "run", *words) as context:
        assert (context.splits.mean, context.splits.std) == expected
        # The renderer uses it: a black image is -mean / std.
        black = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
        view = context.plain_view
        params = view.sample((0, 0), 0, torch.zeros(1, dtype=torch.int64), 0, 8, 8)
        pixels = context.renderer(black, view, params)[0, :, 0, 0]
        mean, std = (torch.tensor(values) for values in (context.splits.mean, context.splits.std))
        torch.testing.assert_close(pixels, -mean / std)
