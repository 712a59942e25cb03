"""The normalisation of a run: the configuration's, else the weights', else the data set's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from driving import opened

from scan_fast.models.pretrained import IMAGENET_MEAN, IMAGENET_STD

DIGITS = ((0.3053,) * 3, (0.3759,) * 3)
PRETRAINED = ("model={backbone: 'torchvision:resnet18', pretrained: true, width: 1}", "precision=float32")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), DIGITS),
        (PRETRAINED, (IMAGENET_MEAN, IMAGENET_STD)),
        ((PRETRAINED[0].replace("true", "false"),), DIGITS),
        ((*PRETRAINED, "data.mean=[0.1, 0.2, 0.3]"), ((0.1, 0.2, 0.3), IMAGENET_STD)),
        ((*PRETRAINED, "data.mean=[0.1, 0.2, 0.3]", "data.std=[1, 1, 1]"), ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))),
        (("data.std=[1, 1, 1]",), (DIGITS[0], (1.0, 1.0, 1.0))),
    ],
)
def test_whose_normalisation_it_is(words: tuple[str, ...], expected: object, tmp_path: Path) -> None:
    with opened(tmp_path / "run", *words) as context:
        assert (context.splits.mean, context.splits.std) == expected
        # The renderer uses it: a black image is -mean / std.
        black = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
        view = context.plain_view
        params = view.sample((0, 0), 0, torch.zeros(1, dtype=torch.int64), 0, 8, 8)
        pixels = context.renderer(black, view, params)[0, :, 0, 0]
        mean, std = (torch.tensor(values) for values in (context.splits.mean, context.splits.std))
        torch.testing.assert_close(pixels, -mean / std)
