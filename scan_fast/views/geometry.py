"""Geometric operations on (n, 3, H, W) float32 batches of integer pixel values: crops, affine maps, boxes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .parameters import Params


def crop_resize(x: Tensor, side: int, params: Params) -> Tensor:
    """Crop each image's box, resize it to (side, side) with PIL's antialiased bilinear filter, and mirror it.

    Both passes are one matrix product per image: out = Wy x Wx, where the columns of W hold the filter taps. Mirroring
    reverses Wx. As in PIL, values are rounded to integers after the horizontal and after the vertical pass. Newer
    versions of Pillow shrink tall crops vertically first, which changes some pixels by one.
    """
    n, _, height, width = x.shape
    flip = params["flip"]
    whole = (params["height"] == side) & (params["width"] == side)
    if height == side and width == side and bool(whole.all()):
        _mirror(x, flip)
        return x
    horizontal = _taps(params["left"], params["width"], flip, width, side)
    vertical = _taps(params["top"], params["height"], torch.zeros_like(flip), height, side)
    x = torch.bmm(x.reshape(n, 3 * height, width), horizontal).add_(0.5).floor_()
    x = torch.matmul(vertical.transpose(1, 2).unsqueeze(1), x.view(n, 3, height, side))
    return x.add_(0.5).floor_()


def _taps(start: Tensor, length: Tensor, flip: Tensor, source: int, side: int) -> Tensor:
    """Return (n, source, side) filter matrices: column j has the weights of the source pixels for output pixel j."""
    device = start.device
    start, length, flip = start.view(-1, 1), length.view(-1, 1), flip.view(-1, 1)
    ratio = length.float() / side
    slope = 1 / ratio.clamp(min=1)
    # Positions are relative to the box. Pixels outside it are infinitely far away and get no weight, as if the box were
    # cropped first.
    index = torch.arange(source, device=device) - start
    pixel = torch.where((index >= 0) & (index < length), (index.float() + 0.5) * slope, math.inf)
    centre = (torch.arange(side, dtype=torch.float32, device=device) + 0.5) * ratio
    centre = torch.where(flip, length - centre, centre) * slope
    taps = (pixel.unsqueeze(2) - centre.unsqueeze(1)).abs_().neg_().add_(1).clamp_(min=0)
    return taps.div_(taps.sum(dim=1, keepdim=True))


def _mirror(x: Tensor, flip: Tensor) -> None:
    """Mirror the chosen images in place."""
    index = flip.nonzero().squeeze(1)
    if index.numel():
        x.index_copy_(0, index, x.index_select(0, index).flip(3))


def matrices(kind: Tensor, amount: Tensor, side: int, index: Mapping[str, int]) -> Tensor:
    """Return the (n, 6) float64 maps from output to input pixels of the strong view's geometric operations.

    (a, b, c, d, e, f) is in PIL's order: output point (x, y) shows the input at (a x + b y + c, d x + e y + f).
    """
    amount = amount.double()
    m = torch.zeros((len(kind), 6), dtype=torch.float64, device=kind.device)
    m[:, 0] = m[:, 4] = 1
    m[:, 1] = torch.where(kind == index["shear_x"], amount, 0)
    m[:, 3] = torch.where(kind == index["shear_y"], amount, 0)
    m[:, 2] = torch.where(kind == index["translate_x"], amount * side, 0)
    m[:, 5] = torch.where(kind == index["translate_y"], amount * side, 0)
    angle = torch.where(kind == index["rotate"], -amount * (math.pi / 180), 0)
    cos, sin = torch.cos(angle), torch.sin(angle)
    centre = side / 2
    rotation = torch.stack(
        (cos, sin, centre - centre * cos - centre * sin, -sin, cos, centre + centre * sin - centre * cos), dim=1
    )
    return torch.where((kind == index["rotate"]).unsqueeze(1), rotation, m)


def fixed_point(matrix: Tensor) -> Tensor:
    """Convert maps to PIL's steps through the input in 16.16 fixed point.

    For pure shifts PIL uses floating-point positions. Rounding these down to whole pixels gives the same pixels.

    Args:
        matrix: (n, 6) float64 maps from output to input pixels.

    Returns:
        (n, 6) int32: start x, x per column, x per row, start y, y per column, y per row.
    """
    a, b, c, d, e, f = matrix.double().unbind(1)
    shift = (b == 0) & (d == 0)
    one = 65536.0
    x0, y0 = c + a * 0.5 + b * 0.5, f + d * 0.5 + e * 0.5
    start_x = torch.where(shift, x0.floor() * one, (x0 * one + 0.5).floor())
    start_y = torch.where(shift, y0.floor() * one, (y0 * one + 0.5).floor())
    ax, bx, dy, ey = ((v * one + 0.5).floor() for v in (a, b, d, e))
    return torch.stack((start_x, ax, bx, start_y, dy, ey), dim=1).to(torch.int32)


def affine_nearest(x: Tensor, matrix: Tensor) -> Tensor:
    """Resample with the nearest pixel and black outside, like PIL's Image.transform(AFFINE, NEAREST).

    Args:
        x: (n, 3, H, W).
        matrix: (n, 6) float64 maps from output to input pixels.
    """
    n, channels, height, width = x.shape
    start_x, ax, bx, start_y, dy, ey = (v.view(-1, 1, 1) for v in fixed_point(matrix).unbind(1))
    column = torch.arange(width, dtype=torch.int32, device=x.device).view(1, 1, -1)
    row = torch.arange(height, dtype=torch.int32, device=x.device).view(1, -1, 1)
    px = (start_x + ax * column + bx * row) >> 16
    py = (start_y + dy * column + ey * row) >> 16
    inside = (px >= 0) & (px < width) & (py >= 0) & (py < height)
    position = (py * width + px).mul_(inside).view(n, 1, -1).to(torch.int64)
    picked = torch.gather(x.view(n, channels, -1), 2, position.expand(-1, channels, -1))
    return picked.mul_(inside.view(n, 1, -1)).view(x.shape)


def affine_bilinear(x: Tensor, matrix: Tensor) -> Tensor:
    """Resample bilinearly with black outside and round to integers; matrix (n, 6) maps output to input pixels."""
    n, _, height, width = x.shape
    a, b, c, d, e, f = matrix.unbind(1)
    # grid_sample's coordinates run from -1 to 1 over each side.
    ratio = width / height
    theta = torch.stack(
        (
            torch.stack((a, b / ratio, (a * width + b * height + 2 * c) / width - 1), dim=1),
            torch.stack((d * ratio, e, (d * width + e * height + 2 * f) / height - 1), dim=1),
        ),
        dim=1,
    )
    grid = torch.nn.functional.affine_grid(theta, [n, 3, height, width], align_corners=False)
    out = torch.nn.functional.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return out.add_(0.5).floor_().clamp_(0, 255)


def box_mask(boxes: Tensor, side: int) -> Tensor:
    """Return (n, 1, side, side) bool, true inside each image's (top, left, bottom, right) box."""
    top, left, bottom, right = boxes.view(-1, 4, 1, 1, 1).unbind(1)
    position = torch.arange(side, device=boxes.device)
    row, column = position.view(1, 1, -1, 1), position.view(1, 1, 1, -1)
    return (row >= top) & (row < bottom) & (column >= left) & (column < right)
